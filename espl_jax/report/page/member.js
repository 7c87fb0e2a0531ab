// What a click on a member shows.

async function chooseMember(id, move = false) {
  state.member = id;
  byId("member-select").value = id;
  for (const name of ["family-chart", "ratings-chart"]) {
    if (byId(name).classList.contains("js-plotly-plot")) draw(byId(name));
  }
  const run = state.run;
  const details = (await membersOf())[id];
  if (run !== state.run || id !== state.member) return;
  const node = current().members.find((each) => each.id === id);
  show("member", memberCard(node, details));
  if (move) byId("member-title").focus();
}

function memberCard(node, details) {
  const born = node.iteration ? `, born in iteration ${node.iteration}` : "";
  const parents = node.parents.flatMap((id, i) => [i ? " and " : " of ", memberButton(id)]);
  return [
    h("h3", { id: "member-title", tabindex: -1 }, `Member ${node.id}`),
    h("p", { class: "lead" }, node.operator, parents, `${born}. Rating ${node.mu.toFixed(2)} ± ${node.sigma.toFixed(2)}, ${plural(node.games, "tournament")}; `,
      node.deployed ? "deployed." : node.living ? "alive." : "left the population."),
    details.text ? h("p", { class: "prose" }, details.text) : null,
    details.principles.length ? h("ol", { class: "principles", start: 0 }, details.principles.map((each) => h("li", {}, each))) : h("p", { class: "muted" }, "No principles."),
    details.diffs.map((each) => diffPart(each)),
    details.edits.length ? [h("h4", {}, "Edits"), h("ul", { class: "edits" }, details.edits.map(editItem))] : null,
    details.feedback.length ? [h("h4", {}, "Feedback of the environment that led to them"),
      h("ul", {}, details.feedback.map(([text, count]) => h("li", {}, h("span", { class: "tag" }, `${count}×`), " ", text)))] : null,
    Object.keys(details.evidence).length ? fold("Evidence of the operator", () => values(details.evidence)) : null,
    details.tournaments.length ? fold(`Tournaments (${details.tournaments.length})`, () => table(`Tournaments of ${node.id}`,
      ["Iteration", "Mean reward", "Rank", "Players", "Rating after", "Sigma after"],
      details.tournaments.map((each) => [each.iteration, each.value, each.rank + 1, Array.isArray(each.players) ? each.players.join(", ") : String(each.players), each.mu, each.sigma]))) : null,
    node.operator !== "root" ? fold("Conversations with the reflector", () => conversationsOf(node.iteration, node.operator)) : null,
  ].flat(2).filter(Boolean);
}

/** The words that the child has and its parent has not, and the other way round. */
function diffPart({ parent, parts }) {
  const names = { "+": "ins", "-": "del", "=": "span" };
  const told = { "+": "added: ", "-": "removed: " };
  return [
    h("h4", {}, "Difference from ", memberButton(parent)),
    h("p", { class: "diff" }, parts.map(([kind, text]) => h(names[kind], {}, kind === "=" ? null : h("span", { class: "unseen" }, told[kind]), text))),
  ];
}

function editItem(edit) {
  const target = edit.ids ? edit.ids.join(", ") : edit.id || "";
  const text = edit.principle ?? edit.replace ?? edit.text ?? "";
  return h("li", {},
    h("span", { class: "tag" }, edit.op), " ", target ? h("code", {}, target) : null, target ? " " : null,
    edit.search ? h("del", {}, edit.search) : null, edit.search ? " " : null,
    text, edit.op === "rewrite" && edit.principles ? h("ol", { start: 0 }, edit.principles.map((each) => h("li", {}, each))) : null,
    edit.evidence ? h("blockquote", {}, typeof edit.evidence === "string" ? edit.evidence : JSON.stringify(edit.evidence)) : null);
}

/** Nested JSON values as lists. */
function values(value) {
  if (Array.isArray(value)) return h("ul", {}, value.map((each) => h("li", {}, values(each))));
  if (value && typeof value === "object") {
    return h("dl", { class: "values" }, Object.entries(value).map(([name, each]) => h("div", {}, h("dt", {}, name), h("dd", {}, values(each)))));
  }
  return h("span", { class: "text" }, typeof value === "number" ? number(value) : String(value));
}

/** Conversations of an iteration with the reflector; of one operator, or of all. */
async function conversationsOf(iteration, operator) {
  const data = await iterationOf(iteration);
  const all = (data?.transcripts || []).filter((each) => !operator || each.operator === operator);
  if (!all.length) return h("p", { class: "muted" }, "The page has no conversations of this iteration.");
  const shown = current().shown[iteration] || {};
  const note = shown.conversations < shown.conversations_of
    ? h("p", { class: "note" }, `Shown: ${shown.conversations} of ${shown.conversations_of} conversations of iteration ${iteration}.`) : null;
  return [note, ...all.map((each, index) => conversation(each, index + 1))];
}

function message(role, text, kind = role) {
  return h("div", { class: `message ${["system", "user", "assistant", "tool"].includes(kind) ? kind : "other"}` }, h("p", { class: "role" }, role), h("div", { class: "text" }, text));
}

function conversation(each, index) {
  const end = each.reply === null ? "no reply" : each.ended === false ? "cut off" : "";
  const title = `${index}. ${each.operator}, ${each.stage}${end ? `, ${end}` : ""}`;
  return fold(title, () => h("div", { class: "conversation" },
    each.conversation.map((part) => message(part.role, part.content)),
    each.reasoning ? message("assistant, reasoning", each.reasoning, "assistant") : null,
    each.request ? message("user", each.request) : null,
    each.reply === null ? h("p", { class: "muted" }, "No reply.") : message("assistant", each.reply)));
}
