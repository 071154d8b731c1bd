// Charts beside the filters: the claims, kept adapters, and the predictions of two runs.

// The claims -------------------------------------------------------------------------------------------------------------

const CLASSES = { holds: "holds", "does not hold": "fails", undecided: "open" };
const KINDS = { better: "the 95 % interval is above 0", worse: "the 95 % interval is below 0",
  equivalent: "the 90 % interval is inside the band", "at least": "the 90 % interval is not below the band, nor the 95 % interval below 0" };

async function drawClaims() {
  const found = data.claims[state.score], box = $("claim-charts");
  const each = document.querySelector("[name=claim-tasks]:checked").value === "each";
  $("claim-tasks").hidden = !found.length;
  if (!found.length) return;
  const groups = [...groupBy(found, (one) => one.claim)];
  const several = { tables: new Set(found.map((one) => one.table)).size > 1, ranks: new Set(data.runs.rank.filter(Boolean)).size > 1 };
  const rowOf = new Map(found.map((one) => [one, claimRow(one, each, several)]));
  // The zeros of all claims stand below each other.
  const longest = Math.max(...[...rowOf.values()].map((row) => row.label.length));
  const narrow = innerWidth < 600, extent = narrow ? 152 : Math.min(330, 20 + 6 * longest);
  if (box.children.length !== groups.length)
    box.innerHTML = groups.map(() => `<div class="claim"><h3></h3><p class="verdicts"></p><div class="chart"></div></div>`).join("");
  for (const [index, [claim, all]] of groups.entries()) {
    const whole = new Set(all.filter((one) => one.tasks > 1).map((one) => one.pair + one.table));
    const shown = all.filter((one) => each || one.tasks > 1 || !whole.has(one.pair + one.table));
    const element = box.children[index];
    element.querySelector("h3").textContent = claim;
    element.querySelector("p").innerHTML = Object.entries(CLASSES).map(([verdict, name]) => [verdict, name,
      shown.filter((one) => one.verdict === verdict).length]).filter(([, , count]) => count).map(([verdict, name, count]) =>
      `<span><b class="${name}">${verdict}</b> ${count} of ${shown.length}</span>`).join("") +
      `<span>holds if ${KINDS[all[0].kind]}</span>`;
    const rows = shown.map((one) => rowOf.get(one));
    await draw(element.querySelector(".chart"), claimSpec(rows, reach(found), each, extent, narrow), rows);
  }
}

// Where the axis of all claims ends, in points. A few very wide intervals would leave no room for the others: they run out.
function reach(found) {
  const upTo = (values, share) => values.sort((a, b) => a - b)[Math.floor(share * (values.length - 1))] ?? 1;
  const ends = found.map((one) => Math.max(Math.abs(one.low ?? one.mean), Math.abs(one.high ?? one.mean)));
  return Math.ceil(Math.max(2, Math.min(upTo(ends, 1), 1.6 * upTo(ends, 0.75), 20)));
}

function claimRow(one, each, several) {
  const where = one.task || `all ${one.tasks} tasks`;
  const name = one.pair.replace(/, r=\d+$/, (rank) => (several.ranks ? rank : ""));
  const interval = one.low === null ? "" : ` [${signed(one.low)}, ${signed(one.high)}]`;
  const what = [several.tables ? `Table ${one.table}` : "", each || one.tasks < 2 ? where : ""].filter(Boolean).join(", ");
  return { ...one, label: what ? `${name} · ${what}` : name, Comparison: one.pair, Table: one.table, Task: where,
    Difference: signed(one.mean) + interval, Verdict: one.verdict, p: chance(one.p), Pairs: one.pairs,
    "P(improvement)": one.probability, "Share of parameters": one.share === null ? "" : `${Math.round(100 * one.share)} %`,
    "Order turns at the common rate": one.turned.join(", ") || "none" };
}

function claimSpec(rows, end, each, extent, narrow) {
  const x = (field) => ({ field, type: "quantitative", title: "difference, points", scale: { domain: [-end, end] }, axis: { tickCount: narrow ? 5 : 9 } });
  const y = { field: "label", type: "nominal", sort: rows.map((row) => row.label), title: null,
    axis: { labelLimit: extent, minExtent: extent, maxExtent: extent, ticks: false, domain: false, grid: true, gridDash: [1, 3],
      labelPadding: 8, ...(narrow ? { labelFontSize: 9.5, labelExpr: "split(datum.label, ' · ')" } : { labelFontSize: 11 }) } };
  const color = { field: "verdict", type: "nominal", legend: null,
    scale: { domain: Object.keys(CLASSES), range: [tint("holds"), tint("fails"), tint("open")] } };
  const fields = ["Comparison", "Table", "Task", "Difference", "Verdict", "p", "P(improvement)", "Pairs", "Share of parameters",
    "Order turns at the common rate"];
  const tooltip = fields.map((field) => ({ field }));
  return { height: { step: narrow ? 30 : each ? 20 : 24 }, layer: [
    { mark: { type: "rect", color: tint("band"), clip: true }, encoding: { x: { datum: -1, type: "quantitative" }, x2: { datum: 1 } } },
    { mark: { type: "rule", color: tint("front") }, encoding: { x: { datum: 0, type: "quantitative" } } },
    { mark: { type: "rule", strokeWidth: 2, clip: true }, encoding: { x: x("low"), x2: { field: "high" }, y, color, tooltip } },
    { mark: { type: "point", filled: true, size: 70, opacity: 1, clip: true }, encoding: { x: x("mean"), y, color, tooltip } }] };
}

// Kept adapters ----------------------------------------------------------------------------------------------------------

const options = (values) => values.map(([value, text]) => `<option value="${escaped(value)}">${escaped(text)}</option>`).join("");

const tasksOf = (some) => [...new Set(some.map((run) => run.task))].sort((a, b) => taskOrder(a) - taskOrder(b));

function buildAdapters() {
  const selecting = runs.filter((run) => run.compared && data.adapters.runs[run.id]);
  $("adapter-task").innerHTML = options(tasksOf(selecting).map((task) => [task, data.titles[task]]));
  const fill = () => {
    const here = selecting.filter((run) => run.task === $("adapter-task").value);
    const before = $("adapter-setting").value;
    const names = [...new Set(here.map((run) => run.setting))];
    $("adapter-setting").innerHTML = options(names.map((name) => [name, name]));
    if (names.includes(before)) $("adapter-setting").value = before;
    return drawAdapters();
  };
  $("adapter-task").addEventListener("change", fill);
  $("adapter-setting").addEventListener("change", () => drawAdapters());
  $("adapters").hidden = !selecting.length;
  if (selecting.length) fill();
}

async function drawAdapters() {
  if (!sections.some((one) => one.element.id === "adapters" && one.near)) return;
  const here = runs.filter((run) => run.task === $("adapter-task").value && run.setting === $("adapter-setting").value &&
    data.adapters.runs[run.id]);
  const group = here.some((run) => run.reported) ? here.filter((run) => run.reported) : here;
  if (!group.length) return;
  const grid = data.adapters.grids[data.adapters.runs[group[0].id][0]];
  const cells = new Map(Array.from({ length: grid.layers }, (_, layer) => grid.kinds.map((kind, i) =>
    [`${layer} ${i}`, { layer, kind, kept: [] }])).flat());
  for (const run of group)
    for (const [layer, kind, omega, rank] of data.adapters.runs[run.id][1]) cells.get(`${layer} ${kind}`)?.kept.push([omega, rank]);
  const rows = [...cells.values()].map(({ layer, kind, kept }) => {
    const omegas = kept.map(([omega]) => omega).filter((omega) => omega !== null);
    return { Layer: layer, Module: kind, share: kept.length / group.length, Kept: `${kept.length} of ${group.length} runs`,
      text: kept.length ? `${kept.length}/${group.length}` : "", "Mean ω": omegas.length ? mean(omegas).toFixed(2) : "",
      "Mean rank": kept.length ? mean(kept.map(([, one]) => one)).toFixed(0) : "" };
  });
  say("adapter-note", `${group.length === 1 ? "1 run, seed" : `${group.length} runs, seeds`} ${group.map((run) => run.seed).join(", ")}, learning rate ${
    [...new Set(group.map((run) => rate(run.lr)))].join(", ")}.`);
  await draw($("adapter-chart"), heatSpec({ field: "Module", sort: grid.kinds }, { field: "Layer", sort: "descending" },
    ["Layer", "Module", "Kept", "Mean ω", "Mean rank"], grid.layers > 16 ? 14 : 26, grid.layers * grid.kinds.length <= 160), rows);
}

function heatSpec(x, y, fields, step, texts) {
  const encoding = { x: { ...x, type: "ordinal", title: x.title || null, axis: { labelAngle: grow(x) ? -40 : 0, domain: false, ticks: false } },
    y: { ...y, type: "ordinal", title: y.title || y.field.toLowerCase(), axis: { domain: false, ticks: false } },
    tooltip: fields.map((field) => ({ field })) };
  const color = { field: "share", type: "quantitative", legend: null, scale: { domain: [0, 1], range: [tint("shade"), tint("accent")] } };
  const layer = [{ mark: { type: "rect", stroke: tint("paper"), strokeWidth: 2, cornerRadius: 3 }, encoding: { ...encoding, color } }];
  if (texts) layer.push({ mark: { type: "text", fontSize: 11 }, encoding: { ...encoding, text: { field: "text" },
    color: { condition: { test: "datum.share > 0.55", value: tint("paper") }, value: tint("ink") } } });
  return { height: { step }, layer };
}

const grow = (x) => (x.sort || []).length > 5;

// Predictions of two runs ------------------------------------------------------------------------------------------------

async function buildExamples() {
  const { predictions } = await loadMore();
  const known = Object.keys(predictions.runs);
  if (!known.length) {
    $("example-result").innerHTML = `<p class="caption">These runs have no recorded predictions.</p>`;
    document.querySelector("#examples .controls").hidden = true;
    return;
  }
  $("example-set").innerHTML = options(predictions.sets.map((set, i) =>
    [i, `${data.titles[set.task]}${set.fold === null ? "" : `, fold ${set.fold}`}, ${set.gold.length} examples`]));
  const fill = () => {
    const set = Number($("example-set").value);
    const here = known.filter((id) => predictions.runs[id][0] === set).map((id) => byId.get(id))
      .sort((a, b) => a.setting.localeCompare(b.setting) || a.lr - b.lr || a.seed - b.seed);
    const list = options(here.map((run) => [run.id, `${run.setting}, rate ${rate(run.lr)}, seed ${run.seed}`]));
    $("example-a").innerHTML = $("example-b").innerHTML = list;
    // At first two settings on the same seed.
    const other = here.find((run) => run.setting !== here[0].setting && run.seed === here[0].seed) || here[here.length - 1];
    $("example-b").value = other.id;
    return drawExamples();
  };
  $("example-set").addEventListener("change", fill);
  for (const id of ["example-a", "example-b"]) $(id).addEventListener("change", drawExamples);
  await fill();
}

async function drawExamples() {
  const { predictions } = await loadMore();
  const set = predictions.sets[Number($("example-set").value)];
  const ids = [$("example-a").value, $("example-b").value];
  const [a, b] = ids.map((id) => predictions.runs[id][1]);
  const rows = { both: [], a: [], b: [], neither: [] };
  for (let i = 0; i < set.gold.length; i++) {
    const [right, other] = [a[i] === set.gold[i], b[i] === set.gold[i]];
    rows[right && other ? "both" : right ? "a" : other ? "b" : "neither"].push(i);
  }
  const [first, second] = ids.map((id) => byId.get(id));
  const list = (some) => (some.length > 60 ? `${some.slice(0, 60).join(", ")} and ${some.length - 60} more` : some.join(", ") || "none");
  $("example-result").innerHTML = `<table class="cross"><thead><tr><td></td><th scope="col">second right</th><th scope="col">second wrong</th>
    </tr></thead><tbody><tr><th scope="row">first right</th><td>${rows.both.length}</td><td>${rows.a.length}</td></tr>
    <tr><th scope="row">first wrong</th><td>${rows.b.length}</td><td>${rows.neither.length}</td></tr></tbody></table>
    <p class="about">They disagree in correctness on ${rows.a.length + rows.b.length} of ${set.gold.length} examples. McNemar's exact test:
    p ${chance(mcnemar(rows.a.length, rows.b.length)).replace(/^(?!<)/, "= ").replace("<", "< ")}.</p>
    <p class="rows"><b>Only the first is right</b> (${escaped(first.setting)}), rows: ${list(rows.a)}</p>
    <p class="rows"><b>Only the second is right</b> (${escaped(second.setting)}), rows: ${list(rows.b)}</p>`;
  const shown = set.labels.length ? ["first", "second"] : [];
  const charts = panels($("example-charts"), shown, (key) => `Confusion matrix of the ${key} run`);
  for (const [index, letters] of shown.map((key) => (key === "first" ? a : b)).entries())
    await draw(charts[index], heatSpec({ field: "Predicted", title: "predicted", sort: set.labels },
      { field: "True", title: "true", sort: set.labels }, ["True", "Predicted", "Examples"], 40, true), confusion(set, letters));
}

function confusion(set, letters) {
  const counts = new Map(), totals = new Map();
  for (let i = 0; i < set.gold.length; i++) {
    const key = set.gold[i] + letters[i];
    counts.set(key, (counts.get(key) || 0) + 1);
    totals.set(set.gold[i], (totals.get(set.gold[i]) || 0) + 1);
  }
  const name = (index) => set.labels[index] ?? String(index);
  return set.labels.flatMap((_, t) => set.labels.map((__, p) => {
    const count = counts.get(t.toString(36) + p.toString(36)) || 0;
    return { True: name(t), Predicted: name(p), Examples: count, text: String(count), share: count / (totals.get(t.toString(36)) || 1) };
  }));
}

// The two-sided p-value of the binomial test with share 1/2.
function mcnemar(a, b) {
  const n = a + b;
  if (!n) return 1;
  let term = -n * Math.LN2, sum = 0;
  for (let k = 0; k <= Math.min(a, b); k++) {
    sum += Math.exp(term);
    term += Math.log((n - k) / (k + 1));
  }
  return Math.min(1, 2 * sum);
}
