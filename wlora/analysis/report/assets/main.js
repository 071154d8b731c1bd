// Starts the page.

function drawFacts() {
  const count = (values) => new Set(values).size;
  const compared = runs.filter((run) => run.compared);
  const facts = [["runs", runs.length], ["finished", runs.filter((run) => run.status === "success").length],
    ["tasks", count(runs.map((run) => run.task))], ["methods", count(compared.map((run) => run.method))],
    ["settings", count(compared.map((run) => `${run.task} ${run.model} ${run.setting}`))]];
  $("facts").innerHTML = facts.map(([name, value]) => `<div><dt>${name}</dt><dd>${value.toLocaleString("en")}</dd></div>`).join("");
}

function showScore() {
  document.body.dataset.show = state.score;
  for (const input of document.querySelectorAll("#score input")) input.checked = input.value === state.score;
}

async function start() {
  await loadData();
  applyFilters();
  drawFacts();
  showScore();
  buildFilters();
  wireRuns();
  drawRuns();
  drawLegends();
  buildCost();
  $("score").addEventListener("change", ({ target }) => {
    state.score = target.value;
    showScore();
    drawRuns();
    invalidate();
  });
  $("claim-tasks").addEventListener("change", drawClaims);
  for (const id of ["curve-value", "curve-lines"]) $(id).addEventListener("change", drawCurves);
  section("claims", drawClaims);
  section("cost", drawCost);
  section("curves", drawCurves);
  section("rates", drawRates);
  section("adapters", drawAdapters);
  let built;
  section("examples", () => (built ||= buildExamples()));
  buildAdapters();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", invalidate);
  // On paper everything is there: folded tables open, and charts that were not on the screen yet.
  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("section details")) one.open = true;
    for (const one of sections) one.near = true;
    refresh();
  });
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  document.querySelector("header").insertAdjacentHTML("beforeend",
    `<p class="notice">This browser cannot show the charts (${escaped(error.message)}). The tables below are complete.</p>`);
  throw error;
});
