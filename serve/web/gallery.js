/** The gallery: the last finished pictures, no more of them than a page should hold. */

import { element } from "./views.js";

const MAX_PICTURES = 200;
const MAX_BYTES = 256 * 2 ** 20; // of their addresses, which hold the files

export class Gallery {
  #buttons = new Map(); // by picture, the oldest first
  #numBytes = 0;
  #numDropped = 0;
  #selected = null;

  /** `open` is called with the picture that somebody chooses, and its description. */
  constructor(node, open, { maxPictures = MAX_PICTURES, maxBytes = MAX_BYTES } = {}) {
    Object.assign(this, { node, open, maxPictures, maxBytes });
    this.#tell();
  }

  /** Add a finished picture; the oldest make room for it. */
  add(picture) {
    this.#buttons.set(picture, this.#button(picture));
    this.node.querySelector("ul").prepend(element("li", {}, this.#buttons.get(picture)));
    this.#numBytes += picture.src.length;
    while (this.#isOverfull) this.#dropOldest();
    this.#tell();
  }

  /** Mark the picture that is looked at, if it is here. */
  select(picture) {
    this.#selected = picture;
    for (const [other, node] of this.#buttons) node.setAttribute("aria-pressed", other === picture);
  }

  get #isOverfull() {
    const count = this.#buttons.size;
    return count > this.maxPictures || (count > 1 && this.#numBytes > this.maxBytes);
  }

  #dropOldest() {
    const [[picture, node]] = this.#buttons;
    const hadFocus = document.activeElement === node;
    this.#buttons.delete(picture);
    this.#numBytes -= picture.src.length;
    this.#numDropped += 1;
    node.parentElement.remove();
    if (hadFocus) this.#buttons.values().next().value.focus();
  }

  #button(picture) {
    const { part: { label }, src, record } = picture;
    const alt = `${record.prompt}, seed ${record.seed}${label ? `, ${label}` : ""}`;
    return element("button", { type: "button", className: "small", title: alt,
      aria: { pressed: picture === this.#selected }, onclick: () => this.open(picture, alt) },
      element("span", { className: "picture" }, element("img", { src, alt })));
  }

  #tell() {
    const gone = this.#numDropped ? `; older ones gone: ${this.#numDropped}` : "";
    this.node.querySelector(".hint").textContent = `Pictures: ${this.#buttons.size} of at most ` +
      `${this.maxPictures}, until you leave the page${gone}.`;
  }
}
