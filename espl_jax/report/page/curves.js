// Curves over iterations: smoothed, with the raw values behind them; several runs overlaid.

/** Centred moving average over `window` iterations on either side; missing values are left out. */
function smooth(values, window) {
  return values.map((value, index) => {
    const near = values.slice(Math.max(index - window, 0), index + window + 1).filter((x) => x !== null);
    return value === null || !near.length ? null : near.reduce((a, b) => a + b, 0) / near.length;
  });
}

const DASHES = ["solid", "dot", "dash", "longdash"];

function curveTraces(key) {
  const traces = [];
  const several = overview.length > 1;
  overview.forEach((run, runIndex) => {
    const found = run.curves.charts.find((each) => each.key === key);
    const x = run.curves.iterations;
    Object.entries(found.lines).forEach(([name, values], lineIndex) => {
      const shade = series(several ? runIndex : lineIndex);
      const title = several ? `${label(run.name)}: ${name}` : name;
      const dash = several ? DASHES[lineIndex % DASHES.length] : "solid";
      const band = found.bands[name];
      const points = values.map((value, i) => i).filter((i) => values[i] !== null);
      if (band) {
        traces.push({ x: [...points, ...points.slice().reverse()].map((i) => x[i]),
          y: [...points.map((i) => band[1][i]), ...points.slice().reverse().map((i) => band[0][i])],
          fill: "toself", fillcolor: faint(shade, 0.14), line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false });
      }
      const sparse = points.length < 40;
      if (state.smoothing) {
        traces.push({ x, y: values, mode: sparse ? "lines+markers" : "lines", connectgaps: true, hoverinfo: "skip", showlegend: false,
          line: { color: faint(shade, 0.3), width: 1 }, marker: { color: faint(shade, 0.35), size: 4 } });
      }
      traces.push({ x, y: state.smoothing ? smooth(values, state.smoothing) : values, name: title, connectgaps: true,
        mode: sparse && !state.smoothing ? "lines+markers" : "lines", line: { color: shade, width: 2, dash }, marker: { size: 5 },
        hovertemplate: `${title}<br>iteration %{x}: %{y:.4g}<extra></extra>` });
    });
  });
  return traces;
}

function curveTable(key, title) {
  const columns = [];
  overview.forEach((run) => {
    const found = run.curves.charts.find((each) => each.key === key);
    Object.entries(found.lines).forEach(([name, values]) => {
      const at = new Map(run.curves.iterations.map((iteration, i) => [iteration, values[i]]));
      columns.push([overview.length > 1 ? `${run.name}: ${name}` : name, at]);
    });
  });
  const iterations = [...new Set(overview.flatMap((run) => run.curves.iterations))].sort((a, b) => a - b);
  return table(title, ["Iteration", ...columns.map(([name]) => name)],
    iterations.map((iteration) => [iteration, ...columns.map(([, at]) => at.get(iteration) ?? null)]));
}

/** Which line of a run is which, where the colours tell the runs apart. */
function dashNote(key) {
  const names = [...new Set(overview.flatMap((run) => Object.keys(run.curves.charts.find((each) => each.key === key).lines)))];
  const told = ["solid", "dotted", "dashed", "long dashes"];
  return names.length > 1 ? h("p", { class: "note tight" }, names.map((name, i) => `${told[i % 4]}: ${name}`).join("; ")) : null;
}

function showCurves() {
  if (overview.length > 1) {
    show("curve-runs", overview.map((run, i) => h("li", {}, h("span", { class: `dot run-${i % 6}`, "aria-hidden": "true" }), run.name)));
  }
  const all = overview[0].curves.charts;
  const has = (key) => overview.some((run) => Object.keys(run.curves.charts.find((each) => each.key === key).lines).length);
  const figures = all.filter((each) => has(each.key)).map((each) => {
    const area = h("div", { class: "chart" });
    const title = each.unit ? `${each.title}, ${each.unit}` : each.title;
    chart(area, title, () => {
      const traces = curveTraces(each.key);
      const named = overview.length === 1 && traces.filter((trace) => trace.showlegend !== false).length > 1;
      return { traces, shape: { showlegend: named, xaxis: iterationAxis(overview.flatMap((run) => run.curves.iterations)), yaxis: { rangemode: "tozero" } } };
    });
    return h("figure", { class: "card" }, h("figcaption", {}, h("h3", {}, each.title), h("span", { class: "muted" }, each.unit)),
      overview.length > 1 ? dashNote(each.key) : null, area, fold(`Numbers: ${each.title}`, () => curveTable(each.key, title)));
  });
  show("curve-charts", figures);
  const missing = all.filter((each) => !has(each.key)).map((each) => each.title);
  byId("curves-missing").textContent = missing.length ? `Not recorded: ${missing.join(", ")}.` : "";
}

function startCurves() {
  const longest = Math.max(...overview.map((run) => run.curves.iterations.length));
  const slider = byId("smoothing");
  slider.max = String(Math.max(1, Math.min(30, Math.floor(longest / 4))));
  slider.value = String(longest < 12 ? 0 : Math.max(1, Math.round(longest / 40)));
  const tell = () => {
    state.smoothing = Number(slider.value);
    byId("smoothing-value").textContent = state.smoothing ? `mean over ${2 * state.smoothing + 1} iterations` : "off";
  };
  tell();
  let waiting = 0;
  slider.addEventListener("input", () => {
    tell();
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 60);
  });
  showCurves();
}
