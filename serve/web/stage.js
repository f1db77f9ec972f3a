/** The job that is looked at: its pictures, one of them with all that is known, and its progress. */

import { button, element, facts, Frame, intoView, notes } from "./views.js";

const $ = (id) => document.getElementById(id);

/** What shows the progress of a job and cancels it. */
export class Progress {
  node = element("div", { className: "progress" });
  #bar = element("progress", { max: 1, aria: { label: "Progress" } });
  #text = element("span");

  constructor(job, { cancel }) {
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
export class Stage {
  #tiles = new Map();
  #frame = new Frame();
  #details = element("div", { className: "details" });
  #known = null; // what the details tell
  #view = null;
  #timeline = element("div");

  /** `actions` are what its buttons do: cancel, draw again, recall; and hear of selections. */
  constructor(job, picture, experts, actions) {
    Object.assign(this, { job, experts, actions, progress: new Progress(job, actions) });
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
    this.actions.selected(picture);
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
      if (picture.record) tile.bar.replaceChildren(this.experts.bar(picture.record.experts[0]));
    }
  }

  /** Show what is known of the selected picture; only when that changes, since focus may be there. */
  #showDetails() {
    const { part, record } = this.selected;
    const known = record ? this.selected : `${part.state} ${part.message}`;
    if (known === this.#known) return;
    this.#known = known;
    this.#timeline.replaceChildren(...(record ? [this.experts.timeline(record)] : []));
    if (record) this.#details.replaceChildren(...finished(this.selected, this.actions));
    else if (part.isUnfinished) this.#details.replaceChildren();
    else this.#details.replaceChildren(...unfinished(part, this.actions));
  }
}

/** Return what is known of a finished picture, and what can be done with it. */
function finished({ record, part, src, format }, { recall }) {
  const json = `data:application/json,${encodeURIComponent(JSON.stringify(record, null, 1))}`;
  return [
    ...(part.label ? [element("h3", { textContent: part.label })] : []),
    facts(record), ...notes(record),
    element("section", { aria: { label: "Download" } }, element("div", { className: "buttons" },
      download("Download picture", src, `${fileName(record)}.${format}`),
      download("Download record", json, `${fileName(record)}.json`))),
    element("section", { aria: { label: "Use again" } }, element("h3", { textContent: "Use again" }),
      element("div", { className: "buttons" },
        button("All settings", () => recall.all(record, part.body)),
        button("Only the seed", () => recall.seed(record)),
        button("Only the experts", () => recall.experts(record)))),
  ];
}

/** Return why there is no picture, and a way to one. */
function unfinished(part, { drawAgain }) {
  const again = () => drawAgain(part.job.parts.filter(({ state }) => state === part.state));
  return [
    element("p", { className: part.state === "failed" ? "error" : "", textContent: part.message }),
    // What is wrong with a field stays wrong: it is said there, and drawn anew from the form.
    ...(part.error?.param ? [] : [button("Try again", again)]),
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
