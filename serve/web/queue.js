/** What is drawn, and what waits for it: a few requests at a time, each of which can be cancelled. */

import { ApiError, events } from "./api.js";

const AT_A_TIME = 4; // browsers keep six connections to a server; cancelling needs one of them
const MAX_UNAVAILABLE = 5; // how often a server that is being replaced is asked again
const UNFINISHED = ["waiting", "drawing", "cancelling"];

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

/** One request: `n` pictures of one prompt by the same experts. */
export class Part {
  state = "waiting"; // drawing, cancelling, done, failed, cancelled
  label = ""; // what is special about it, among the parts of a job
  message = "";
  step = 0;
  numSteps = null; // known when the server has begun
  beganAt = null;
  #controller = null;

  constructor(body) {
    this.body = body;
    this.pictures = Array.from({ length: body.n ?? 1 }, (_, index) => new Picture(this, index));
    this.id = newId();
  }

  get isUnfinished() {
    return UNFINISHED.includes(this.state);
  }

  get elapsedS() {
    return this.beganAt === null ? 0 : (performance.now() - this.beganAt) / 1000;
  }

  /** Draw, telling of every change; a refusal that may pass is thrown, others end the part. */
  async run(api, changed) {
    this.#controller = new AbortController();
    Object.assign(this, { state: "drawing", message: "", step: 0, beganAt: performance.now() });
    changed(this);
    try {
      const response = await api.draw(this.body, { id: this.id, signal: this.#controller.signal });
      this.#begin(response.headers);
      changed(this);
      for await (const event of events(response)) {
        this.#take(event);
        changed(this);
      }
      if (!this.pictures.every((picture) => picture.record)) {
        throw new ApiError("The connection broke before the picture was finished. Try again: " +
          "the same seed draws the same picture.");
      }
      Object.assign(this, { state: "done", message: "" });
    } catch (error) {
      if (this.state === "drawing") this.#fail(error);
    }
    changed(this);
  }

  /** Return to the state before `run`. */
  wait(message = "") {
    Object.assign(this, { state: "waiting", message, id: newId(), beganAt: null });
  }

  /** Stop, and know after which step if the server knows it. */
  async cancel(api, changed) {
    let message = "Cancelled.";
    if (this.state === "drawing") {
      this.state = "cancelling";
      changed(this);
      try {
        message = `Cancelled after step ${await api.cancel(this.id)}.`;
      } catch {
        // It had not begun, or the server is gone: hanging up is enough for both.
      }
      this.#controller.abort();
      if (this.state === "done") return; // it was faster
    }
    Object.assign(this, { state: "cancelled", message });
    changed(this);
  }

  #begin(headers) {
    const steps = Number(headers.get("X-Paris-Steps"));
    this.numSteps = headers.get("X-Paris-Solver") === "heun" ? 2 * steps - 1 : steps;
    this.body = { ...this.body, seed: Number(headers.get("X-Paris-Seed")) };
  }

  #take({ type, b64_json, output_format, paris }) {
    const isFinal = type.endsWith("completed");
    const index = isFinal ? paris.seed - this.body.seed : paris.picture;
    const picture = this.pictures[index];
    picture.src = `data:image/${output_format};base64,${b64_json}`;
    picture.format = output_format;
    if (isFinal) picture.record = { prompt: this.body.prompt, ...paris };
    else this.step = Math.max(this.step, paris.step);
  }

  #fail(error) {
    if (!(error instanceof ApiError)) reportError(error); // no answer of this server, or a bug
    Object.assign(this, { state: "failed", message: error.message, error });
  }
}

/** One picture of a part: unfinished until it has a `record`. */
export class Picture {
  src = null;
  record = null;

  constructor(part, index) {
    Object.assign(this, { part, index });
  }
}

/** One drawing of the form: parts in titled groups, of which each is a request. */
export class Job {
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
    const shares = this.parts.map((part) =>
      part.isUnfinished ? part.step / (part.numSteps ?? 1) : 1);
    return sum(shares) / shares.length;
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
    if (state === "cancelling") return "Stops";
    return numSteps === null ? `Begins, ${seconds}` : `Step ${step} of ${numSteps}, ${seconds}`;
  }
}

/** The parts that are drawn or wait, in order. */
export class Queue {
  #waiting = [];
  #numRunning = 0;
  #pause = null;

  /** `changed` is called with each part that has changed. */
  constructor(api, changed) {
    Object.assign(this, { api, changed });
  }

  add(parts) {
    for (const part of parts) {
      if (part.state !== "waiting") part.wait();
      this.#waiting.push(part);
      this.changed(part);
    }
    this.#next();
  }

  async cancel(parts) {
    this.#waiting = this.#waiting.filter((part) => !parts.includes(part));
    const open = parts.filter(({ state }) => state === "waiting" || state === "drawing");
    await Promise.all(open.map((part) => part.cancel(this.api, this.changed)));
    this.#next();
  }

  #next() {
    while (this.#pause === null && this.#numRunning < AT_A_TIME && this.#waiting.length) {
      this.#run(this.#waiting.shift());
    }
  }

  async #run(part) {
    this.#numRunning += 1;
    try {
      await part.run(this.api, this.changed);
    } finally {
      this.#numRunning -= 1;
    }
    if (part.state === "failed") this.#recover(part);
    this.#next();
  }

  /** Ask a busy server again when it says so; where there is no server, give up what waits. */
  #recover(part) {
    const { status, retryAfterS, message } = part.error;
    part.numUnavailable = (part.numUnavailable ?? 0) + (status === 503);
    if (status === 429 || (status === 503 && part.numUnavailable <= MAX_UNAVAILABLE)) {
      const seconds = retryAfterS ?? 1;
      part.wait(`${reason(part.error)} Asking again in ${seconds} s.`);
      this.#waiting.unshift(part);
      this.#pause ??= setTimeout(() => { this.#pause = null; this.#next(); }, 1000 * seconds);
      this.changed(part);
    } else if (status === 0) {
      const given = this.#waiting.splice(0);
      for (const other of given) {
        Object.assign(other, { state: "failed", message });
        this.changed(other);
      }
    }
  }
}

function reason({ code, position, message }) {
  if (code !== "queue_full") return message.replace(/\.?$/, ".");
  return `The server is busy${position ? `: ${position} pictures wait already` : ""}.`;
}

/** Return a name for a request; `crypto.randomUUID` is missing where there is no TLS. */
function newId() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (word) => word.toString(16)).join("-");
}
