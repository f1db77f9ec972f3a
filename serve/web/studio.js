/** The studio: one page to draw with a served model, and to see which experts drew what. */

import { Api, ApiError } from "./api.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { Job, Part, Queue } from "./queue.js";
import { Progress, Stage } from "./stage.js";
import { button, element, Experts, intoView, items } from "./views.js";

const NARROW = matchMedia("(max-width: 48rem)");
const SLOW_S = 10; // after it, the page says that it is still at work
const TICK_MS = 500;
const SAMPLING = ["num_inference_steps", "solver", "time_grid", "guidance_scale", "routing", "lora",
  "allowed_experts"];

const $ = (id) => document.getElementById(id);

const api = new Api();
const form = new Form($("form"));
const queue = new Queue(api, changed);
const gallery = new Gallery($("gallery"), (picture, description) => {
  look(picture.part.job, picture);
  say(description);
});
let model = null;
let experts = null;
let stage = null;

/* -- Using a picture again ------------------------------------------------------------------- */

/** Ways to put settings of a picture into the form; each returns what it has told. */
const recall = {
  all(record, { size = null, output_format = null } = {}) {
    const sampling = Object.fromEntries(SAMPLING.map((name) => [name, record[name] ?? null]));
    const settings = { prompt: record.prompt, seed: record.seed, n: null, quality: null, size,
      output_format, ...sampling };
    return put(settings, "prompt", "All settings of the picture are in the form.");
  },
  seed({ seed }) {
    return put({ seed }, "seed", "The seed of the picture is in the form.");
  },
  /** Let those draw that drew it, as many at each step as then. */
  experts({ routing, experts: [means] }) {
    const drew = [...means.keys()].filter((k) => means[k] > 0);
    return put({ routing, allowed_experts: drew }, "routing",
      "The experts of the picture are in the form.");
  },
};

/** Put settings into the form, go to one of them, and tell that all are there, or what is not. */
function put(settings, id, allAreThere) {
  const missing = form.set(settings);
  $(id).closest("details")?.setAttribute("open", "");
  $(id).focus();
  return say(missing.length === 0 ? allAreThere
    : `Not all settings of the picture are in the form. ${missing.join(" ")}`);
}

async function recallFile(file) {
  $("alert").textContent = "";
  try {
    const { sampling, size, ...record } = await api.provenance(file);
    const isNative = size === model.paris.picture_size;
    const told = recall.all({ ...record, ...sampling },
      { size: isNative ? null : `${size}x${size}` });
    if (record.model !== model.id) say(`${told} Another model drew the file: ${record.model}.`);
  } catch (error) {
    complain(error);
  }
}

/* -- Drawing --------------------------------------------------------------------------------- */

function draw() {
  if (model && form.check()) start([{ title: "", parts: [new Part(form.body)] }]);
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
  $("alert").textContent = "";
  const job = new Job(groups);
  form.remember(job.prompt);
  look(job, job.pictures[0]);
  say("Drawing ...");
  queue.add(job.parts);
  if (NARROW.matches) intoView($("stage"), "start");
}

/** Show a job, and one of its pictures. */
function look(job, picture) {
  stage = new Stage(job, picture, experts, { cancel, recall,
    selected: (shown) => gallery.select(shown), drawAgain: (parts) => queue.add(parts) });
}

function cancel(parts) {
  $("stage").focus({ preventScroll: true }); // the button goes
  return queue.cancel(parts);
}

function changed(part) {
  stage.update(part);
  showQueue(part.job);
  if (part.state === "done") part.pictures.forEach((picture) => gallery.add(picture));
  if (part.isUnfinished) return;
  if (part.state === "failed") {
    form.refuse(part.error?.param, part.message);
    if (part.error?.status === 401) askForKey();
  }
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

/* -- Queue ----------------------------------------------------------------------------------- */

const entries = new Map(); // by job

function showQueue(job) {
  if (!entries.has(job)) {
    const progress = new Progress(job, { cancel });
    const title = button(job.prompt, () => look(job, job.pictures[0]),
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

/** Tell what is new, to screen readers too; return it. */
function say(message) {
  $("status").textContent = message;
  return message;
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
  $("draw").disabled = $("compare").disabled = false;
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
