// Vega-Lite charts: loading the library, colours, and charts that keep their view when only their data change.

const COLOURS = ["#2f6ea8", "#d0742b", "#2f9273", "#a9568f", "#b8922a", "#5aa7cf", "#8a5a44", "#5d5fa5", "#7d8794", "#8aa64c",
  "#c95a5a", "#3f8f96"];
const SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left"];
let vegaLoading;

function loadVega() {
  return (vegaLoading ||= unpack("vega").then((text) => {
    const script = document.createElement("script");
    script.textContent = `(() => {${text}\n})();`;
    document.head.append(script);
  }));
}

function methodStyles(methods) {
  return new Map(methods.map((name, i) => [name, { colour: COLOURS[i % COLOURS.length], shape: SHAPES[i % SHAPES.length] }]));
}

const tint = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function theme() {
  const axis = { domainColor: tint("line"), gridColor: tint("line"), tickColor: tint("line"), labelColor: tint("soft"),
    titleColor: tint("soft"), titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 12, gridOpacity: 0.7 };
  return { background: null, font: "system-ui, sans-serif", view: { stroke: null }, axis, legend: { labelColor: tint("soft"),
    titleColor: tint("soft"), titleFontWeight: "normal" } };
}

// A chart in an element: `spec` without data, and the rows of its data set. The view is kept while the spec is the same.
async function draw(element, spec, rows, onClick) {
  await loadVega();
  await new Promise((resolve) => setTimeout(resolve)); // between two charts the page answers to the reader
  const text = JSON.stringify([spec, theme()]);
  const chart = element.chart;
  if (chart && chart.text === text) {
    await chart.view.data("rows", structuredClone(rows)).runAsync();
    return;
  }
  if (chart) chart.finalize();
  const whole = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: "container", config: theme(),
    ...(typeof spec.height === "number" ? { autosize: { type: "fit", contains: "padding" } } : {}), data: { name: "rows", values: structuredClone(rows) }, ...spec };
  const result = await vegaEmbed(element, whole, { actions: false, renderer: "svg", tooltip: { theme: "custom" }, logLevel: 1 });
  element.chart = { text, view: result.view, finalize: () => result.finalize() };
  if (onClick) result.view.addEventListener("click", (_, item) => item && item.datum && onClick(item.datum));
}

// One panel per key, reused between updates.
function panels(container, keys, caption) {
  const old = new Map([...container.children].map((figure) => [figure.dataset.key, figure]));
  const figures = keys.map((key) => {
    const figure = old.get(key) || document.createElement("figure");
    if (!old.has(key)) {
      figure.dataset.key = key;
      figure.innerHTML = `<figcaption>${escaped(caption(key))}</figcaption><div class="chart"></div>`;
    }
    return figure;
  });
  for (const [key, figure] of old)
    if (!keys.includes(key)) {
      figure.lastChild.chart?.finalize();
      figure.remove();
    }
  figures.forEach((figure, index) => {
    if (container.children[index] !== figure) container.insertBefore(figure, container.children[index] || null);
  });
  return figures.map((figure) => figure.lastChild);
}

function methodScale(channel) {
  const names = [...palette.keys()];
  return { field: "method", type: "nominal", legend: null,
    scale: { domain: names, range: names.map((name) => palette.get(name)[channel]) } };
}

const PATHS = { circle: "M6 1a5 5 0 1 0 .01 0", square: "M1.5 1.5h9v9h-9z", "triangle-up": "M6 1l5.5 10h-11z",
  diamond: "M6 0l5 6-5 6-5-6z", "triangle-down": "M6 11L.5 1h11z", cross: "M4 1h4v3h3v4H8v3H4V8H1V4h3z",
  "triangle-right": "M1 .5l10 5.5L1 11.5z", "triangle-left": "M11 .5L1 6l10 5.5z" };

function drawLegends() {
  const shown = new Set(filtered.map((run) => run.method));
  const items = [...palette].filter(([name]) => shown.has(name)).map(([name, { colour, shape }]) =>
    `<span><svg viewBox="0 0 12 12" aria-hidden="true"><path fill="${colour}" d="${PATHS[shape]}"/></svg>${escaped(name)}</span>`);
  for (const legend of document.querySelectorAll("[data-legend]")) legend.innerHTML = items.join("");
}

// Sections draw themselves when they come near the screen, and again when what they show has changed.
const sections = [];

function section(id, render) {
  const one = { element: $(id), render, near: false, stale: true };
  sections.push(one);
  new IntersectionObserver(([entry]) => {
    one.near = entry.isIntersecting;
    if (one.near) refresh([one]);
  }, { rootMargin: "100px" }).observe(one.element);
}

// Sections are drawn one after the other: what changes meanwhile makes them stale again.
let drawing = Promise.resolve();

function refresh(some = sections) {
  return (drawing = drawing.then(async () => {
    for (const one of some)
      if (one.near && one.stale) {
        one.stale = false;
        await one.render();
        one.element.dataset.drawn = "yes";
      }
  }));
}

function invalidate() {
  for (const one of sections) one.stale = true;
  return refresh();
}
