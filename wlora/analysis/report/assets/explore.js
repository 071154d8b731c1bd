// Filters, the list of runs, and the charts that follow the filters.

const PAGE = 25, MOST_LINES = 40;

function buildFilters() {
  const box = $("filters");
  box.innerHTML = `<input type="search" id="search" placeholder="Search runs" aria-label="Search runs">`;
  for (const [key, [title, show]] of Object.entries(FACETS)) {
    const counts = groupBy(runs, (run) => run[key]);
    if (counts.size < 2) continue;
    state.filters[key] = new Set();
    const values = [...counts.keys()].sort((a, b) => (typeof a === "number" && typeof b === "number" ? a - b :
      a === null ? -1 : b === null ? 1 : key === "task" ? taskOrder(a) - taskOrder(b) : key === "method" ? methodOrder(a) - methodOrder(b) : String(a).localeCompare(String(b))));
    const facet = document.createElement("details");
    facet.className = "facet";
    facet.innerHTML = `<summary>${title} <b>all</b></summary><div>${values.map((value, index) =>
      `<label><input type="checkbox" value="${index}">${escaped(show(value))}<i>${counts.get(value).length}</i></label>`)
      .join("")}</div>`;
    facet.addEventListener("change", ({ target }) => {
      const chosen = state.filters[key], value = values[Number(target.value)];
      target.checked ? chosen.add(value) : chosen.delete(value);
      const names = [...chosen].map(show).join(", ");
      facet.querySelector("b").textContent = !chosen.size ? "all" : names.length > 22 ? `${chosen.size} chosen` : names;
      filterChanged();
    });
    box.append(facet);
  }
  box.insertAdjacentHTML("beforeend", `<button type="button" id="clear">Clear</button><span id="count" aria-live="polite"></span>`);
  $("search").addEventListener("input", ({ target }) => {
    state.text = target.value;
    filterChanged();
  });
  $("clear").addEventListener("click", () => {
    state.text = $("search").value = "";
    for (const chosen of Object.values(state.filters)) chosen.clear();
    for (const input of box.querySelectorAll("input[type=checkbox]")) input.checked = false;
    for (const word of box.querySelectorAll(".facet b")) word.textContent = "all";
    filterChanged();
  });
  const close = (but) => {
    for (const facet of box.querySelectorAll(".facet[open]")) if (facet !== but) facet.open = false;
  };
  document.addEventListener("click", ({ target }) => close(target.closest(".facet")));
  box.addEventListener("keydown", (event) => {
    const open = box.querySelector(".facet[open]");
    if (event.key === "Escape" && open) {
      open.open = false;
      open.querySelector("summary").focus();
    }
  });
}

// How long the last filter took is kept for tests: until the list is there, and until the charts near the screen are.
async function filterChanged() {
  const begin = performance.now(), past = () => (performance.now() - begin).toFixed(1);
  state.page = 0;
  applyFilters();
  drawRuns();
  drawLegends();
  document.body.dataset.filterMs = past();
  await invalidate();
  document.body.dataset.chartsMs = past();
}

const COLUMNS = [
  { key: "task", title: "Task", value: (run) => run.title },
  { key: "setting", title: "Setting" },
  { key: "rank", title: "Rank", number: true, minor: true },
  { key: "lr", title: "Rate", number: true, show: (run) => rate(run.lr) },
  { key: "seed", title: "Seed", number: true, minor: true },
  { key: "score", title: "Score", number: true, value: scoreOf, show: (run) => fixed(scoreOf(run)) },
  { key: "parameters", title: "Params", number: true, minor: true, show: (run) => short(run.parameters) },
  { key: "kept", title: "Kept", number: true, minor: true },
  { key: "seconds", title: "Train s", number: true, minor: true, show: (run) => fixed(run.seconds, 0) },
  { key: "status", title: "Status", minor: true },
];

function drawRuns() {
  const [key, direction] = state.sort;
  const column = COLUMNS.find((one) => one.key === key);
  const value = column.value || ((run) => run[key]);
  const sorted = filtered.map((run) => [value(run), run]).sort(([a], [b]) =>
    a === b ? 0 : a === null || a === undefined ? 1 : b === null || b === undefined ? -1 : (a < b ? -1 : 1) * direction);
  const pages = Math.max(1, Math.ceil(sorted.length / PAGE));
  state.page = Math.min(state.page, pages - 1);
  const shown = sorted.slice(state.page * PAGE, (state.page + 1) * PAGE).map(([, run]) => run);
  const cls = (one) => ` class="${one.number ? "n" : ""}${one.minor ? " minor" : ""}"`;
  const head = COLUMNS.map((one) => `<th scope="col"${cls(one)}${one.key === key ?
    ` aria-sort="${direction > 0 ? "ascending" : "descending"}"` : ""}><button type="button" data-sort="${one.key}">${one.title
    }</button></th>`).join("");
  const body = shown.map((run) => `<tr>${COLUMNS.map((one) => `<td${cls(one)}>${cell(one, run)}</td>`).join("")}</tr>`).join("");
  $("run-table").innerHTML = `<thead><tr>${head}</tr></thead><tbody>${body}</tbody>`;
  $("count").textContent = `${filtered.length.toLocaleString("en")} of ${runs.length.toLocaleString("en")} runs`;
  $("pager").innerHTML = `<button type="button" data-page="-1"${state.page ? "" : " disabled"}>Previous</button>
    <span>Page ${state.page + 1} of ${pages}</span>
    <button type="button" data-page="1"${state.page + 1 < pages ? "" : " disabled"}>Next</button>`;
}

function cell(column, run) {
  const text = escaped(column.show ? column.show(run) : column.value ? column.value(run) : (run[column.key] ?? ""));
  if (column.key === "setting") return `<button type="button" class="link" data-run="${run.id}">${text}</button>`;
  return column.key === "status" ? `<span class="status ${text}">${text}</span>` : text;
}

function wireRuns() {
  $("run-table").addEventListener("click", ({ target }) => {
    if (target.dataset.run) return openRun(target.dataset.run);
    const key = target.dataset.sort;
    if (!key) return;
    state.sort = [key, state.sort[0] === key ? -state.sort[1] : key === "score" ? -1 : 1];
    drawRuns();
    document.querySelector(`[data-sort="${key}"]`).focus();
  });
  $("pager").addEventListener("click", ({ target }) => {
    if (!target.dataset.page) return;
    state.page += Number(target.dataset.page);
    drawRuns();
  });
}

// One run in a dialog: its numbers, command and learning curves.
async function openRun(id) {
  const run = byId.get(id), dialog = $("detail");
  const facts = [["Task", run.title], ["Model", run.model], ["Status", run.status], [`Last ${run.metric}`, fixed(run.last)],
    [`Best ${run.metric}`, fixed(run.best)], ["Learning rate", rate(run.lr)], ["Warm-up", run.warmup ?? "default"],
    ["Seed", run.seed], ["Rank", run.rank ?? ""], ["Parameters", run.parameters?.toLocaleString("en") ?? ""],
    ["Adapters kept", run.kept ?? ""], ["Training", run.seconds === null ? "" : `${fixed(run.seconds, 0)} s`],
    ["Saved for backward", mebibytes(run.saved)], ["Peak memory", mebibytes(run.peak)], ["Machine", run.machine], ["Run", run.id]];
  dialog.innerHTML = `<form method="dialog"><button class="close">Close</button></form>
    <h2 id="detail-title">${escaped(run.setting)}, ${escaped(run.title)}</h2>
    <dl>${facts.filter(([, value]) => value !== "").map(([name, value]) =>
      `<div><dt>${escaped(name)}</dt><dd>${escaped(value)}</dd></div>`).join("")}</dl>
    ${run.error ? `<p class="notice">${escaped(run.error)}</p>` : ""}
    <pre>${escaped(run.command)}</pre><button type="button" id="copy">Copy command</button><div class="panels"></div>`;
  $("copy").addEventListener("click", async ({ target }) => {
    await navigator.clipboard.writeText(run.command);
    target.textContent = "Copied";
  });
  if (!dialog.open) dialog.showModal();
  const curve = (await loadMore()).curves[id];
  if (!curve) return;
  const parts = ["metric", "loss"].filter((part) => curve[part][0].length > 1); // a single point is among the numbers above
  const titles = { metric: `${run.metric} on the dev set`, loss: "Training loss, smoothed" };
  const charts = panels(dialog.querySelector(".panels"), parts, (part) => titles[part]);
  for (const [index, part] of parts.entries()) {
    const rows = lineRows(run, curve, part, run.id);
    await draw(charts[index], lineSpec("step", rows, 150), rows);
  }
}

const lineRows = (run, curve, part, line) =>
  curve[part][0].map((step, i) => ({ step, value: curve[part][1][i], line, method: run.method, ...tip(run) }));

// The last point of a line says which K and rank it is of, as one method has one colour.
function ended(rows, run) {
  if (rows.length && run.end) rows[rows.length - 1].end = run.end;
  return rows;
}

// Labels that would cover each other are left out. The filters and the tooltips still tell the lines apart.
function endLabels(rows, x, y) {
  const named = rows.filter((row) => row.end), values = rows.filter((row) => !row.event).map((row) => row.value);
  const apart = 0.05 * (Math.max(...values) - Math.min(...values));
  const covered = (row, other) => other !== row && other[x.field] === row[x.field] && Math.abs(other.value - row.value) < apart;
  for (const row of named) row.label = named.some((other) => covered(row, other)) ? "" : row.end;
  return { transform: [{ filter: "datum.label" }], mark: { type: "text", align: "left", dx: 6, fontSize: 9 },
    encoding: { x, y, text: { field: "label" }, color: methodScale("colour") } };
}

const tip = (run) => ({ Setting: run.setting, Rate: rate(run.lr), Seed: run.seed, Run: run.id, Command: run.command });

function lineSpec(field, rows, height = 230) {
  const x = { field, type: "quantitative", title: "optimiser step", scale: { padding: 12 }, axis: { tickCount: 5, format: "~s" } };
  const y = { field: "value", type: "quantitative", title: null, scale: { zero: false } };
  const names = ["Setting", "Rate", "Seed", "Run", "Command"];
  const events = rows.some((row) => row.event) ? [
    { mark: { type: "rule", strokeDash: [2, 3], opacity: 0.5 }, transform: [{ filter: "datum.event" }],
      encoding: { x, color: methodScale("colour") } }] : [];
  return { height, layer: [...events, endLabels(rows, x, y),
    { mark: { type: "line", strokeWidth: 1.6, opacity: 0.9 }, transform: [{ filter: "!datum.event" }],
      encoding: { x, y, detail: { field: "line" }, color: methodScale("colour") } },
    { mark: { type: "point", filled: true, size: 22 }, transform: [{ filter: "!datum.event" }],
      encoding: { x, y, shape: methodScale("shape"), color: methodScale("colour"),
        tooltip: [{ field: "value", format: ".4f" }, { field, title: "step" }, ...names.map((name) => ({ field: name }))] } }] };
}

const usable = (run) => run.compared && run.status === "success";
const settings = (some) => groupBy(some, (run) => `${run.task} ${run.model} ${run.setting}`);
// One panel per task, and per model if a task has several: models are not compared.
const panelsOf = (some) => [...new Set([...some].sort((a, b) =>
  taskOrder(a.task) - taskOrder(b.task) || a.panel.localeCompare(b.panel)).map((run) => run.panel))];

function say(id, ...lines) {
  $(id).textContent = lines.filter(Boolean).join(" ");
}

const NO_TUNED = "No run of this choice is at a tuned rate: choose single runs.";
const NO_RUNS = "No finished run of this choice.";

// Score against cost -----------------------------------------------------------------------------------------------------

const AXES = {
  parameters: ["trained parameters", "log", (run) => run.parameters],
  kept: ["adapters kept", "linear", (run) => run.kept],
  seconds: ["training seconds", "linear", (run) => run.seconds],
  saved: ["MiB saved for the backward pass", "linear", (run) => run.saved && run.saved / 2 ** 20],
  peak: ["peak memory, MiB", "linear", (run) => run.peak && run.peak / 2 ** 20],
  score: ["score", "linear", scoreOf],
  last: ["score after the last step", "linear", (run) => run.last],
  best: ["score at the best evaluation", "linear", (run) => run.best],
};
const isScore = (key) => ["score", "last", "best"].includes(key);

function buildCost() {
  const known = Object.keys(AXES).filter((key) => runs.some((run) => usable(run) && (AXES[key][2](run) ?? null) !== null));
  for (const [id, first] of [["cost-x", "parameters"], ["cost-y", "score"]]) {
    $(id).innerHTML = known.map((key) => `<option value="${key}">${AXES[key][0]}</option>`).join("");
    $(id).value = known.includes(first) ? first : known[0];
    $(id).addEventListener("change", drawCost);
  }
  $("cost-marks").addEventListener("change", drawCost);
}

async function drawCost() {
  const [x, y, single] = [$("cost-x").value, $("cost-y").value, $("cost-marks").value === "runs"];
  let some = filtered.filter((run) => usable(run) && (single || run.reported));
  let note = "";
  const machines = [...groupBy(some, (run) => run.machine)].sort((a, b) => b[1].length - a[1].length);
  if ([x, y].includes("seconds") && machines.length > 1) {
    note = `Seconds of different machines do not compare: only the ${machines[0][1].length} runs on ${machines[0][0]} are shown.`;
    some = machines[0][1];
  }
  say("cost-note", some.length ? "" : filtered.some(usable) ? NO_TUNED : NO_RUNS, note);
  const keys = panelsOf(some), charts = panels($("cost-charts"), keys, String);
  for (const [index, key] of keys.entries()) {
    const here = some.filter((run) => run.panel === key);
    const groups = single ? here.map((run) => [run]) : [...settings(here).values()];
    const rows = groups.map((group) => mark(group, x, y)).filter((row) => row.x !== null && row.y !== null);
    await draw(charts[index], costSpec(x, y, rows), [...rows, ...front(rows, x, y)], (datum) => datum.Run && openRun(datum.Run));
  }
}

function mark(group, x, y) {
  const values = (key) => group.map(AXES[key][2]).filter((value) => value !== null && value !== undefined);
  const [across, up] = [values(x), values(y)];
  const spread = deviation(up), middle = up.length ? mean(up) : null, run = group[0];
  return { x: across.length ? mean(across) : null, y: middle, low: spread === null ? middle : middle - spread,
    high: spread === null ? middle : middle + spread, method: run.method, size: run.kept ?? 0, Runs: group.length,
    Seeds: group.map((one) => one.seed).join(", "), ...tip(run) };
}

// The settings that no other one beats: a lower cost or a higher score is better.
function front(rows, x, y) {
  const sign = (key) => (isScore(key) ? -1 : 1);
  const sorted = [...rows].sort((a, b) => sign(x) * (a.x - b.x) || sign(y) * (a.y - b.y));
  const kept = [];
  for (const row of sorted)
    if (!kept.length || sign(y) * row.y < sign(y) * kept[kept.length - 1].y) kept.push(row);
  return kept.map((row) => ({ x: row.x, y: row.y, front: true }));
}

function costSpec(x, y, rows) {
  const zero = (key, name) => rows.some((row) => !row[name]) && { type: "symlog", constant: 1000 };
  const axis = (key, name) => ({ field: "", type: "quantitative", title: AXES[key][0], scale: AXES[key][1] === "log" ?
    zero(key, name) || { type: "log", nice: false, padding: 16 } : { zero: false, padding: 10 }, axis: { tickCount: 4, labelOverlap: "greedy", format: isScore(key) ? ".3f" : "~s" } });
  const [across, up] = [{ ...axis(x, "x"), field: "x" }, { ...axis(y, "y"), field: "y" }];
  const names = ["Setting", "Rate", "Seeds", "Runs", "Run", "Command"];
  const tooltip = [...names.slice(0, 1).map((field) => ({ field })), { field: "y", title: AXES[y][0], format: isScore(y) ? ".4f" : ".4s" },
    { field: "x", title: AXES[x][0], format: isScore(x) ? ".4f" : ".4s" }, ...names.slice(1).map((field) => ({ field }))];
  const color = methodScale("colour"), points = [{ filter: "!datum.front" }];
  return { height: 270, layer: [
    { transform: [{ filter: "datum.front" }], mark: { type: "line", interpolate: isScore(x) ? "linear" : "step-after", color: tint("front"),
      strokeWidth: 1.2 }, encoding: { x: across, y: up, order: { field: "x" } } },
    { transform: points, mark: { type: "rule", opacity: 0.45 }, encoding: { x: across, y: { ...up, field: "low" }, y2: { field: "high" }, color } },
    { transform: points, mark: { type: "point", filled: true, opacity: 0.85, cursor: "pointer", stroke: tint("paper"), strokeWidth: 0.7 },
      encoding: { x: across, y: up, color, shape: methodScale("shape"), tooltip,
        size: { field: "size", type: "quantitative", legend: null, scale: { type: "sqrt", range: [45, 190] } } } }] };
}

// Learning curves --------------------------------------------------------------------------------------------------------

async function drawCurves() {
  const part = $("curve-value").value, single = $("curve-lines").value === "runs";
  const { curves } = await loadMore();
  const finished = filtered.filter((run) => usable(run) && (single || run.reported));
  const some = finished.filter((run) => curves[run.id]?.[part][0].length > 1);
  const missing = finished.length - some.length;
  const keys = panelsOf(some), charts = panels($("curve-charts"), keys, String);
  let left = 0;
  for (const [index, key] of keys.entries()) {
    const here = some.filter((run) => run.panel === key);
    const groups = single ? here.map((run) => [run]) : [...settings(here).values()];
    left += Math.max(0, groups.length - MOST_LINES);
    const rows = groups.slice(0, MOST_LINES).flatMap((group) => curveRows(group, curves, part));
    await draw(charts[index], lineSpec("step", rows), rows, (datum) => datum.Run && openRun(datum.Run));
  }
  say("curve-note", some.length ? "" : finished.length ? "The page has no curve of this choice." :
    filtered.some(usable) ? NO_TUNED : NO_RUNS, missing && some.length ? `${missing} runs have no curve of several points on this page.` : "",
    left ? `${left} more lines are left out: filter to see them.` : "",
    some.length ? "Dotted: adapters cut or grown. Means are over seeds." : "");
}

function curveRows(group, curves, part) {
  const steps = groupBy(group.flatMap((run) => curves[run.id][part][0].map((step, i) => [step, curves[run.id][part][1][i]])), ([s]) => s);
  const run = group[0], about = { ...tip(run), Seed: group.map((one) => one.seed).join(", "), method: run.method };
  const whole = [...steps].filter(([, values]) => values.length === group.length).sort(([a], [b]) => a - b);
  if (whole.length < 2) return []; // the seeds share a single step
  const line = `${run.setting} ${group.length === 1 ? run.id : ""}`;
  const every = [...new Set(group.flatMap((one) => curves[one.id].events))].sort((a, b) => a - b);
  const moments = every.length > 4 ? [every[0], every[every.length - 1]] : every;
  return [...ended(whole.map(([step, values]) => ({ step, value: mean(values.map(([, value]) => value)), line, ...about })), run),
    ...moments.map((step) => ({ step, event: true, method: run.method }))];
}

// Score against learning rate --------------------------------------------------------------------------------------------

async function drawRates() {
  const some = filtered.filter((run) => usable(run) && scoreOf(run) !== null);
  const lines = [...settings(some).values()].map(rateRows).filter((rows) => rows.length > 1);
  const rows = lines.flat(), keys = panelsOf(rows), charts = panels($("rate-charts"), keys, String);
  const inPanel = groupBy(rows, (row) => row.panel);
  for (const [index, key] of keys.entries())
    await draw(charts[index], rateSpec(inPanel.get(key)), inPanel.get(key), (datum) => datum.Run && openRun(datum.Run));
  say("rate-note", lines.length ? "" : "No setting of this choice has run at several learning rates.");
}

// The runs of the seeds that all groups share; all runs if there is no such seed.
function ofSharedSeeds(groups) {
  const seeds = groups.map((some) => new Set(some.map((run) => run.seed)));
  const shared = [...seeds[0]].filter((seed) => seeds.every((own) => own.has(seed)));
  return groups.map((some) => {
    const kept = some.filter((run) => shared.includes(run.seed));
    return kept.length ? kept : some;
  });
}

// Of several warm-ups and head rates at one learning rate, the best counts, compared on the seeds that all of them share.
function bestAtRate(at) {
  const variants = [...groupBy(at, (run) => `${run.warmup} ${run.head_lr}`).values()];
  const scores = ofSharedSeeds(variants).map((some) => mean(some.map(scoreOf)));
  return variants[scores.indexOf(Math.max(...scores))];
}

function rateRows(group) {
  const rates = [...groupBy(group, (run) => run.lr)].sort(([a], [b]) => a - b).map(([, at]) => bestAtRate(at));
  if (rates.length < 2) return [];
  const row = (some, extra) => ({ lr: some[0].lr, value: mean(some.map(scoreOf)), line: some[0].setting, method: some[0].method,
    task: some[0].task, panel: some[0].panel, ...tip(some[0]), Rate: rate(some[0].lr), Seeds: some.map((run) => run.seed).join(", "), ...extra });
  const found = ofSharedSeeds(rates).map((kept) => row(kept, {}));
  ended(found, group[0]);
  const reported = group.filter((run) => run.reported);
  return reported.length ? [...found, row(reported, { tuned: true })] : found;
}

function rateSpec(rows) {
  const values = [...new Set(rows.map((row) => row.lr))].sort((a, b) => a - b);
  const domain = [values[0] / 1.3, values[values.length - 1] * 1.6];
  const x = { field: "lr", type: "quantitative", scale: { type: "log", domain, nice: false }, title: "learning rate",
    axis: { values, labelExpr: "replace(format(datum.value, '.2~e'), 'e−', 'e-')", labelOverlap: "parity" } };
  const y = { field: "value", type: "quantitative", title: null, scale: { zero: false } };
  const color = methodScale("colour");
  const tooltip = ["Setting", "Rate", "Seeds", "Run", "Command"].map((field) => ({ field }));
  tooltip.splice(1, 0, { field: "value", title: "score", format: ".4f" });
  const plain = [{ filter: "!datum.tuned" }];
  return { height: 250, layer: [endLabels(rows, x, y),
    { transform: plain, mark: { type: "line", strokeWidth: 1.4, opacity: 0.8 }, encoding: { x, y, color, detail: { field: "line" } } },
    { transform: plain, mark: { type: "point", filled: true, size: 40 }, encoding: { x, y, color, shape: methodScale("shape"), tooltip } },
    { transform: [{ filter: "datum.tuned" }], encoding: { x, y, color, tooltip }, mark: { type: "point", filled: true, size: 170, opacity: 1,
      shape: "M0,-1L0.24,-0.32L0.95,-0.31L0.38,0.12L0.59,0.81L0,0.4L-0.59,0.81L-0.38,0.12L-0.95,-0.31L-0.24,-0.32Z",
      stroke: tint("paper"), strokeWidth: 1 } }] };
}
