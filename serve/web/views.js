/** What is seen: experts, pictures, the timeline of a picture. Text is set as text, never parsed. */

/** Return a new element. */
export function element(tag, properties = {}, ...children) {
  const { dataset = {}, aria = {}, ...own } = properties;
  const node = Object.assign(document.createElement(tag), own);
  Object.assign(node.dataset, dataset);
  for (const [name, value] of Object.entries(aria)) node.setAttribute(`aria-${name}`, value);
  node.append(...children);
  return node;
}

export function button(text, onclick, properties = {}) {
  return element("button", { type: "button", textContent: text, onclick, ...properties });
}

/** Return a list item for each of some nodes. */
export function items(nodes) {
  return nodes.map((node) => element("li", {}, node));
}

/** Scroll a node into view, gently unless the reader wants none of that. */
export function intoView(node, block) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  node.scrollIntoView({ block, behavior: calm ? "auto" : "smooth" });
}

const percent = (share) => `${Math.round(100 * share)} %`;

/** The experts of the model, as the server tells of them. */
export class Experts {
  constructor(facts) {
    this.facts = facts;
  }

  get numbers() {
    return this.facts.map(({ expert }) => expert);
  }

  /** Return its number, some pictures and the telling words of what it was trained on. */
  label(k, { tag = "div", numPictures = 2 } = {}) {
    const { words, pictures } = this.facts[k];
    const thumbs = pictures.slice(0, numPictures).map((png) =>
      element("img", { src: `data:image/png;base64,${png}`, alt: "" }));
    const said = words.join(", ");
    return this.#coloured(k, element(tag, { className: "expert small", title: said },
      element("span", { className: "dot" }),
      element("span", { className: "name", textContent: `Expert ${k}` }),
      ...(thumbs.length ? [element("span", { className: "thumbs" }, ...thumbs)] : []),
      ...(said ? [element("span", { className: "words", textContent: said })] : [])));
  }

  /** Return a bar of the mean weights, for a glance; the timeline has the numbers. */
  bar(weights) {
    return element("span", { className: "bar", aria: { hidden: true } }, ...weights.map((weight, k) => {
      const part = this.#coloured(k, element("span"));
      part.style.width = `${100 * weight}%`;
      return part;
    }));
  }

  /** Return a table of which experts drew which step; those without weight are only counted. */
  timeline({ experts: [means], expert_weights: [rows] }) {
    const drew = this.numbers.filter((k) => means[k] > 0).sort((a, b) => means[b] - means[a]);
    const column = (className) => element("col", { className });
    const head = element("tr", {}, element("th", { scope: "col", textContent: "" }),
      ...rows.map((_, i) => element("th", { scope: "col", textContent: i + 1 })),
      element("th", { scope: "col", textContent: "mean" }));
    const table = element("table", {},
      element("caption", { textContent: summary(means, rows) }),
      element("colgroup", {}, column("who"), ...rows.map(() => column("step")), column("share")),
      element("thead", {}, head),
      element("tbody", {}, ...drew.map((k) => this.#row(k, means[k], rows.map((row) => row[k])))));
    return element("div", { className: "timeline", tabIndex: 0, role: "region",
      aria: { label: "Which experts drew which step" } }, table);
  }

  #row(k, mean, weights) {
    const cells = weights.map((weight, i) => {
      const level = this.#coloured(k, element("span"));
      level.style.height = `${100 * weight}%`;
      const title = `step ${i + 1}, expert ${k}: ${percent(weight)}`;
      return element("td", {}, element("span", { className: "cell", title }, level,
        element("b", { className: "unseen", textContent: percent(weight) })));
    });
    return element("tr", {}, element("th", { scope: "row" }, this.label(k)), ...cells,
      element("td", { className: "share", textContent: percent(mean) }));
  }

  #coloured(k, node) {
    node.style.setProperty("--hue", (25 + (360 * k) / this.facts.length) % 360);
    return node;
  }
}

/** Say in a sentence who drew. */
function summary(means, rows) {
  const drew = means.filter((mean) => mean > 0).length;
  const steps = `${rows.length} ${rows.length === 1 ? "step" : "steps"}`;
  const most = means.indexOf(Math.max(...means));
  const led = rows.filter((row) => row[most] === Math.max(...row)).length;
  if (drew === 1) return `Expert ${most} alone drew all of ${steps}.`;
  return `${drew} of ${means.length} experts drew; expert ${most} led in ${led} of ${steps}.`;
}

/** The frame of a picture, which shows the unfinished states while it is drawn. */
export class Frame {
  node = element("figure", { className: "picture" });
  #image = null;

  /** Show the present state; `alt` is empty where words stand beside it. */
  update({ src, record, part }, alt) {
    this.node.classList.toggle("partial", part.state === "drawing" && !record);
    if (src === null) {
      this.#image = null;
      this.node.replaceChildren(element("span", { textContent: stateInWords(part) }));
      return;
    }
    if (this.#image === null) {
      this.#image = element("img");
      this.node.replaceChildren(this.#image);
    }
    Object.assign(this.#image, { src, alt: record || !alt ? alt : `${alt} (unfinished)` });
  }
}

function stateInWords({ state }) {
  return { waiting: "waits", drawing: "begins", cancelling: "stops" }[state] ?? state;
}

/** Return a definition list of what a picture was drawn with. */
export function facts(record) {
  const rows = {
    Seed: record.seed,
    Steps: `${record.num_inference_steps} of ${record.solver}, ${record.time_grid}`,
    Guidance: record.guidance_scale,
    Routing: record.routing,
    ...(record.allowed_experts && { "Allowed experts": record.allowed_experts.join(", ") }),
    ...(record.lora && { Adapter: record.lora }),
  };
  return element("dl", { className: "facts" }, ...Object.entries(rows).flatMap(([name, value]) =>
    [element("dt", { textContent: name }), element("dd", { textContent: value })]));
}

/** Return what a picture did not get of what was asked for, or nothing. */
export function notes({ warnings, missing_experts, last_resort }) {
  const said = warnings.map(({ message }) => message);
  if (missing_experts.length) {
    const who = last_resort ? "the seed drew in place of" : "drawn without";
    said.push(`${who} experts that were lost: ${missing_experts.join(", ")}`);
  }
  return said.length ? [element("ul", { className: "notes" }, ...items(said))] : [];
}
