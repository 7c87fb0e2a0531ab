"use strict";
// Data and elements. Text from models, problems and users only ever becomes a text node or an attribute.

const state = { run: 0, member: "", smoothing: 0, iteration: {} };
let overview = [];
const loaded = new Map();

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i += 1) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** Returns the text in a block: base64 of gzip. */
async function unpackText(id) {
  const bytes = fromBase64(document.getElementById(id).textContent);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

/** Returns the JSON value in a block, read once; null if the page has no such block. */
function unpack(id) {
  if (!loaded.has(id)) {
    loaded.set(id, document.getElementById(id) ? unpackText(id).then(JSON.parse) : Promise.resolve(null));
  }
  return loaded.get(id);
}

const current = () => overview[state.run];
const membersOf = () => unpack(`run${state.run}-members`);
const vocabularyOf = () => unpack(`run${state.run}-vocabulary`);
const iterationOf = (iteration) => unpack(`run${state.run}-iteration-${iteration}`);

/** Makes an element. Children are elements or texts; attributes are set as such, `onclick` and others as listeners. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

const byId = (id) => document.getElementById(id);
const show = (id, ...children) => byId(id).replaceChildren(...children.flat().filter(Boolean));
const say = (text) => { byId("status").textContent = text; };

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : value.toFixed(digits);
}

const plural = (count, name) => `${count} ${name}${count === 1 ? "" : "s"}`;

/** A text for plotly, which reads tags and entities in labels: the characters that start them are replaced. */
function label(text, most = 24) {
  const plain = String(text).replace(/</g, "‹").replace(/>/g, "›").replace(/&/g, "＆").replace(/[$\\]/g, "·");
  return plain.length > most ? `${plain.slice(0, most - 1)}…` : plain;
}

/** Fills a select element; values and their texts come as pairs. */
function options(id, pairs, chosen) {
  show(id, pairs.map(([value, text]) => h("option", { value }, text)));
  if (chosen !== undefined) byId(id).value = String(chosen);
}

/** Makes two buttons step through a select element. */
function steps(id, previous, next) {
  const select = byId(id);
  const move = (by) => {
    const index = Math.min(Math.max(select.selectedIndex + by, 0), select.options.length - 1);
    if (index === select.selectedIndex) return;
    select.selectedIndex = index;
    select.dispatchEvent(new Event("change"));
  };
  byId(previous).addEventListener("click", () => move(-1));
  byId(next).addEventListener("click", () => move(1));
}

async function copy(button) {
  const text = byId(button.dataset.copy).textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "unseen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const before = button.textContent;
  button.textContent = "Copied";
  say("Copied.");
  setTimeout(() => { button.textContent = before; }, 1500);
}
