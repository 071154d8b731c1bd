// The data of the page, what the reader has chosen, and how values are written.

async function unpack(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

const $ = (id) => document.getElementById(id);
const state = { filters: {}, text: "", sort: ["task", 1], page: 0, score: "last" };
let data, runs, byId, palette, filtered;
let moreLoading;

async function loadData() {
  data = JSON.parse(await unpack("data"));
  const columns = data.runs, names = Object.keys(columns);
  runs = columns.id.map((_, index) => Object.fromEntries(names.map((name) => [name, columns[name][index]])));
  for (const run of runs) {
    run.title = data.titles[run.task] || run.task;
    run.text = `${run.id} ${run.setting} ${run.title} ${run.task} ${run.command}`.toLowerCase();
    run.compared = !data.notCompared.includes(run.method);
  }
  for (const here of groupBy(runs.filter((run) => run.compared), (run) => run.task).values()) {
    const models = groupBy(here, (run) => run.model);
    for (const some of models.values()) {
      const severalRanks = new Set(some.map((run) => run.rank).filter(Boolean)).size > 1;
      for (const run of some) {
        run.panel = models.size > 1 ? `${run.title} · ${run.model}` : run.title;
        run.end = [run.k !== null && `K=${run.k}`, severalRanks && run.rank !== null && `r=${run.rank}`].filter(Boolean).join(" ");
      }
    }
  }
  const place = (run) => [taskOrder(run.task), methodOrder(run.method)];
  runs.sort((a, b) => {
    const [s, t] = [place(a), place(b)];
    return s[0] - t[0] || s[1] - t[1] || (a.rank ?? 0) - (b.rank ?? 0) || (a.k ?? 0) - (b.k ?? 0) || a.setting.localeCompare(b.setting) ||
      a.lr - b.lr || a.seed - b.seed;
  });
  byId = new Map(runs.map((run) => [run.id, run]));
  const methods = [...new Set(runs.filter((run) => run.compared).map((run) => run.method))];
  palette = methodStyles(methods.sort((a, b) => methodOrder(a) - methodOrder(b)));
  state.score = data.score;
}

const taskOrder = (task) => Object.keys(data.titles).indexOf(task);
const methodOrder = (method) => (data.methods.indexOf(method) + 1 || 999);

// Curves and predictions are unpacked when they are first looked at.
const loadMore = () => (moreLoading ||= unpack("more").then(JSON.parse));

const scoreOf = (run) => run[state.score];

// Facets: the keys that a reader filters by, with how a value is shown.
const FACETS = {
  task: ["Task", (value) => data.titles[value] || value],
  model: ["Model", String],
  method: ["Method", String],
  k: ["K", (value) => (value === null ? "none" : value)],
  rank: ["Rank", (value) => (value === null ? "none" : value)],
  lr: ["Rate", (value) => rate(value)],
  status: ["Status", String],
};

function applyFilters() {
  const active = Object.entries(state.filters).filter(([, chosen]) => chosen.size);
  const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
  filtered = runs.filter(
    (run) => active.every(([key, chosen]) => chosen.has(run[key])) && words.every((word) => run.text.includes(word)));
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function deviation(values) {
  const middle = mean(values);
  return values.length < 2 ? null : Math.sqrt(values.reduce((sum, v) => sum + (v - middle) ** 2, 0) / (values.length - 1));
}

function groupBy(values, key) {
  const groups = new Map();
  for (const value of values) {
    const name = key(value);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(value);
  }
  return groups;
}

const escaped = (text) => String(text).replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);
const rate = (value) => (value === null ? "" : Number(value).toExponential().replace(/e([+-])(\d)$/, "e$1$2").replace("e+0", ""));
const fixed = (value, digits = 4) => (value === null || value === undefined ? "" : value.toFixed(digits));
const signed = (value, digits = 2) => (value > 0 ? "+" : "") + value.toFixed(digits).replace("-", "−");
const chance = (p) => (p === null ? "–" : p < 0.001 ? "<0.001" : p.toFixed(3));

function short(value) {
  if (value === null || value === undefined) return "";
  for (const [unit, letter] of [[1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (value >= unit) return `${Number((value / unit).toPrecision(3))}${letter}`;
  return String(Math.round(value));
}

const mebibytes = (value) => (value === null || value === undefined ? "" : `${Math.round(value / 2 ** 20)} MiB`);
