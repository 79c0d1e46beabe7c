// Draws the figures, links their zoom and crosshair, and follows the colours of the system.
"use strict";

const {items, marks, colours, refresh, steps} = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const figures = [];  // {element, plot, range, crosshair, curves}
const zoomKey = `zoom ${location.pathname}`;

async function main() {
  for (const [n, item] of items.entries()) {
    const element = document.getElementById(`plot-${n}`);
    const views = await Bokeh.embed.embed_item(item, element);
    const plot = [...views][0].model;
    const curves = plot.renderers.filter((renderer) => renderer.name == "values");
    figures.push({element, plot, range: plot.x_range, crosshair: plot.select_one("crosshair"), curves});
  }
  for (const figure of figures) connect(figure);
  for (const box of document.querySelectorAll("input[data-run]")) {
    box.addEventListener("change", () => showRun(Number(box.dataset.run), box.checked));
  }
  paint();
  dark.addEventListener("change", paint);
  restoreZoom();
  if (refresh) reloadAfter(refresh);
  document.documentElement.dataset.ready = "true";
}

function connect(figure) {
  const {element, plot, range} = figure;
  const zoomed = () => {
    for (const other of figures) other.range.setv({start: range.start, end: range.end});
    rememberZoom(range);
  };
  range.properties.start.change.connect(zoomed);
  range.properties.end.change.connect(zoomed);
  plot.on_event("mousemove", (event) => point(nearest(figure, event.x)));
  plot.on_event("tap", (event) => point(nearest(figure, event.x)));
  element.addEventListener("keydown", (event) => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!by) return;
    event.preventDefault();
    const all = figure.curves[0].data_source.get("step");
    const at = figure.crosshair.visible ? find(all, figure.crosshair.location) : -1;
    point(all[Math.min(Math.max(at + by, 0), all.length - 1)]);
  });
  // A finger that moves over a figure scrolls the page, and one that is lifted leaves the numbers there.
  if (matchMedia("(pointer: coarse)").matches) plot.toolbar.active_drag = null;
  else plot.on_event("mouseleave", () => point(null));
}

// The index of the value nearest to x in an ascending array.
function find(sorted, x) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - sorted[low - 1] <= sorted[low] - x ? low - 1 : low;
}

// The step of a figure's curves nearest to x; null outside of them all.
function nearest(figure, x) {
  const found = figure.curves.filter((curve) => curve.visible).map((curve) => {
    const all = curve.data_source.get("step");
    return all[find(all, x)];
  });
  return found.length ? found.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a)) : null;
}

// Show the numbers of a step under all figures; null: none.
function point(step) {
  for (const {element, crosshair, curves, range} of figures) {
    crosshair.setv(step == null ? {visible: false} : {location: step, visible: true});
    const caption = element.parentElement.querySelector("figcaption");
    caption.querySelector(".step output").textContent = step == null ? "–" : step.toLocaleString("en");
    for (const curve of curves) {
      const output = caption.querySelector(`[data-series="${curve.tags[2]}"] output`);
      output.textContent = step == null ? "–" : valueAt(curve.data_source, step);
    }
    const near = step == null ? [] : marks.filter((mark) => Math.abs(mark.step - step) <= (range.end - range.start) / 200);
    caption.querySelector(".note").textContent = [...new Set(near.map((mark) => mark.text))].slice(0, 3).join("; ");
  }
}

function valueAt(source, step) {
  const all = source.get("step");
  const at = find(all, step);
  const smooth = source.columns().includes("smooth") ? `, mean ${format(source.get("smooth")[at])}` : "";
  const elsewhere = all[at] == step ? "" : ` (step ${all[at].toLocaleString("en")})`;
  return format(source.get("value")[at]) + smooth + elsewhere;
}

function format(value) {
  if (!Number.isFinite(value)) return "not finite";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(5)));
}

function showRun(run, visible) {
  for (const {plot} of figures) {
    for (const renderer of plot.renderers) {
      if (renderer.tags.length && renderer.tags[1] == run) renderer.visible = visible;
    }
  }
  for (const entry of document.querySelectorAll(`.entry[data-run="${run}"]`)) entry.classList.toggle("off", !visible);
}

// Colours of lines, and of what is around them, for light and for dark.
function paint() {
  const palette = colours[dark.matches ? 1 : 0];
  const text = getComputedStyle(document.documentElement).getPropertyValue("--quiet").trim();
  for (const {plot} of figures) {
    for (const {tags, glyph} of plot.renderers.filter((renderer) => renderer.tags.length)) {
      glyph.line_color = palette[tags[0]];
      if ("fill_color" in glyph) glyph.fill_color = palette[tags[0]];
    }
    for (const axis of [...plot.below, ...plot.left]) {
      axis.setv({
        axis_label_text_color: text, major_label_text_color: text, axis_line_color: text,
        major_tick_line_color: text, minor_tick_line_color: null,
      });
    }
    for (const grid of plot.center.filter((part) => "grid_line_color" in part)) grid.grid_line_color = text;
  }
  for (const line of document.querySelectorAll("[data-colour]")) line.style.color = palette[line.dataset.colour];
}

function rememberZoom(range) {
  try {
    if (range.start == steps[0] && range.end == steps[1]) sessionStorage.removeItem(zoomKey);
    else sessionStorage.setItem(zoomKey, JSON.stringify([range.start, range.end]));
  } catch {}  // a browser that keeps nothing for files
}

function restoreZoom() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(zoomKey));
    if (kept && figures.length) figures[0].range.setv({start: kept[0], end: kept[1]});
  } catch {}
}

// While a run trains; a page that nobody sees waits until it is looked at.
function reloadAfter(seconds) {
  document.getElementById("reloads").hidden = false;
  setTimeout(() => {
    if (!document.hidden) location.reload();
    else document.addEventListener("visibilitychange", () => location.reload(), {once: true});
  }, seconds * 1000);
}

main();
