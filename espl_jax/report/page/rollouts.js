// Rollouts of an iteration: a table with filters, and one rollout opened.

let rollouts = [];
let statements = {};

async function loadRollouts() {
  const iteration = byId("rollouts-select").value;
  const run = state.run;
  const data = iteration ? await iterationOf(iteration) : null;
  if (run !== state.run || iteration !== byId("rollouts-select").value) return;
  rollouts = data?.rollouts || [];
  statements = data?.problems || {};
  const keep = [byId("filter-prompt").value, byId("filter-problem").value];
  const distinct = (name) => [...new Set(rollouts.map((each) => each[name]))];
  options("filter-prompt", [["", "all"], ...distinct("prompt").map((id) => [id, id])]);
  options("filter-problem", [["", "all"], ...distinct("problem").map((id) => [id, id])]);
  for (const [id, value] of [["filter-prompt", keep[0]], ["filter-problem", keep[1]]]) {
    if ([...byId(id).options].some((option) => option.value === value)) byId(id).value = value;
  }
  byId("rollout").hidden = true;
  filterRollouts();
}

function filterRollouts() {
  const prompt = byId("filter-prompt").value, problem = byId("filter-problem").value;
  const low = byId("filter-low").value, high = byId("filter-high").value;
  const kept = rollouts.filter((each) => (!prompt || each.prompt === prompt) && (!problem || each.problem === problem) &&
    (low === "" || each.reward >= Number(low)) && (high === "" || each.reward <= Number(high)));
  const iteration = byId("rollouts-select").value;
  const shown = current().shown[iteration] || { of: 0, rollouts: 0, cut: 0 };
  byId("rollouts-shown").textContent = iteration
    ? `Shown: ${kept.length} of the ${shown.rollouts ?? 0} rollouts in the page; iteration ${iteration} had ${shown.of ?? 0}.` +
      (shown.cut ? ` Replies of more than ${shown.cut} tokens are cut in the middle.` : "")
    : "The run has no rollouts.";
  show("rollouts-table", table(`Rollouts of iteration ${iteration}`,
    ["Prompt", "Reply", "Problem", "Sample", "Reward", "Advantage", "Tokens", "Answer", "Ended"],
    kept.map((each) => [memberButton(each.prompt),
      h("button", { type: "button", "aria-label": `Open the rollout of ${each.prompt} on ${each.problem}, sample ${each.sample}`, onclick: () => openRollout(each) }, "Open"),
      each.problem, each.sample, each.reward, each.advantage ?? null, each.length,
      h("span", { class: "cell" }, each.answer ?? "–"), each.truncated ? "at a limit" : "by itself"]),
    "No rollout passes the filters."));
}

/** The ways to colour tokens that a rollout has data for. */
function colourings(each, vocabulary) {
  if (!vocabulary || !each.tokens?.length) return [];
  const found = [];
  if (each.logprobs) found.push(["logprob", "logprob"]);
  if (each.logprobs && each.trainer_logprobs) found.push(["ratio", "importance ratio"]);
  if (each.advantage !== undefined) found.push(["advantage", "advantage"]);
  return [...found, ["none", "none"]];
}

async function openRollout(each) {
  const vocabulary = await vocabularyOf();
  const ways = colourings(each, vocabulary);
  const area = h("div", { class: "tokens" });
  const legend = h("p", { class: "note", "aria-live": "polite" });
  const select = h("select", {}, ways.map(([value, text]) => h("option", { value }, text)));
  const paint = () => { area.replaceChildren(...turns(each, vocabulary, select.value)); legend.textContent = legendOf(select.value, each); };
  select.addEventListener("change", paint);
  const [statement, gold] = statements[each.problem] || [];
  const facts = [["Reward", number(each.reward)], ["Success", each.success ? "yes" : "no"], ["Advantage", number(each.advantage)], ["Answer", each.answer ?? "–"],
    ["Tokens", number(each.length)], ["Logprob", number(each.logprob)], ...Object.entries(each.environment || {}).map(([name, value]) => [name, number(value)])];
  show("rollout",
    h("div", { class: "head" }, h("h3", { id: "rollout-title" }, `Rollout of ${each.prompt} on ${each.problem}, sample ${each.sample}`),
      h("button", { type: "button", onclick: () => { byId("rollout").hidden = true; byId("rollouts-table").querySelector("button")?.focus(); } }, "Close")),
    h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    statement ? h("div", {}, message("problem", statement, "user"), gold ? h("p", { class: "note" }, "Gold answer: ", h("code", {}, gold)) : null) : null,
    each.feedback ? h("p", {}, h("strong", {}, "Feedback: "), each.feedback) : null,
    ways.length ? h("div", { class: "controls" }, h("label", {}, "Colour tokens by ", select)) : null,
    ways.length ? legend : null,
    ways.length ? area : h("div", { class: "conversation" }, spoken(each.reply || "")),
    ways.length ? fold("Reply as it was graded", () => h("div", { class: "conversation" }, spoken(each.reply || ""))) : null,
    ways.length ? fold("Tokens as a table", () => tokenTable(each, vocabulary)) : null);
  if (ways.length) paint();
  byId("rollout").hidden = false;
  byId("rollout").focus();
}

/** A reply as text. Messages of others begin with their role in brackets. */
function spoken(text) {
  return text.split(/\n\n(?=\[(?:tool|user|system)\]\n)/).map((part) => {
    const found = /^\[(tool|user|system)\]\n/.exec(part);
    return found ? message(found[1], part.slice(found[0].length)) : message("assistant", part);
  });
}

const sampled = (each, i) => !each.logprobs || each.logprobs[i] !== null;

/** The turns of a rollout: runs of sampled tokens, and of tokens that the environment appended. */
function turns(each, vocabulary, way) {
  const parts = [];
  let part = null;
  each.tokens.forEach((token, i) => {
    const own = sampled(each, i);
    if (!part || part.own !== own) parts.push(part = { own, spans: [] });
    if (each.left_out && i === each.left_out[0]) part.spans.push(h("span", { class: "gap" }, `[… ${each.left_out[1]} tokens left out …]`));
    part.spans.push(tokenSpan(each, vocabulary, i, own ? way : "none"));
  });
  return parts.map(({ own, spans }) => h("div", { class: `message ${own ? "assistant" : "tool"}` },
    h("p", { class: "role" }, own ? "model" : "appended by the environment"), h("div", { class: "text" }, spans)));
}

function tokenSpan(each, vocabulary, i, way) {
  const text = vocabulary[each.tokens[i]] ?? "�";
  const logprob = each.logprobs?.[i] ?? null, trainer = each.trainer_logprobs?.[i] ?? null;
  const ratio = logprob !== null && trainer !== null ? Math.exp(trainer - logprob) : null;
  const told = [logprob !== null ? `logprob ${logprob.toFixed(3)}` : "", ratio !== null ? `ratio ${ratio.toFixed(3)}` : ""].filter(Boolean).join(", ");
  const span = h("span", { title: told || null }, text);
  const value = { logprob, ratio: ratio === null ? null : Math.log(ratio), advantage: each.advantage ?? null }[way] ?? null;
  if (value !== null) span.style.backgroundColor = shadeOf(way, value);
  return span;
}

/** Background of a token: orange for unlikely ones; blue above and orange below a ratio of 1 or an advantage of 0. */
function shadeOf(way, value) {
  const strength = way === "logprob" ? Math.min(-value / 5, 1) : way === "ratio" ? Math.min(Math.abs(value) / 0.2, 1) : Math.min(Math.abs(value), 1);
  const warm = way === "logprob" || value < 0;
  return faint(warm ? colour("warm") : colour("cool"), (0.5 * strength).toFixed(3));
}

function legendOf(way, each) {
  return {
    logprob: "The stronger the orange, the less likely the token was (full colour at a logprob of −5 or less).",
    ratio: "Importance ratio of trainer and sampler: blue above 1, orange below 1 (full colour at a factor of 1.22).",
    advantage: `All tokens of a rollout have its advantage, ${number(each.advantage)}: blue if positive, orange if negative.`,
    none: "",
  }[way];
}

function tokenTable(each, vocabulary) {
  return table("Tokens of the rollout", ["Position", "Text", "Id", "Logprob", "Trainer logprob", "Ratio"], each.tokens.map((token, i) => {
    const logprob = each.logprobs?.[i] ?? null, trainer = each.trainer_logprobs?.[i] ?? null;
    const place = each.left_out && i >= each.left_out[0] ? i + each.left_out[1] : i;
    return [place + 1, h("code", {}, JSON.stringify(vocabulary[token] ?? "")), token, logprob, trainer,
      logprob !== null && trainer !== null ? Math.exp(trainer - logprob) : null];
  }));
}

function showRollouts() {
  const iterations = Object.keys(current().shown).map(Number).filter((i) => current().shown[i].rollouts);
  options("rollouts-select", iterations.map((each) => [each, each]), iterations[iterations.length - 1]);
  loadRollouts();
}

function startRollouts() {
  byId("rollouts-select").addEventListener("change", loadRollouts);
  steps("rollouts-select", "rollouts-previous", "rollouts-next");
  for (const id of ["filter-prompt", "filter-problem", "filter-low", "filter-high"]) byId(id).addEventListener("input", filterRollouts);
  byId("filter-reset").addEventListener("click", () => { byId("rollout-filters").reset(); for (const id of ["filter-prompt", "filter-problem"]) byId(id).value = ""; filterRollouts(); });
  byId("rollout-filters").addEventListener("submit", (event) => event.preventDefault());
}
