/** The studio: one page to draw with a served model, and to see which experts drew what. */

import { Api, ApiError } from "./api.js";
import { Form } from "./form.js";
import { Part, Queue } from "./queue.js";
import { button, element, Experts, facts, Frame, items, notes } from "./views.js";

const NARROW = matchMedia("(max-width: 48rem)");
const CALM = matchMedia("(prefers-reduced-motion: reduce)");
const SLOW_S = 10; // after it, the page says that it is still at work
const TICK_MS = 500;
const SAMPLING = ["num_inference_steps", "solver", "time_grid", "guidance_scale", "routing", "lora",
  "allowed_experts"];

const $ = (id) => document.getElementById(id);
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

const api = new Api();
const form = new Form($("form"));
const queue = new Queue(api, changed);
let model = null;
let experts = null;
let stage = null;

/** One drawing of the form: parts in titled groups, of which each is a request. */
class Job {
  constructor(groups) {
    this.groups = groups;
    this.parts = groups.flatMap(({ parts }) => parts);
    this.prompt = this.parts[0].body.prompt;
    for (const part of this.parts) part.job = this;
  }

  get pictures() {
    return this.parts.flatMap((part) => part.pictures);
  }

  get unfinished() {
    return this.parts.filter((part) => part.isUnfinished);
  }

  /** Return what is done of it, between 0 and 1; null where nobody knows yet. */
  get progress() {
    if (this.parts.every((part) => part.numSteps === null)) return null;
    return sum(this.parts.map((part) => (part.isUnfinished ? part.step / (part.numSteps ?? 1) : 1)))
      / this.parts.length;
  }

  /** Say how far it is. */
  get progressInWords() {
    const waits = this.parts.find((part) => part.state === "waiting" && part.message);
    if (waits) return waits.message;
    const seconds = `${Math.max(...this.parts.map((part) => part.elapsedS)).toFixed(0)} s`;
    const done = this.parts.length - this.unfinished.length;
    if (this.parts.length > 1) return `${done} of ${this.parts.length} pictures, ${seconds}`;
    const [{ state, step, numSteps }] = this.parts;
    if (state === "waiting") return "Waits for its turn";
    return numSteps === null ? `Begins, ${seconds}` : `Step ${step} of ${numSteps}, ${seconds}`;
  }
}

/** What shows the progress of a job and cancels it. */
class Progress {
  node = element("div", { className: "progress" });
  #bar = element("progress", { max: 1, aria: { label: "Progress" } });
  #text = element("span");

  constructor(job) {
    this.job = job;
    this.node.append(this.#bar, element("div", { className: "buttons" }, this.#text,
      button("Cancel", () => cancel(job.unfinished), { className: "quiet" })));
  }

  update() {
    this.node.hidden = this.job.unfinished.length === 0;
    if (this.job.progress === null) this.#bar.removeAttribute("value");
    else this.#bar.value = this.job.progress;
    this.#text.textContent = this.job.progressInWords;
  }
}

/** The job that is looked at: its pictures side by side, and one of them with all that is known. */
class Stage {
  #tiles = new Map();
  #frame = new Frame();
  #details = element("div", { className: "details" });
  #known = null; // what the details tell
  #view = null;
  #timeline = element("div");

  constructor(job, picture) {
    Object.assign(this, { job, progress: new Progress(job) });
    const many = job.pictures.length > 1 ? job.groups.map((group) => this.#group(group)) : [];
    this.#view = element("div", { className: "view" }, this.#frame.node, this.#details);
    $("job").replaceChildren(element("h2", { textContent: job.prompt }), this.progress.node,
      this.#view, this.#timeline, ...many);
    $("job").hidden = false;
    $("welcome").hidden = true;
    job.parts.forEach((part) => this.#updateTiles(part));
    this.select(picture);
  }

  select(picture) {
    this.selected = picture;
    for (const [other, { node }] of this.#tiles) node.setAttribute("aria-pressed", other === picture);
    for (const [other, node] of gallery) node.setAttribute("aria-pressed", other === picture);
    this.#frame.update(picture, this.job.prompt);
    this.#showDetails();
    this.progress.update();
  }

  update(part) {
    if (part.job !== this.job) return;
    this.#updateTiles(part);
    this.progress.update();
    if (this.selected.part !== part) return;
    this.#frame.update(this.selected, this.job.prompt);
    this.#showDetails();
  }

  #group({ title, parts }) {
    const tiles = parts.flatMap((part) => part.pictures.map((picture) => this.#tile(picture)));
    return element("section", {}, ...(title ? [element("h3", { textContent: title })] : []),
      element("div", { className: "tiles" }, ...tiles));
  }

  #tile(picture) {
    const frame = new Frame(), label = element("span"), bar = element("span");
    const node = element("button", { type: "button", className: "tile", title: picture.part.label,
      onclick: () => { this.select(picture); intoView(this.#view, "nearest"); } }, frame.node, bar, label);
    this.#tiles.set(picture, { node, frame, label, bar });
    return node;
  }

  #updateTiles(part) {
    for (const picture of part.pictures) {
      const tile = this.#tiles.get(picture);
      if (!tile) continue;
      tile.frame.update(picture, "");
      tile.label.textContent = part.shortLabel || nameOf(picture);
      if (picture.record) tile.bar.replaceChildren(experts.bar(picture.record.experts[0]));
    }
  }

  /** Show what is known of the selected picture; only when that changes, since focus may be there. */
  #showDetails() {
    const { part, record } = this.selected;
    const known = record ? this.selected : `${part.state} ${part.message}`;
    if (known === this.#known) return;
    this.#known = known;
    this.#timeline.replaceChildren(...(record ? [experts.timeline(record)] : []));
    if (record) this.#details.replaceChildren(...finished(this.selected));
    else if (part.isUnfinished) this.#details.replaceChildren();
    else this.#details.replaceChildren(...unfinished(part));
  }
}

function finished(picture) {
  const { record, part } = picture;
  return [
    ...(part.label ? [element("h3", { textContent: part.label })] : []),
    facts(record), ...notes(record),
    element("section", { aria: { label: "Download" } }, element("div", { className: "buttons" },
      download("Download picture", picture.src, `${fileName(record)}.${picture.format}`),
      download("Download record", `data:application/json,${encodeURIComponent(JSON.stringify(record, null, 1))}`,
        `${fileName(record)}.json`))),
    element("section", { aria: { label: "Use again" } }, element("h3", { textContent: "Use again" }),
      element("div", { className: "buttons" },
        button("All settings", () => recallAll(record, part.body)),
        button("Only the seed", () => recall({ seed: record.seed }, "seed", "The seed")),
        button("Only the experts", () => recallExperts(record)))),
  ];
}

function unfinished(part) {
  const again = () => queue.add(part.job.parts.filter(({ state }) => state === part.state));
  return [
    element("p", { className: part.state === "failed" ? "error" : "", textContent: part.message }),
    element("div", { className: "buttons" }, button("Try again", again)),
  ];
}

function download(textContent, href, name) {
  return element("a", { textContent, href, download: name, className: "button" });
}

function fileName({ model: name, prompt, seed }) {
  const words = prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  return [name, ...words.slice(0, 8), seed].join("-");
}

function nameOf({ record, index, part }) {
  const seed = record?.seed ?? (part.body.seed === undefined ? null : part.body.seed + index);
  return seed === null ? `Picture ${index + 1}` : `Seed ${seed}`;
}

/* -- Using a picture again ------------------------------------------------------------------- */

function recall(values, field, what) {
  form.set(values);
  say(`${what} of the picture ${what.endsWith("s") ? "are" : "is"} in the form.`);
  const target = form.node.elements[field].focus ? form.node.elements[field] : form.node.elements[field][0];
  target.closest("details")?.setAttribute("open", "");
  target.focus();
}

function recallAll(record, { size = null, output_format = null } = {}) {
  const sampling = Object.fromEntries(SAMPLING.map((name) => [name, record[name] ?? null]));
  const { prompt, seed } = record;
  recall({ prompt, seed, n: null, quality: null, size, output_format, ...sampling }, "prompt",
    "All settings");
}

/** Let those draw that drew a picture, as many at each step as then. */
function recallExperts({ routing, experts: [means] }) {
  const drew = experts.numbers.filter((k) => means[k] > 0);
  recall({ routing, allowed_experts: drew }, "routing", "The experts");
}

async function recallFile(file) {
  try {
    const { sampling, size, ...record } = await api.provenance(file);
    const isNative = size === model.paris.picture_size;
    recallAll({ ...record, ...sampling }, { size: isNative ? null : `${size}x${size}` });
    if (record.model !== model.id) say(`The file was drawn by another model, ${record.model}.`);
  } catch (error) {
    complain(error);
  }
}

/* -- Drawing --------------------------------------------------------------------------------- */

function draw() {
  if (form.check()) start([{ title: "", parts: [new Part(form.body)] }]);
}

/** Draw one seed by one, two and all experts, by each alone, and without each. */
function compare() {
  if (!form.check()) return;
  const { n, ...body } = form.body;
  const base = { seed: crypto.getRandomValues(new Uint32Array(1))[0], ...body };
  const allowed = form.allowedExperts;
  const part = (label, changes, shortLabel = label) =>
    Object.assign(new Part({ ...base, ...changes }), { label, shortLabel });
  const groups = [{
    title: "By how many are asked",
    parts: ["top-1", ...(allowed.length > 1 ? ["top-2"] : []), "full"].map(
      (routing) => part(routing, { routing })),
  }, {
    title: "Each alone",
    parts: allowed.map((k) => part(`Only expert ${k}`, { allowed_experts: [k] }, `Expert ${k}`)),
  }];
  if (allowed.length > 1) {
    groups.push({
      title: "Without one",
      parts: allowed.map((k) => part(`Without expert ${k}`,
        { allowed_experts: allowed.filter((other) => other !== k) }, `Expert ${k}`)),
    });
  }
  start(groups);
}

function start(groups) {
  const job = new Job(groups);
  form.remember(job.prompt);
  stage = new Stage(job, job.pictures[0]);
  say("Drawing ...");
  queue.add(job.parts);
  if (NARROW.matches) intoView($("stage"), "start");
}

function cancel(parts) {
  $("stage").focus({ preventScroll: true }); // the button goes
  return queue.cancel(parts);
}

function changed(part) {
  stage.update(part);
  showQueue(part.job);
  if (part.state === "done") part.pictures.forEach(addToGallery);
  if (part.isUnfinished) return;
  if (part.state === "failed") form.refuse(part.error?.param, part.message);
  if (part.error?.status === 401) askForKey();
  if (part.job.unfinished.length === 0) say(outcome(part.job));
}

/** Say how a job ended. */
function outcome({ parts, pictures }) {
  const failed = parts.find(({ state }) => state === "failed");
  if (failed) return failed.message;
  const cancelled = parts.filter(({ state }) => state === "cancelled");
  if (parts.length === 1 && cancelled.length) return cancelled[0].message;
  const seconds = Math.max(...parts.map((part) => part.elapsedS)).toFixed(1);
  const count = pictures.filter(({ record }) => record).length;
  if (cancelled.length) return `Cancelled; ${count} of ${pictures.length} pictures were finished.`;
  return count === 1 ? `Drawn in ${seconds} s.` : `Drawn ${count} pictures.`;
}

/* -- Queue and gallery ----------------------------------------------------------------------- */

const entries = new Map(); // by job
const gallery = new Map(); // buttons, by picture

function showQueue(job) {
  if (!entries.has(job)) {
    const progress = new Progress(job);
    const title = button(job.prompt, () => { stage = new Stage(job, job.pictures[0]); },
      { className: "quiet clip" });
    entries.set(job, { progress, node: element("li", {}, title, progress.node) });
    $("queue").querySelector("ul").append(entries.get(job).node);
  }
  entries.get(job).progress.update();
  if (job.unfinished.length === 0) {
    entries.get(job).node.remove();
    entries.delete(job);
  }
  $("queue").hidden = entries.size === 0;
}

function addToGallery(picture) {
  const { part, src, record } = picture;
  const alt = `${record.prompt}, seed ${record.seed}${part.label ? `, ${part.label}` : ""}`;
  const node = element("button", { type: "button", className: "small", title: alt,
    aria: { pressed: picture === stage.selected },
    onclick: () => { stage = new Stage(part.job, picture); say(alt); } },
    element("span", { className: "picture" }, element("img", { src, alt })));
  gallery.set(picture, node);
  $("gallery").querySelector("ul").prepend(element("li", {}, node));
}

/** Let time pass for those who wait. */
function tick() {
  for (const [job, { progress }] of entries) {
    progress.update();
    if (job === stage.job) stage.progress.update();
    if (!job.isSlow && job.parts.some((part) => part.isUnfinished && part.elapsedS > SLOW_S)) {
      job.isSlow = true;
      say("Still drawing: you can wait, or cancel.");
    }
  }
}

/* -- The page -------------------------------------------------------------------------------- */

function intoView(node, block) {
  node.scrollIntoView({ block, behavior: CALM.matches ? "auto" : "smooth" });
}

function say(message) {
  $("status").textContent = message;
}

/** Show what concerns no field and no picture, with a way to try again. */
function complain(error, ...actions) {
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401) return askForKey();
  $("alert").replaceChildren(error.message, ...actions);
}

function askForKey() {
  $("access").hidden = false;
  $("key").focus();
  $("alert").textContent = api.key ? "The server does not know this key." : "This server asks for a key.";
}

async function loadModel() {
  try {
    const [models, { data }] = await Promise.all([api.json("v1/models"), api.json("v1/experts")]);
    [model] = models.data;
    experts = new Experts(data);
  } catch (error) {
    say("The model is not here yet.");
    complain(error, button("Try again", loadModel));
    return;
  }
  $("alert").textContent = "";
  $("access").hidden = true;
  form.describe(model, experts);
  document.title = `${model.id}: paris_ray studio`;
  $("model").textContent = `${model.id}: ${experts.numbers.length} experts trained apart, drawing together`;
  $("attribution").textContent = model.paris.attribution ?? "";
  document.body.classList.toggle("small", model.paris.picture_size <= 64);
  $("cast").replaceChildren(...items(experts.numbers.map((k) => experts.label(k, { numPictures: 6 }))));
  say("Ready.");
}

form.node.noValidate = true;
form.node.addEventListener("submit", (event) => { event.preventDefault(); draw(); });
$("compare").onclick = compare;
$("cancel-all").onclick = () => cancel([...entries.keys()].flatMap((job) => job.unfinished));
$("file").onchange = ({ target }) => { if (target.files.length) recallFile(target.files[0]); target.value = ""; };
$("access").onsubmit = (event) => { event.preventDefault(); api.key = $("key").value; loadModel(); };
for (const details of document.querySelectorAll("[data-open-when-wide]")) details.open = !NARROW.matches;
setInterval(tick, TICK_MS);
loadModel();
