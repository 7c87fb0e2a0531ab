// Reflection: replies and edits; and where the time of an iteration went.

function bars(x, parts) {
  return Object.entries(parts).map(([name, y], index) => ({ x, y, name: label(name, 30), type: "bar",
    marker: { color: series(index), opacity: 1 - 0.35 * Math.floor(index / 6) }, hovertemplate: `${label(name, 30)}<br>iteration %{x}: %{y:.4g}<extra></extra>` }));
}

const total = (list) => list.reduce((a, b) => a + b, 0);
const stacked = (unit, iterations) => ({ barmode: "stack", bargap: 0.15, showlegend: true, xaxis: iterationAxis(iterations), yaxis: { title: { text: unit } } });

function barFigure(title, x, parts, unit) {
  const area = h("div", { class: "chart" });
  chart(area, title, () => ({ traces: bars(x, parts), shape: stacked(unit, x) }));
  const names = Object.keys(parts);
  return h("figure", { class: "card" }, h("figcaption", {}, h("h3", {}, title)), area,
    fold(`Numbers: ${title}`, () => table(title, ["Iteration", ...names], x.map((each, i) => [each, ...names.map((name) => parts[name][i])]))));
}

function showHealth() {
  const health = current().health;
  const { iterations, replies, accepted, dropped, events, children, no_child: none } = health;
  const asked = total(Object.values(replies).map(total));
  const select = Object.keys(current().shown).filter((i) => current().shown[i].conversations);
  options("conversations-select", select.map((each) => [each, each]), select[select.length - 1]);
  byId("conversations-select").closest(".controls").hidden = !select.length;
  show("conversations");
  if (!asked && !total(accepted)) {
    show("reflection-body", h("p", { class: "muted" }, "This run did not reflect."));
    return;
  }
  const facts = [["Replies", number(asked)], ["usable", number(total(replies.usable))], ["cut off", number(total(replies.cut_off))], ["missing", number(total(replies.missing))],
    ["Edits accepted", number(total(accepted))], ["Edits dropped", number(total(Object.values(dropped).map(total)))], ["Children", number(total(children))]];
  show("reflection-body",
    h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    h("div", { class: "charts two" },
      barFigure("Replies of the reflector", iterations, { usable: replies.usable, "cut off": replies.cut_off, missing: replies.missing }, "replies"),
      barFigure("Edits accepted and dropped", iterations, { accepted, ...dropped }, "edits")),
    table("Reasons why edits were dropped", ["Reason", "Edits"], Object.entries(dropped).map(([reason, counts]) => [reason, total(counts)])),
    table("Replies that needed more than one request, or were of no use", ["What happened", "Number"],
      Object.entries(events).map(([what, counts]) => [what, total(counts)])),
    Object.keys(none).length ? table("Why there was no child", ["Reason", "Iterations"], Object.entries(none)) : null);
}

function showTimes() {
  const { iterations, phases, total: totals } = current().times;
  chart(byId("time-chart"), "seconds by phase", () => ({ traces: bars(iterations, phases), shape: stacked("seconds", iterations) }));
  const all = total(totals);
  const names = Object.keys(phases);
  show("time-table",
    table("Seconds by phase", ["Phase", "Seconds", "Share"], names.map((name) => [name, total(phases[name]), `${all ? (100 * total(phases[name]) / all).toFixed(1) : 0}%`])),
    fold("Numbers: seconds of each iteration", () => table("Seconds of each iteration", ["Iteration", ...names, "total"],
      iterations.map((each, i) => [each, ...names.map((name) => phases[name][i]), totals[i]]))));
}

function startHealth() {
  const open = async () => {
    const iteration = byId("conversations-select").value;
    show("conversations", [await conversationsOf(iteration)].flat());
    say(`Conversations of iteration ${iteration} are shown.`);
  };
  byId("conversations-show").addEventListener("click", open);
}
