// The family tree, coloured by rating, and ratings over time.

const SYMBOLS = { root: "square", mutation: "circle", crossover: "diamond" };

function familyChart() {
  const members = current().members;
  const at = new Map(members.map((each) => [each.id, each]));
  const edges = (operator) => {
    const x = [], y = [];
    for (const child of members) {
      if ((child.operator === "crossover") !== (operator === "crossover")) continue;
      for (const id of child.parents) {
        const parent = at.get(id);
        if (!parent) continue;
        x.push(parent.iteration, child.iteration, null);
        y.push(parent.row, child.row, null);
      }
    }
    return { x, y, mode: "lines", hoverinfo: "skip", line: { color: faint(colour("muted"), 0.55), width: 1, dash: operator === "crossover" ? "dot" : "solid" } };
  };
  const size = members.length > 80 ? 8 : 12;
  const chosen = members.filter((each) => each.id === state.member);
  const best = members.filter((each) => each.deployed);
  const ring = (some, shade, width) => ({ x: some.map((each) => each.iteration), y: some.map((each) => each.row), mode: "markers", hoverinfo: "skip",
    marker: { symbol: "circle-open", size: size + 8, color: shade, line: { width } } });
  const nodes = {
    x: members.map((each) => each.iteration), y: members.map((each) => each.row), mode: members.length <= 40 ? "markers+text" : "markers",
    text: members.map((each) => label(each.id, 8)), textposition: "top center", textfont: { color: colour("muted"), size: 11 },
    customdata: members.map((each) => each.id),
    hovertext: members.map((each) => `${label(each.id)}, ${label(each.operator)}, iteration ${each.iteration}<br>rating ${each.mu.toFixed(2)} ± ${each.sigma.toFixed(2)}, ${plural(each.games, "tournament")}`),
    hoverinfo: "text",
    marker: { size, symbol: members.map((each) => (SYMBOLS[each.operator] || "circle") + (each.living ? "" : "-open")), color: members.map((each) => each.mu),
      colorscale: "Viridis", line: { width: members.map((each) => (each.living ? 1 : 2)), color: members.map(() => colour("surface")) },
      colorbar: { title: { text: "rating" }, thickness: 10, len: 0.8, outlinewidth: 0 } },
  };
  // Symbols without filling take the colour of their line from the scale, not from `line.color`.
  delete nodes.marker.line.color;
  return {
    traces: [edges("mutation"), edges("crossover"), nodes, ring(best, colour("series-1"), 3), ring(chosen, colour("text"), 2)],
    shape: { xaxis: iterationAxis(members.map((each) => each.iteration), "iteration of birth"), yaxis: { visible: false, autorange: "reversed" }, margin: { l: 14, r: 8, t: 18, b: 40 } },
    click: (event) => { const id = event.points[0]?.customdata; if (id) chooseMember(id); },
  };
}

/** Members in colour: the selected one, then the deployed one, then those with the highest lower bounds. */
function coloured() {
  const rated = current().members.filter((each) => each.ratings.length);
  const order = [...rated].sort((a, b) => b.mu - 2 * b.sigma - (a.mu - 2 * a.sigma));
  const first = rated.filter((each) => each.id === state.member).concat(rated.filter((each) => each.deployed));
  const count = Math.min(Math.max(Number(byId("ratings-count").value) || 1, 1), 6);
  return [...new Set([...first, ...order])].slice(0, count);
}

function ratingsChart() {
  const members = current().members;
  const shown = coloured();
  const rest = members.filter((each) => !shown.includes(each));
  const grey = { x: [], y: [], mode: "lines", hoverinfo: "skip", name: "others", showlegend: rest.length > 0, line: { color: faint(colour("muted"), 0.3), width: 1 } };
  for (const each of rest) {
    for (const [iteration, mu] of each.ratings) { grey.x.push(iteration); grey.y.push(mu); }
    grey.x.push(null); grey.y.push(null);
  }
  const traces = [grey];
  shown.forEach((each, index) => {
    const shade = series(index), points = each.ratings, back = points.slice().reverse();
    traces.push({ x: [...points, ...back].map((p) => p[0]), y: [...points.map((p) => p[1] + 2 * p[2]), ...back.map((p) => p[1] - 2 * p[2])],
      fill: "toself", fillcolor: faint(shade, 0.13), line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false });
    traces.push({ x: points.map((p) => p[0]), y: points.map((p) => p[1]), name: label(each.id), mode: "lines+markers", line: { color: shade, width: 2 }, marker: { size: 5 },
      error_y: points.length === 1 ? { type: "data", array: [2 * points[0][2]], color: faint(shade, 0.5) } : undefined,
      hovertemplate: `${label(each.id)}, iteration %{x}: %{y:.2f}<extra></extra>` });
  });
  return { traces, shape: { showlegend: true, xaxis: iterationAxis(current().curves.iterations), yaxis: { title: { text: "rating" } } } };
}

function memberButton(id) {
  return h("button", { type: "button", class: "link", onclick: () => chooseMember(id, true) }, id);
}

function showFamily() {
  const members = current().members;
  options("member-select", members.map((each) => [each.id, `${each.id}${each.deployed ? " (deployed)" : ""}`]));
  byId("family-chart").hidden = members.length < 2;
  if (members.length > 1) chart(byId("family-chart"), "family tree of prompts", familyChart);
  byId("family-chart").style.height = `${Math.min(720, Math.max(260, 120 + 26 * (1 + Math.max(0, ...members.map((each) => each.row)))))}px`;
  show("family-table", fold(`All members (${members.length})`, () => table("All members", ["Member", "Operator", "Parents", "Born", "Rating", "Sigma", "Tournaments", "State"],
    members.map((each) => [memberButton(each.id), each.operator, each.parents.join(", "), each.iteration, each.mu, each.sigma, each.games,
      each.deployed ? "deployed" : each.living ? "alive" : "left"]))));
  showRatings();
  const first = members.find((each) => each.deployed) || members[0];
  if (first) chooseMember(first.id);
}

function showRatings() {
  const rated = current().members.some((each) => each.ratings.length);
  byId("ratings").querySelector(".controls").hidden = byId("ratings-chart").hidden = !rated;
  if (!rated) {
    show("ratings-table", h("p", { class: "muted" }, "No prompt of this run was rated: that takes tournaments of several prompts."));
    return;
  }
  chart(byId("ratings-chart"), "ratings over time", ratingsChart);
  show("ratings-table", fold("Numbers: ratings", () => table("Ratings after tournaments", ["Member", "Iteration", "Rating", "Sigma"],
    current().members.flatMap((each) => each.ratings.map(([iteration, mu, sigma]) => [each.id, iteration, mu, sigma])))));
}

function startFamily() {
  byId("member-select").addEventListener("change", (event) => chooseMember(event.target.value));
  steps("member-select", "member-previous", "member-next");
  byId("ratings-count").addEventListener("input", () => chart(byId("ratings-chart"), "ratings over time", ratingsChart));
}
