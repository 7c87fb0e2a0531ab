// Charts by plotly, drawn when they come into view and again when the colour scheme changes.

const drawn = new Map();
let plotly = null;

/** Resolves when the page has nothing else to do, so that controls work before charts are drawn. */
const idle = () => new Promise((done) => (window.requestIdleCallback ? requestIdleCallback(done, { timeout: 500 }) : setTimeout(done, 50)));

/** Loads plotly from its block, once. */
function loadPlotly() {
  plotly ??= idle().then(() => unpackText("plotly")).then((text) => {
    const script = document.createElement("script");
    script.textContent = text;
    document.head.append(script);
  });
  return plotly;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const series = (index) => colour(`series-${index % 6}`);

/** A colour with another opacity; colours are written #rrggbb. */
function faint(hex, opacity) {
  const [red, green, blue] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  return `rgba(${red},${green},${blue},${opacity})`;
}

function layout(extra = {}) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("text"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 44, r: 14, t: extra.showlegend ? 30 : 10, b: 38 },
    hovermode: "closest",
    hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("line"), font: { color: colour("text") } },
    legend: { orientation: "h", yanchor: "bottom", y: 1.01, x: 0, font: { size: 11 } },
    showlegend: false,
    ...extra,
    xaxis: { ...axis, ...(extra.xaxis || {}) },
    yaxis: { ...axis, ...(extra.yaxis || {}) },
  };
}

/** An axis of iterations: whole numbers only. */
const iterationAxis = (iterations, title = "iteration") => ({ title: { text: title }, ...(iterations.length && Math.max(...iterations) <= 12 ? { dtick: 1 } : {}) });

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "300px" });

async function draw(element) {
  await loadPlotly();
  await idle();
  const make = drawn.get(element);
  if (!make || !element.isConnected) return;
  const { traces, shape, click } = make();
  await Plotly.react(element, traces, layout(shape), { displayModeBar: false, responsive: true });
  element.querySelectorAll("svg").forEach((svg) => svg.setAttribute("aria-hidden", "true"));
  element.removeAllListeners?.("plotly_click");
  if (click) element.on("plotly_click", click);
}

/** Draws a chart once it is near the screen. `make` returns its traces, its layout and what a click does. */
function chart(element, title, make) {
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", `Chart: ${title}. The table below has its numbers.`);
  drawn.set(element, make);
  if (element.classList.contains("js-plotly-plot")) draw(element);
  else { seen.unobserve(element); seen.observe(element); }
}

function redraw() {
  for (const element of drawn.keys()) {
    if (!element.isConnected) drawn.delete(element);
    else if (element.classList.contains("js-plotly-plot")) draw(element);
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
