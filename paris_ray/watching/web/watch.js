/** The page that watches a training: it asks again and again, and draws what has changed.
 *
 * Text from the run is set as text, never parsed; nothing is loaded from elsewhere.
 */

const POLL_MS = 2000;
const IDLE_POLL_MS = 10000; // where all is finished
const LATE_S = 300; // without news, something may be wrong
const GRID_COLUMNS = 8; // of a sample grid
const HEIGHT = 220;
const TICK_WIDTH = 140; // of its words, and room around them
const MARGIN = { left: 60, right: 10, top: 8, bottom: 24 };
const STORE = "paris_ray watch";
const NAMES = {
  loss: "Training loss", router_loss: "Training loss of the router",
  held_out_loss: "Held-out loss, own cluster",
  held_out_loss_others: "Held-out loss, other clusters",
  samples_per_second: "Samples a second", mfu: "MFU", memory_bytes: "Peak memory",
  learning_rate: "Learning rate",
};
const ORDER = Object.keys(NAMES);
const NOISY = ["loss", "router_loss"]; // of one batch each, so that a mean says more
const FEW_POINTS = 50; // of which a mean would come late
// How far greys are from the panel, from 0 to 1: what is no expert has no hue.
const FADES = { router: 1, student: 0.5, "few-step": 0.75 };
const FIRST_NAMES = { final: "trained", without: "without adapter" };

const $ = (selector, root = document) => root.querySelector(selector);

/* -- Elements and words ---------------------------------------------------------------------- */

function element(tag, properties = {}, ...children) {
  const { aria = {}, dataset = {}, ...own } = properties;
  const node = Object.assign(document.createElement(tag), own);
  Object.assign(node.dataset, dataset);
  for (const [name, value] of Object.entries(aria)) node.setAttribute(`aria-${name}`, value);
  node.append(...children);
  return node;
}

function drawn(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function row(cells, tag = "td") {
  const nodes = cells.map((cell, i) => {
    const node = element(i === 0 && tag === "td" ? "th" : tag, {});
    if (node.tagName === "TH") node.scope = tag === "th" ? "col" : "row";
    node.append(...[cell].flat());
    return node;
  });
  return element("tr", {}, ...nodes);
}

function table(head, rows, properties = {}) {
  return element("table", properties, element("thead", {}, row(head, "th")),
    element("tbody", {}, ...rows.map((cells) => row(cells))));
}

function inScroll(label, node) {
  return element("div", { className: "wide", tabIndex: 0, role: "region", aria: { label } }, node);
}

const DASH = "–";
const digits = (value, count = 3) => Number(value.toPrecision(count)).toString();
const whole = (value) => Math.round(value).toLocaleString("en");

function compact(value) {
  const size = Math.abs(value);
  if (size >= 1e4) {
    const [scale, unit] = [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([least]) => size >= least);
    return `${digits(value / scale)}${unit}`;
  }
  return size !== 0 && size < 1e-3 ? value.toExponential(1) : digits(value);
}

function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  if (seconds < 48 * 3600) return `${digits(seconds / 3600)} h`;
  return `${digits(seconds / 86400)} days`;
}

const dollars = (value) => `$${value < 100 ? value.toFixed(2) : whole(value)}`;
const gigabytes = (value) => `${digits(value / 1e9)} GB`;
const told = (value, inWords) => (value === null || value === undefined ? DASH : inWords(value));

const UNITS = {
  mfu: (value) => `${Math.round(100 * value)} %`,
  memory_bytes: gigabytes,
};

/** How a checkpoint is called: its step, or what it is. */
const gridName = (grid) => FIRST_NAMES[grid] ?? `step ${whole(Number(grid))}`;

/** Give a node the colour of a model: experts share out the hues, others are grey. */
function coloured(node, { expert, name }, numExperts) {
  node.classList.add("of");
  node.style.setProperty("--hue", (25 + (360 * (expert ?? 0)) / Math.max(1, numExperts)) % 360);
  if (expert === null) {
    node.style.setProperty("--chroma", "0");
    node.style.setProperty("--fade", FADES[name] ?? 0);
  }
  return node;
}

/* -- The server ------------------------------------------------------------------------------ */

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const api = {
  key: "", // in memory alone
  tags: new Map(), // of the last answers, by path

  async fetch(path) {
    const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    let response;
    try {
      response = await fetch(path, { headers, cache: "no-cache" });
    } catch {
      throw new Refused(0, "The server cannot be reached. Check that jobs.watch still runs.");
    }
    if (response.ok) return response;
    const { error } = await response.json().catch(() => ({}));
    throw new Refused(response.status, error ?? `The server answered with ${response.status}.`);
  },

  async json(path) {
    return (await this.fetch(path)).json();
  },

  /** Return an answer, or null if it is the one before. */
  async changed(path) {
    const response = await this.fetch(path);
    const tag = response.headers.get("ETag");
    if (tag !== null && this.tags.get(path) === tag) return null;
    this.tags.set(path, tag);
    return response.json();
  },
};

/** Pictures, each fetched once, and forgotten when their gallery is. */
class Pictures {
  #addresses = new Map();

  get(path) {
    if (!this.#addresses.has(path)) this.#addresses.set(path, this.#fetch(path));
    return this.#addresses.get(path);
  }

  forget() {
    for (const address of this.#addresses.values()) {
      address.then((url) => URL.revokeObjectURL(url), () => {});
    }
    this.#addresses.clear();
  }

  async #fetch(path) {
    try {
      return URL.createObjectURL(await (await api.fetch(path)).blob());
    } catch (error) {
      this.#addresses.delete(path); // to be asked for again
      throw error;
    }
  }
}

/* -- What is shown, and what of it is remembered ----------------------------------------------- */

const DEFAULTS = { axis: "step", smooth: "0.6", log: false, hidden: [], model: null, cell: 96 };
const view = { ...DEFAULTS, ...recalled() };
const pictures = new Pictures();
let runs = []; // as /api/state tells
let curves = new Map(); // by run and model: { version, batch_size, series, resumes }
const troubles = new Map(); // what of the gallery could not be had, by its path
const seen = {}; // versions of what has been drawn

function recalled() {
  try {
    const known = JSON.parse(localStorage.getItem(STORE));
    return typeof known === "object" && Array.isArray(known?.hidden) ? known : {};
  } catch {
    return {}; // nothing is remembered where pages may not
  }
}

function remember() {
  try {
    localStorage.setItem(STORE, JSON.stringify(view));
  } catch { /* then not */ }
}

const numExperts = () => Math.max(1, ...runs.map(({ models }) =>
  models.filter(({ expert }) => expert !== null).length));

/** Every model of any run once, in order. */
function modelsByName() {
  const found = new Map();
  for (const { models } of runs) for (const model of models) found.set(model.name, model);
  return found;
}

/** Draw a part of the page anew if what it is drawn from has changed. */
function ifChanged(part, version, draw) {
  const text = JSON.stringify(version);
  if (seen[part] === text) return;
  seen[part] = text;
  draw();
}

/** Fill the sides of a section, one a run; what was scrolled or opened there stays so. */
function sides(id, make) {
  const section = $(`#${id}`);
  const scrolled = [...section.querySelectorAll(".wide")].map(({ scrollLeft }) => scrollLeft);
  const opened = [...section.querySelectorAll("details")].map(({ open }) => open);
  const nodes = runs.map((run, i) => {
    const title = element("h3", { textContent: `${"AB"[i]}: ${run.place}` });
    const parts = [...(runs.length > 1 ? [title] : []), ...make(run, i)];
    return element("div", { className: "side" }, ...parts);
  });
  section.classList.toggle("two", runs.length > 1);
  $(".sides", section).replaceChildren(...nodes);
  section.querySelectorAll(".wide").forEach((node, k) => { node.scrollLeft = scrolled[k] ?? 0; });
  section.querySelectorAll("details").forEach((node, k) => { node.open = opened[k] ?? false; });
}

const hint = (text) => element("p", { className: "hint", textContent: text });

/* -- Overview -------------------------------------------------------------------------------- */

function drawOverview() {
  sides("overview", (run) => {
    const head = ["Model", "State", "Step", "Samples", "Loss", "Held out", "Rate", "MFU", "Memory",
      "Computed", ...(run.dollars_per_hour === null ? [] : ["Cost"]), "Left"];
    const rows = run.models.map((model) => overviewRow(model, run));
    const known = head.map((_, column) => column < 2 || rows.some((row) => row[column] !== DASH));
    const [shownHead, ...shown] = [head, ...rows].map((row) => row.filter((_, i) => known[i]));
    const what = inScroll("How far each model is", table(shownHead, shown));
    return [totals(run), what, stages(run)];
  });
}

function overviewRow(model, run) {
  const dot = coloured(element("span", { className: "dot" }), model, numExperts());
  const resumed = model.resumes ? `, resumed ${model.resumes} x` : "";
  const state = [`${model.state}${resumed}`];
  if (model.state === "training") {
    const written = model.written_at ?? "";
    state.push(element("span", { className: "late", dataset: { written } }));
  }
  if (model.state === "training" && model.num_steps) {
    state.unshift(element("progress", { max: model.num_steps, value: model.step ?? 0,
      aria: { label: `Steps of ${model.title}` } }), " ");
  }
  const cost = run.dollars_per_hour === null ? []
    : [dollars((model.compute_s / 3600) * run.dollars_per_hour)];
  return [[dot, model.title], state,
    told(model.step, whole) + (model.num_steps ? ` / ${whole(model.num_steps)}` : ""),
    told(model.samples_seen, compact), told(model.loss, compact),
    told(model.held_out_loss, compact),
    told(model.samples_per_second, (rate) => `${compact(rate)}/s`), told(model.mfu, UNITS.mfu),
    told(model.memory_bytes, gigabytes), duration(model.compute_s), ...cost,
    model.state === "training" ? told(model.eta_s, duration) : DASH];
}

/** What all models together took, and what is left. */
function totals({ models, forecast, dollars_per_hour: price }) {
  const done = models.filter(({ state }) => state === "finished").length;
  const cost = (seconds) => (price === null ? "" : `, ${dollars((seconds / 3600) * price)}`);
  const facts = {
    Trained: `${done} of ${models.length}`,
    "So far": `${duration(forecast.computed_s)} of devices${cost(forecast.computed_s)}`,
  };
  if (forecast.left_s) {
    facts["Still needs, about"] = `${duration(forecast.left_s)} of devices${cost(forecast.left_s)}`;
    facts["Done in about"] = duration(forecast.eta_s);
  }
  const pairs = Object.entries(facts).map(([name, value]) => element("div", {},
    element("dt", { textContent: name }), element("dd", { textContent: value })));
  return element("dl", { className: "facts" }, ...pairs);
}

function stages({ stages: known }) {
  if (known.length === 0) return "";
  const rows = known.map(({ stage, seconds, failed }) =>
    [stage, duration(seconds), failed ? "failed" : ""]);
  return element("details", {}, element("summary", { textContent: "How long each stage took" }),
    table(["Stage", "Time", ""], rows));
}

/** Say how far all is, in a line that a screen reader is told when it changes. */
function statusLine() {
  return runs.map(({ name, models }) => {
    const training = models.filter(({ state }) => state === "training").map(({ title }) => title);
    const isDone = models.some(({ state }) => state === "finished");
    return `${name}: ${training.length ? `training ${training.join(", ")}`
      : isDone ? "nothing is being trained" : "nothing has been trained yet"}.`;
  }).join(" ");
}

/* -- Curves ---------------------------------------------------------------------------------- */

/** Fetch the curves of models that have new rows; return whether there were any. */
async function fetchCurves() {
  const wanted = runs.flatMap(({ models }, i) => models
    .filter(({ name, version }) => curves.get(`${i} ${name}`)?.version !== version)
    .map((model) => ({ i, ...model })));
  const fetched = await Promise.all(wanted.map(async ({ i, name, version }) =>
    [`${i} ${name}`, { version, ...(await api.json(`api/runs/${i}/curves/${name}`)) }]));
  for (const [name, curve] of fetched) curves.set(name, curve);
  return fetched.length > 0;
}

/** Return the lines of a chart: which model of which run, and its points as [x, value]. */
function linesOf(series) {
  const isRouter = series === "router_loss";
  const name = isRouter ? "loss" : series;
  return runs.flatMap(({ models }, i) => models
    .filter((model) => !view.hidden.includes(model.name))
    .filter((model) => series !== "loss" || model.name !== "router")
    .filter((model) => !isRouter || model.name === "router")
    .map((model) => {
      const curve = curves.get(`${i} ${model.name}`);
      const points = (curve?.series[name] ?? [])
        .map(([samples, seconds, value]) => [place(samples, seconds, curve.batch_size), value])
        .filter(([x, value]) => x !== null && !(isLogarithmic(series) && value <= 0));
      const resumes = (curve?.resumes ?? [])
        .map(([samples, seconds]) => place(samples, seconds, curve.batch_size))
        .filter((x) => x !== null);
      return { model, run: i, points, resumes };
    })
    .filter(({ points }) => points.length > 0));
}

function place(samples, seconds, batchSize) {
  if (view.axis === "samples") return samples;
  if (view.axis === "seconds") return seconds;
  return batchSize ? samples / batchSize : null;
}

const isLogarithmic = (series) => view.log && series.includes("loss");

/** Return the points after an exponential moving average, begun without a bias; few are left. */
function smoothed(points, share) {
  if (share === 0 || points.length < FEW_POINTS) return points;
  let [sum, weight] = [0, 0];
  return points.map(([x, value]) => {
    sum = share * sum + (1 - share) * value;
    weight = share * weight + (1 - share);
    return [x, sum / weight];
  });
}

function drawCurves() {
  const names = new Set([...curves.values()].flatMap(({ series }) => Object.keys(series)));
  if (modelsByName().has("router")) names.add("router_loss");
  const known = [...names].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  const charts = known.map((name) => [name, linesOf(name)]).filter(([, lines]) => lines.length > 0);
  const resumed = charts.some(([, lines]) => lines.some(({ resumes }) => resumes.length > 0));
  $("#curves .hint").textContent = [
    charts.length ? "" : "Nothing to draw yet.",
    runs.length > 1 ? `${runs[0].name} is drawn solid, ${runs[1].name} dashed.` : "",
    resumed ? "Dotted lines with a triangle: training was taken up again there." : "",
  ].filter(Boolean).join(" ");
  drawLegend();
  const node = $("#curves .charts");
  const read = [...node.children].find((chart) => !$(".tip", chart).hidden); // at this moment
  node.replaceChildren(...charts.map(([name, lines]) =>
    new Chart(name, lines, name === read?.dataset.name ? read : null).node));
}

const rank = (name) => (ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length);

function drawLegend() {
  const names = [...modelsByName().values()];
  const legend = $("#curves .legend");
  const had = legend.contains(document.activeElement) ? document.activeElement.dataset.name : null;
  legend.replaceChildren(...names.map((model) => {
    const dot = coloured(element("span", { className: "dot" }), model, numExperts());
    const onclick = () => {
      const { hidden } = view;
      view.hidden = hidden.includes(model.name) ? hidden.filter((name) => name !== model.name)
        : [...hidden, model.name];
      remember();
      drawCurves();
    };
    return element("button", { type: "button", onclick, dataset: { name: model.name },
      aria: { pressed: !view.hidden.includes(model.name) } }, dot, model.title);
  }));
  if (had !== null) $(`[data-name="${had}"]`, legend)?.focus();
}

/** One chart: an SVG at the width of its place, with a cursor that the mouse or keys move. */
class Chart {
  /** `before` is the node of the chart that this one replaces while somebody reads it. */
  constructor(name, lines, before) {
    const share = NOISY.includes(name) ? Number(view.smooth) : 0;
    Object.assign(this, { name, isLog: isLogarithmic(name) });
    this.lines = lines.map((line) => ({ ...line, shown: smoothed(line.points, share) }));
    this.inWords = UNITS[name] ?? compact;
    const title = NAMES[name] ?? name.replaceAll("_", " ");
    this.tip = element("div", { className: "tip", hidden: true });
    this.node = element("figure", { className: "chart", dataset: { name } },
      element("h3", { textContent: title }), this.tip);
    const last = this.lines.map(({ shown, model, run }) =>
      `${label(model, run)} ${this.inWords(shown.at(-1)[1])}`).join(", ");
    this.node.setAttribute("aria-label", `${title}: ${last}`);
    const hadFocus = before?.contains(document.activeElement);
    requestAnimationFrame(() => {
      this.draw();
      if (hadFocus) $("svg", this.node)?.focus();
      if (before) this.#point(Number(before.dataset.cursor));
    });
  }

  draw() {
    this.width = Math.max(240, this.node.clientWidth);
    this.#scale();
    const svg = drawn("svg", { viewBox: `0 0 ${this.width} ${HEIGHT}`, height: HEIGHT, role: "img",
      tabindex: "0", "aria-label": this.node.getAttribute("aria-label") });
    this.cursor = drawn("line", { class: "cursor", visibility: "hidden", y1: MARGIN.top,
      y2: HEIGHT - MARGIN.bottom });
    svg.append(...this.#axes(), ...this.lines.map((line) => this.#line(line)), this.cursor);
    svg.addEventListener("pointermove", (event) =>
      this.#point(event.clientX - svg.getBoundingClientRect().left));
    svg.addEventListener("pointerleave", () => this.#leave());
    svg.addEventListener("blur", () => this.#leave());
    svg.addEventListener("keydown", (event) => this.#key(event));
    this.node.querySelector("svg")?.remove();
    this.node.append(svg);
  }

  #scale() {
    const points = this.lines.flatMap(({ shown }) => shown);
    this.x = range([0, ...points.map(([x]) => x)]);
    let [low, high] = range(points.map(([, value]) => this.#height(value)));
    if (low === high) {
      const tenth = 0.1 * (Math.abs(low) || 1);
      [low, high] = [low - tenth, high + tenth];
    }
    const room = 0.04 * (high - low);
    this.y = [low >= 0 && low - room < 0 && !this.isLog ? 0 : low - room, high + room];
  }

  #height(value) {
    return this.isLog ? Math.log10(value) : value;
  }

  #across(x) {
    const share = (x - this.x[0]) / (this.x[1] - this.x[0] || 1);
    return MARGIN.left + share * (this.width - MARGIN.left - MARGIN.right);
  }

  #down(value) {
    const share = (this.#height(value) - this.y[0]) / (this.y[1] - this.y[0]);
    return HEIGHT - MARGIN.bottom - share * (HEIGHT - MARGIN.top - MARGIN.bottom);
  }

  #axes() {
    const nodes = [];
    for (const tick of ticks(...this.y, 4)) {
      const value = this.isLog ? 10 ** tick : tick;
      const y = this.#down(value);
      const ends = { x1: MARGIN.left, x2: this.width - MARGIN.right, y1: y, y2: y };
      const place = { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" };
      nodes.push(drawn("line", { class: "grid", ...ends }),
        drawn("text", place, this.inWords(value)));
    }
    for (const tick of ticks(...this.x, Math.max(2, Math.floor(this.width / TICK_WIDTH)))) {
      const x = this.#across(tick);
      const anchor = x > this.width - 60 ? "end" : tick === this.x[0] ? "start" : "middle";
      nodes.push(drawn("text", { x, y: HEIGHT - 7, "text-anchor": anchor }, axisWords(tick)));
    }
    return nodes;
  }

  #line({ model, run, points, shown, resumes }) {
    const path = (list) => list.map(([x, y]) =>
      `${this.#across(x).toFixed(1)},${this.#down(y).toFixed(1)}`).join(" ");
    const group = drawn("g", {}, drawn("title", {}, label(model, run)));
    if (shown !== points) {
      const [low, high] = this.y; // beyond them there is no room
      const inside = points.filter(([, value]) =>
        this.#height(value) >= low && this.#height(value) <= high);
      group.append(drawn("polyline", { class: "curve raw", points: path(inside) }));
    }
    const kind = run > 0 ? "curve second" : "curve";
    group.append(drawn("polyline", { class: kind, points: path(shown) }));
    if (shown.length <= 12) {
      group.append(...shown.map(([x, y]) =>
        drawn("circle", { class: "point", r: 2.5, cx: this.#across(x), cy: this.#down(y) })));
    }
    for (const x of resumes) {
      const at = this.#across(x), foot = HEIGHT - MARGIN.bottom;
      group.append(drawn("line", { class: "resume", x1: at, x2: at, y1: MARGIN.top, y2: foot }),
        drawn("path", { class: "resumed", d: `M${at} ${foot - 7} l4 7 h-8 z` },
          drawn("title", {}, `${label(model, run)} was resumed before ${axisWords(x)}`)));
    }
    return coloured(group, model, numExperts());
  }

  #key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const width = this.width - MARGIN.left - MARGIN.right;
    this.at = Math.min(1, Math.max(0, (this.at ?? (step > 0 ? -0.02 : 1.02)) + 0.02 * step));
    this.#point(MARGIN.left + this.at * width);
  }

  /** Show what is nearest to a place, in pixels from the left. */
  #point(at) {
    const share = (at - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right);
    this.at = Math.min(1, Math.max(0, share));
    const x = this.x[0] + this.at * (this.x[1] - this.x[0]);
    const going = this.lines.filter(({ shown }) => x <= shown.at(-1)[0] + 1e-9 * this.x[1]);
    const rows = going.map(({ shown, model, run }) => {
      const [, value] = shown.reduce((best, point) =>
        (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
      const dot = coloured(element("span", { className: "dot" }), model, numExperts());
      return element("div", {}, element("span", {}, dot, label(model, run)),
        element("b", { textContent: this.inWords(value) }));
    });
    this.tip.replaceChildren(element("div", { textContent: axisWords(x) }), ...rows);
    this.tip.hidden = false;
    const left = this.#across(x);
    this.node.dataset.cursor = left;
    this.tip.style.left = left < this.width / 2 ? `${left + 10}px` : "auto";
    this.tip.style.right = left < this.width / 2 ? "auto" : `${this.width - left + 10}px`;
    this.cursor.setAttribute("visibility", "visible");
    for (const name of ["x1", "x2"]) this.cursor.setAttribute(name, left);
  }

  #leave() {
    this.tip.hidden = true;
    this.cursor.setAttribute("visibility", "hidden");
  }
}

const range = (values) => values.reduce(([low, high], value) =>
  [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);

const label = (model, run) => (runs.length > 1 ? `${"AB"[run]} ${model.title}` : model.title);

function axisWords(x) {
  if (view.axis === "seconds") return duration(x);
  return view.axis === "step" ? `step ${whole(x)}` : `${compact(x)} samples`;
}

/** Return some round numbers between two. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
  const first = Math.ceil(low / step); // counted: a step may be lost in a tick that is much larger
  return Array.from({ length: count + 2 }, (_, i) => Number(((first + i) * step).toPrecision(12)))
    .filter((tick) => tick <= high + step * 1e-6);
}

/* -- Samples --------------------------------------------------------------------------------- */

/** Draw the samples of the chosen model anew if there are others, or another is chosen. */
function drawSamples() {
  const drawing = [...modelsByName().values()].filter(({ name }) =>
    runs.some((run) => gridsOf(run, name).length > 0));
  const first = drawing.find(({ expert }) => expert !== null) ?? drawing[0];
  const chosen = (drawing.find(({ name }) => name === view.model) ?? first)?.name;
  const grids = runs.map((run) => gridsOf(run, chosen));
  ifChanged("samples", [chosen ?? null, drawing.map(({ name }) => name), grids], () => {
    troubles.clear();
    const select = $("#samples select");
    select.replaceChildren(...drawing.map(({ name, title }) =>
      element("option", { value: name, textContent: title })));
    if (chosen !== undefined) select.value = chosen;
    sides("samples", (run, i) => [chosen === undefined ? hint("No samples have been drawn yet.")
      : gallery(run, i, chosen)]);
  });
}

const gridsOf = (run, name) => run.models.find((model) => model.name === name)?.grids ?? [];

/** Return a table of pictures: a row a caption, a column a checkpoint. */
function gallery(run, i, name) {
  const grids = gridsOf(run, name);
  if (grids.length === 0) return hint("This run has none of it yet.");
  const className = grids.length === 1 ? "gallery single" : "gallery";
  const node = table(["Caption", ...grids.map(gridName)], [], { className });
  const region = inScroll(`Samples of ${name}`, node);
  fillGallery(node, region, { i, name, grids });
  return region;
}

async function fillGallery(node, region, place) {
  const { i, name, grids } = place;
  const path = `api/runs/${i}/captions/${name}`;
  const { captions } = await api.json(path).catch(missing(path, { captions: [] }));
  const count = captions.length || 2 * GRID_COLUMNS;
  const names = Array.from({ length: count }, (_, k) => captions[k] ?? `picture ${k + 1}`);
  const cellOf = (caption, k, grid, column) => element("button", { type: "button",
    className: "cell", aria: { label: `${caption}, ${gridName(grid)}` },
    onclick: () => lightbox.open({ ...place, names }, column, k) });
  const cells = names.map((caption, k) => grids.map((grid, column) =>
    cellOf(caption, k, grid, column)));
  $("tbody", node).replaceChildren(...names.map((caption, k) => row([caption, ...cells[k]])));
  const watcher = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      watcher.unobserve(target);
      const column = target.cellIndex - 1;
      const path = `api/runs/${i}/grids/${name}/${grids[column]}/small`;
      fillColumn(path, cells.map((cellsOfRow) => cellsOfRow[column])).catch(missing(path));
    }
  }, { root: region, rootMargin: "0px 400px" });
  for (const head of node.querySelectorAll("thead th:not(:first-child)")) watcher.observe(head);
  region.scrollLeft = region.scrollWidth; // the latest
}

/** Return what keeps an error on the page as long as its gallery, which is drawn without it. */
const missing = (path, instead) => (error) => {
  troubles.set(path, error.message);
  complain(error);
  return instead;
};

async function fillColumn(path, cells) {
  const url = await pictures.get(path);
  const image = await loaded(url);
  const rows = Math.round(image.naturalHeight / (image.naturalWidth / GRID_COLUMNS));
  cells.forEach((cell, k) => {
    const [x, y] = [k % GRID_COLUMNS, Math.floor(k / GRID_COLUMNS)];
    if (y >= rows) return cell.remove();
    cell.style.backgroundImage = `url("${url}")`;
    cell.style.backgroundPosition = `calc(-${x} * var(--cell)) calc(-${y} * var(--cell))`;
    cell.dataset.drawn = "";
  });
}

async function loaded(url) {
  const image = element("img", { src: url });
  await image.decode();
  return image;
}

/** One picture, a pixel of the file a pixel of the page; arrows go to its neighbours. */
const lightbox = {
  open(place, column, k) {
    Object.assign(this, { place, column, k });
    $("#lightbox").showModal();
    this.show().catch(complain);
  },

  async show() {
    const { i, name, grids, names } = this.place;
    const [column, k] = [this.column, this.k];
    for (const button of document.querySelectorAll("#lightbox [data-move]")) {
      button.disabled = !this.has(...button.dataset.move.split(",").map(Number));
    }
    $("#lightbox p").textContent = `${names[k]} · ${gridName(grids[column])}`;
    const image = await loaded(await pictures.get(`api/runs/${i}/grids/${name}/${grids[column]}`));
    if (column !== this.column || k !== this.k) return; // somebody was faster
    const side = image.naturalWidth / GRID_COLUMNS;
    const canvas = Object.assign($("#lightbox canvas"), { width: side, height: side });
    canvas.style.width = canvas.style.height = `${side}px`;
    const [x, y] = [(k % GRID_COLUMNS) * side, Math.floor(k / GRID_COLUMNS) * side];
    canvas.getContext("2d").drawImage(image, x, y, side, side, 0, 0, side, side);
    canvas.dataset.shown = `${k} ${grids[column]}`;
  },

  has(columns, rows) {
    const [column, k] = [this.column + columns, this.k + rows];
    return column >= 0 && column < this.place.grids.length && k >= 0 && k < this.place.names.length;
  },

  move(columns, rows) {
    if (!this.has(columns, rows)) return;
    this.column += columns;
    this.k += rows;
    this.show().catch(complain);
  },
};

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/* -- Clusters and router --------------------------------------------------------------------- */

async function drawClusters() {
  const known = await Promise.all(runs.map((_, i) => api.json(`api/runs/${i}/clusters`)));
  sides("clusters", (_, i) => {
    const { clusters } = known[i];
    if (clusters.length === 0) return [hint("Not clustered yet.")];
    return [element("div", { className: "cards" }, ...clusters.map(card))];
  });
}

function card({ rows, words, pictures: thumbs }, k, { length }) {
  const dot = coloured(element("span", { className: "dot" }), { expert: k }, length);
  return element("article", { className: "card" },
    element("h3", {}, dot, `Cluster ${k}: ${whole(rows)} rows`),
    element("div", { className: "thumbs" }, ...thumbs.map((png) =>
      element("img", { src: `data:image/png;base64,${png}`, alt: "" }))),
    element("p", { className: "words", textContent: words.join(", ") }));
}

async function drawRouter() {
  const known = await Promise.all(runs.map((_, i) => api.json(`api/runs/${i}/router`)));
  sides("router", (_, i) => routerView(known[i]));
}

function routerView({ right_cluster: right, levels, rows, temperature }) {
  if (!right) return [hint("Measured when the router is trained.")];
  const percent = (value) => told(value, (share) => `${(100 * share).toFixed(1)} %`);
  const cells = byLevel(right).map(([t]) => {
    const level = levels?.[t] ?? {};
    return [t, percent(right[t]), percent(level.accuracy), percent(level.prototype_accuracy),
      percent(level.ece), percent(level.ece_calibrated), told(level.nll_calibrated, compact)];
  });
  const head = ["Noise t", "Right, training rows", "Right, held out", "By cluster means",
    "Calibration error", "after the temperature", "Loss in nats"];
  const parts = [inScroll("The router by noise level", table(head, cells))];
  if (levels) {
    parts.push(hint(`${told(rows, whole)} held-out rows. ` +
      `Temperature ${told(temperature, digits)}. ` +
      "Below: how often it is right (upwards) by how sure it says that it is (to the right); on " +
      "the diagonal, it knows."));
    parts.push(element("div", { className: "diagrams" },
      ...byLevel(levels).map(([t, level]) => reliability(t, level.reliability))));
  }
  return parts;
}

/** Entries by noise level; objects have whole numbers first. */
const byLevel = (values) => Object.entries(values).sort(([a], [b]) => Number(a) - Number(b));

function reliability(t, { counts = [], confidence = [], accuracy = [] } = {}) {
  const side = 100;
  const svg = drawn("svg", { viewBox: `-6 -6 ${side + 12} ${side + 12}`, role: "img",
    "aria-label": `Reliability at t = ${t}` },
    drawn("line", { class: "ideal", x1: 0, y1: side, x2: side, y2: 0 }));
  const most = Math.max(1, ...counts);
  counts.forEach((count, k) => {
    if (!count) return;
    const [says, is] = [confidence[k] ?? 0, accuracy[k] ?? 0];
    svg.append(drawn("circle", { cx: side * says, cy: side * (1 - is),
      r: 2 + 4 * Math.sqrt(count / most) },
      drawn("title", {}, `${whole(count)} rows: says ${digits(says)}, right ${digits(is)}`)));
  });
  return element("figure", {}, svg, element("figcaption", { textContent: `t = ${t}` }));
}

async function drawDifferences() {
  const { differences } = await api.json("api/differences");
  for (const node of [$("#settings"), $('nav a[href="#settings"]')]) node.hidden = runs.length < 2;
  if (runs.length < 2) return;
  const rows = differences.map(([key, one, other]) => [key, one ?? DASH, other ?? DASH]);
  const names = runs.map(({ name }, i) => `${"AB"[i]}: ${name}`);
  $("#settings .wide").replaceChildren(rows.length ? table(["Setting", ...names], rows)
    : hint("In none that is known."));
}

/* -- Going on -------------------------------------------------------------------------------- */

function complain(error) {
  $("#alert").textContent = error.message;
  if (error.status === 401) $("#access").hidden = false;
}

/** Ask what there is now, and draw what has changed. */
async function look() {
  const told = await api.changed("api/state");
  if (told !== null) {
    runs = told.runs;
    document.title = `${runs.map(({ name }) => name).join(" and ")} · paris_ray watch`;
    ifChanged("status", statusLine(), () => { $("#status").textContent = statusLine(); });
    ifChanged("overview", runs, drawOverview);
  }
  // These may have failed the last time: each knows what it has drawn.
  const known = () => [...curves].map(([name, { version }]) => [name, version]);
  if (await fetchCurves() || !seen.curves) ifChanged("curves", known(), drawCurves);
  drawSamples();
  await redraw("clusters", runs.map(({ clusters }) => clusters), drawClusters);
  await redraw("router", runs.map(({ router }) => router), drawRouter);
  const states = runs.map(({ models }) => models.map(({ name, state }) => [name, state]));
  await redraw("settings", states, drawDifferences);
  const problems = [...runs.map(({ problem }) => problem), ...new Set(troubles.values())];
  $("#alert").textContent = problems.filter(Boolean).join(" ");
}

/** Draw a part that has to be asked for; where that fails, the next look tries again. */
async function redraw(part, version, draw) {
  const text = JSON.stringify(version);
  if (seen[part] === text) return;
  await draw();
  seen[part] = text;
}

/** Say of which models there was no news for long: time passes also where nothing changes. */
function markLate() {
  for (const node of document.querySelectorAll("[data-written]")) {
    const age = Date.now() / 1000 - Number(node.dataset.written);
    node.textContent = node.dataset.written && age > LATE_S ? `, no news for ${duration(age)}` : "";
  }
}

async function goOn() {
  if (!document.hidden) {
    try {
      await look();
    } catch (error) {
      complain(error);
    }
    markLate();
  }
  const isIdle = runs.length > 0 && runs.every(({ models }) =>
    models.length > 0 && models.every(({ state }) => state === "finished"));
  setTimeout(goOn, isIdle ? IDLE_POLL_MS : POLL_MS);
}

for (const name of ["axis", "smooth", "log"]) {
  const control = $(`#curves [name=${name}]`);
  if (name === "log") control.checked = Boolean(view.log);
  else control.value = view[name];
  control.addEventListener("change", () => {
    view[name] = name === "log" ? control.checked : control.value;
    remember();
    drawCurves();
  });
}
const cell = $("#samples [name=cell]");
const setCell = () => document.documentElement.style.setProperty("--cell", `${cell.value}px`);
cell.value = view.cell;
setCell();
cell.addEventListener("input", () => {
  view.cell = Number(cell.value);
  setCell();
  remember();
});
$("#samples select").addEventListener("change", (event) => {
  view.model = event.target.value;
  remember();
  pictures.forget();
  drawSamples();
});
for (const form of document.querySelectorAll("form.controls")) {
  form.addEventListener("submit", (event) => event.preventDefault());
}
$("#access").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key = $("#key").value;
  look().then(() => { $("#access").hidden = true; }, complain);
});
for (const button of document.querySelectorAll("#lightbox [data-move]")) {
  const move = button.dataset.move.split(",").map(Number);
  button.addEventListener("click", () => lightbox.move(...move));
}
$("#lightbox [data-close]").addEventListener("click", () => $("#lightbox").close());
$("#lightbox").addEventListener("keydown", (event) => {
  const move = MOVES[event.key];
  if (move === undefined) return;
  event.preventDefault();
  lightbox.move(...move);
});
let resizing = 0;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(drawCurves, 150);
});
goOn();
