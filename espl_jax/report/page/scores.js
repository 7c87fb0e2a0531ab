// The score matrix: mean reward by prompt and problem, of an iteration or of the whole run.

const ALL = "all";

/** Cells [prompt, problem, mean, rollouts] of an iteration; of the whole run, averaged over its rollouts. */
function cellsOf(which) {
  const { cells } = current().scores;
  if (which !== ALL) return cells.filter((cell) => cell[0] === Number(which)).map((cell) => cell.slice(1));
  const sums = new Map();
  for (const [, prompt, problem, mean, count] of cells) {
    const key = `${prompt} ${problem}`;
    const sum = sums.get(key) || [prompt, problem, 0, 0];
    sum[2] += mean * count;
    sum[3] += count;
    sums.set(key, sum);
  }
  return [...sums.values()].map(([prompt, problem, total, count]) => [prompt, problem, total / count, count]);
}

/** Colours from 0 to 1, or as far as the rewards go. */
const rangeOf = (cells) => {
  const means = cells.map((cell) => cell[2]);
  return { zmin: means.reduce((a, b) => Math.min(a, b), 0), zmax: means.reduce((a, b) => Math.max(a, b), 1) };
};

function scoresChart() {
  const which = byId("scores-select").value;
  const cells = cellsOf(which);
  const names = current().scores.problems;
  const known = new Map(current().members.map((each, index) => [each.id, index]));
  const prompts = [...new Set(cells.map((cell) => cell[0]))].sort((a, b) => (known.get(a) ?? 0) - (known.get(b) ?? 0));
  const problems = [...new Set(cells.map((cell) => cell[1]))].sort((a, b) => a - b);
  const row = new Map(prompts.map((id, index) => [id, index]));
  const column = new Map(problems.map((index, place) => [index, place]));
  const z = prompts.map(() => new Array(problems.length).fill(null));
  for (const [prompt, problem, mean] of cells) z[row.get(prompt)][column.get(problem)] = mean;
  const few = prompts.length * problems.length <= 300;
  const named = problems.length <= 40;
  const trace = {
    z, type: "heatmap", colorscale: "Viridis", ...rangeOf(cells), xgap: few ? 2 : 0, ygap: few ? 2 : 0, hoverongaps: false,
    x: problems.map((index) => `#${index + 1}`), y: prompts.map((id) => label(id, 10)),
    customdata: few ? z.map(() => problems.map((index) => label(names[index]))) : undefined,
    hovertemplate: few ? "prompt %{y}, problem %{x} %{customdata}<br>mean reward %{z:.3f}<extra></extra>" : "prompt %{y}, problem %{x}<br>mean reward %{z:.3f}<extra></extra>",
    texttemplate: few ? "%{z:.2f}" : undefined, colorbar: { title: { text: "reward" }, thickness: 10, outlinewidth: 0 },
  };
  return { traces: [trace], shape: { xaxis: { title: { text: "problem" }, type: "category", showticklabels: named, showgrid: false },
    yaxis: { type: "category", autorange: "reversed", showgrid: false, title: { text: "prompt" }, showticklabels: prompts.length <= 40 } } };
}

function scoresTable() {
  const which = byId("scores-select").value;
  const { problems } = current().scores;
  const { statements } = current();
  const cells = cellsOf(which);
  const what = which === ALL ? "the run" : `iteration ${which}`;
  const stated = Object.keys(statements).length > 0;
  return [
    fold(`Numbers: rewards of ${what} by prompt and problem (${cells.length})`, () => table(`Mean rewards of ${what}`,
      ["Problem", "Name", "Prompt", "Mean reward", "Rollouts", ...(stated ? ["Statement", "Answer"] : [])],
      cells.map(([prompt, problem, mean, count]) => [`#${problem + 1}`, problems[problem], prompt, mean, count,
        ...(stated ? statements[problems[problem]] || ["", ""] : [])]))),
  ];
}

function drawScores() {
  const rows = new Set(cellsOf(byId("scores-select").value).map((cell) => cell[0])).size;
  const area = byId("scores-chart");
  area.style.height = `${Math.min(700, 130 + Math.max(rows, 2) * (rows > 40 ? 5 : 30))}px`;
  chart(area, "score matrix", scoresChart);
  if (area.classList.contains("js-plotly-plot")) Plotly.Plots.resize(area);
  show("scores-table", scoresTable());
}

function showScores() {
  const iterations = current().curves.iterations;
  options("scores-select", [[ALL, "all of the run"], ...iterations.map((each) => [each, each])], iterations.length ? iterations[iterations.length - 1] : ALL);
  drawScores();
}

function startScores() {
  byId("scores-select").addEventListener("change", drawScores);
  steps("scores-select", "scores-previous", "scores-next");
}
