// Starts the page.

function showRun(index) {
  state.run = index;
  state.member = "";
  for (const element of document.querySelectorAll(".of-run")) element.hidden = Number(element.dataset.run) !== index;
  showFamily();
  showScores();
  showRollouts();
  showHealth();
  showTimes();
  redraw();
}

async function start() {
  overview = await unpack("overview");
  for (const button of document.querySelectorAll("button.copy")) button.addEventListener("click", () => copy(button));
  startCurves();
  startFamily();
  startScores();
  startRollouts();
  startHealth();
  showRun(0);
  byId("run-select")?.addEventListener("change", (event) => {
    showRun(Number(event.target.value));
    say(`Run ${current().name} is shown.`);
  });
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

start();
