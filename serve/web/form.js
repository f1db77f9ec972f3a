/** The form: the settings of the next picture, named as the fields of the request. */

import { button, element, items } from "./views.js";

const NUMBERS = ["n", "seed", "num_inference_steps", "guidance_scale"];
const PRESET_FIELDS = ["num_inference_steps", "solver", "time_grid"];
const OFFERED = ["solver", "time_grid", "quality", "lora", "size"]; // by the model
const LARGER_SIZES = [256, 512, 1024];
const QUALITIES = { low: "Low: few steps, quick", medium: "Medium", high: "High: the most steps" };
const HISTORY = "paris_ray.history";
const HISTORY_LENGTH = 30;

const $ = (id) => document.getElementById(id);

export class Form {
  constructor(node) {
    this.node = node;
    this.history = readHistory();
    node.addEventListener("input", ({ target }) => { this.#clear(target.name); this.#sync(); });
    node.addEventListener("reset", () => setTimeout(() => { this.#clear(); this.#sync(); }));
    node.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        node.requestSubmit($("draw"));
      }
    });
    $("all-experts").onclick = () => this.set({ allowed_experts: null });
    $("forget").onclick = () => { this.history = []; this.#writeHistory(); $("prompt").focus(); };
    this.#showHistory();
  }

  /** Offer what the model has; what is left empty is the model's own, what is chosen stays. */
  describe({ paris }, experts) {
    const chosen = this.#chosen, { defaults } = paris;
    for (const name of ["num_inference_steps", "guidance_scale", "routing"]) {
      this.node.elements[name].placeholder = defaults[name];
    }
    for (const name of ["solver", "time_grid"]) {
      this.#offer(name, [...this.node.elements[name].options].map((o) => o.value).filter(Boolean),
        `the model's (${defaults[name]})`);
    }
    this.#offer("quality", paris.qualities, "The model's own", (name) => QUALITIES[name]);
    $("quality-field").hidden = paris.qualities.length === 0;
    const loras = Object.entries(paris.loras);
    this.#offer("lora", loras.map(([name]) => name), "none",
      (name) => `${name} (expert ${paris.loras[name]})`);
    $("lora-field").hidden = loras.length === 0;
    const native = paris.picture_size;
    this.#offer("size", LARGER_SIZES.filter((side) => side > native).map((side) => `${side}x${side}`),
      `${native}x${native}`);
    const counts = experts.numbers.map((k) => `top-${k + 1}`);
    $("routings").replaceChildren(...[...counts, "full", "top-p:0.9", "threshold:0.2", "agree:0.5"].map(
      (value) => element("option", { value })));
    $("experts").querySelector("div").replaceChildren(...experts.numbers.map((k) => {
      const box = { type: "checkbox", name: "allowed_experts", value: k, defaultChecked: true };
      const label = experts.label(k, { tag: "label" });
      label.prepend(element("input", box));
      return label;
    }));
    $("examples").replaceChildren(...paris.example_prompts.map((prompt) => this.#promptButton(prompt)));
    this.set(chosen);
  }

  /** Return the body of a request: what is filled in, and nothing else. */
  get body() {
    const body = {};
    for (const [name, value] of new FormData(this.node)) {
      if (value !== "" && name !== "allowed_experts") {
        body[name] = NUMBERS.includes(name) ? Number(value) : value;
      }
    }
    const allowed = this.allowedExperts;
    return { ...body, ...(allowed.length < this.#boxes.length && { allowed_experts: allowed }) };
  }

  get allowedExperts() {
    return this.#boxes.filter((box) => box.checked).map((box) => Number(box.value));
  }

  /** Say at their fields what is wrong; return whether nothing is. */
  check() {
    this.#clear();
    if (this.#boxes.length && this.allowedExperts.length === 0) {
      this.refuse("allowed_experts", "Choose at least one expert.");
      this.#boxes[0].focus();
      return false;
    }
    const wrong = [...this.node.elements].filter((field) => !field.checkValidity());
    for (const field of wrong) this.refuse(field.name, field.validationMessage);
    wrong[0]?.focus();
    return wrong.length === 0;
  }

  /**
   * Set some settings, by the names of the request's fields; null means the model's own.
   * Return what could not be set, in words, which stand at the fields too.
   */
  set(values) {
    const missing = [];
    for (const [name, value] of Object.entries(values)) {
      this.#clear(name);
      const message = this.#put(name, value);
      if (!message) continue;
      this.refuse(name, message);
      missing.push(message);
    }
    this.#sync();
    return missing;
  }

  /** Say at a field what is wrong with it; a name that is no field's is none of the form's. */
  refuse(name, message) {
    const place = name === "allowed_experts" ? $("experts") : this.node.elements[name];
    if (!place) return;
    this.#clear(name);
    place.closest("details")?.setAttribute("open", "");
    const note = element("p", { className: "error", id: `error-${name}`, textContent: message });
    place.setAttribute("aria-invalid", "true");
    place.setAttribute("aria-errormessage", note.id);
    if (place === $("experts")) place.append(note);
    else place.after(note);
  }

  /** Put a prompt at the head of the history, which this browser keeps. */
  remember(prompt) {
    this.history = [prompt, ...this.history.filter((other) => other !== prompt)];
    this.history.length = Math.min(this.history.length, HISTORY_LENGTH);
    this.#writeHistory();
  }

  /** Set one setting; return why it cannot be set, or nothing. */
  #put(name, value) {
    if (name === "allowed_experts") return this.#allow(value);
    if (name === "seed" && value !== null && !Number.isSafeInteger(value)) {
      return "The seed is too long for a browser's numbers.";
    }
    const field = this.node.elements[name];
    field.value = value ?? "";
    return field.value === String(value ?? "") ? "" : `There is no ${value} here.`;
  }

  /** Let some experts draw, or all; return which of them there are not. */
  #allow(numbers) {
    for (const box of this.#boxes) box.checked = numbers?.includes(Number(box.value)) ?? true;
    const gone = (numbers ?? []).filter((k) => !this.allowedExperts.includes(k));
    return gone.map((k) => `There is no expert ${k} here.`).join(" ");
  }

  /** Return the choices among what the model offers, as `set` takes them. */
  get #chosen() {
    const values = OFFERED.map((name) => [name, this.node.elements[name].value || null]);
    const allowed = this.allowedExperts;
    const allowed_experts = allowed.length < this.#boxes.length ? allowed : null;
    return { ...Object.fromEntries(values), allowed_experts };
  }

  get #boxes() {
    return [...this.node.querySelectorAll("[name=allowed_experts]")];
  }

  #offer(name, values, empty, inWords = (value) => value) {
    const options = values.map((value) => element("option", { value, textContent: inWords(value) }));
    this.node.elements[name].replaceChildren(element("option", { value: "", textContent: empty }), ...options);
  }

  #promptButton(prompt) {
    return button(prompt, () => { this.set({ prompt }); $("prompt").focus(); });
  }

  #clear(name = null) {
    for (const note of this.node.querySelectorAll(name ? `[id="error-${name}"]` : ".error")) {
      const place = this.node.querySelector(`[aria-errormessage="${note.id}"]`);
      place.removeAttribute("aria-invalid");
      place.removeAttribute("aria-errormessage");
      note.remove();
    }
  }

  /** Show what follows from the settings: who may draw, and what an effort decides. */
  #sync() {
    const all = this.#boxes.length, allowed = this.allowedExperts.length;
    const told = allowed === all ? "" : `${allowed} of ${all} experts may draw.`;
    $("experts-summary").textContent = told;
    $("restriction").textContent = told;
    const preset = this.node.elements.quality.value !== "";
    for (const name of PRESET_FIELDS) this.node.elements[name].disabled = preset;
    $("preset-hint").hidden = !preset;
  }

  #showHistory() {
    $("history").hidden = this.history.length === 0;
    const prompts = this.history.map((prompt) => this.#promptButton(prompt));
    $("history").querySelector("ul").replaceChildren(...items(prompts));
  }

  #writeHistory() {
    try {
      localStorage.setItem(HISTORY, JSON.stringify(this.history));
    } catch {
      // A browser that keeps nothing for pages keeps no history.
    }
    this.#showHistory();
  }
}

function readHistory() {
  try {
    const history = JSON.parse(localStorage.getItem(HISTORY));
    return Array.isArray(history) ? history.filter((prompt) => typeof prompt === "string") : [];
  } catch {
    return [];
  }
}
