/** The list of the folder's slides, with a thumbnail and the state of each. */

import { $, bytes, element, grouped } from "./page.js";

const STATES = { new: "", waiting: "waiting", running: "running", stopped: "stopped", failed: "failed", done: "done" };

export class SlideList {
  #service;
  #choose;
  #slides = [];
  /** Thumbnails are asked for when they come into view: a folder may have thousands of slides. */
  #thumbnails = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      this.#thumbnails.unobserve(target);
      this.#showThumbnail(target);
    }
  });

  /**
   * @param {import("./service.js").Service} service
   * @param {(id: string) => void} choose called with the slide that is clicked
   */
  constructor(service, choose) {
    this.#service = service;
    this.#choose = choose;
    $("filter").addEventListener("input", () => this.show());
  }

  /** Whether a slide waits or is segmented. */
  get isBusy() {
    return this.#slides.some(({ state }) => state === "waiting" || state === "running");
  }

  /** Ask the service for the list, and show it. */
  async load() {
    ({ slides: this.#slides } = await this.#service.json("slides"));
    this.show();
  }

  /** Show the slides that the field above them lets through; the one of the address is marked. */
  show() {
    const wanted = $("filter").value.trim().toLowerCase();
    const found = this.#slides.filter(({ file }) => file.toLowerCase().includes(wanted));
    const total = this.#slides.length;
    $("list-count").textContent = total ? grouped(total) : "";
    const note = total ? "No slide has this in its name." : "There is no slide in the service's folder.";
    $("list-note").textContent = found.length ? "" : note;
    const before = [...$("list").children];
    const rows = new Map(before.map((row) => [row.dataset.id, row]));
    const after = found.map((slide) => this.#row(slide, rows.get(slide.id)));
    const isSame = after.length === before.length && after.every((row, at) => row === before[at]);
    if (!isSame) $("list").replaceChildren(...after); // else the keyboard's focus would be lost
  }

  /** A row of the list; one that is there keeps its thumbnail. */
  #row(slide, old) {
    const row = old ?? this.#newRow(slide);
    row.firstElementChild.setAttribute("aria-current", String(slide.id === location.hash.slice(1)));
    const folder = slide.file.includes("/") ? slide.file.slice(0, slide.file.lastIndexOf("/")) : "";
    const size = slide.num_bytes === null ? "" : bytes(slide.num_bytes);
    const mark = element("b", { text: STATES[slide.state], className: slide.state });
    const rest = [folder, size].filter(Boolean).join(" · ");
    row.querySelector("small").replaceChildren(...(mark.textContent ? [mark, rest ? ` · ${rest}` : ""] : [rest]));
    return row;
  }

  #newRow(slide) {
    const picture = element("span", { className: "thumbnail" });
    const name = element("span", { className: "name", text: slide.name, title: slide.file });
    const button = element("button", { type: "button" }, picture, name, element("small"));
    button.onclick = () => this.#choose(slide.id);
    const row = element("li", { "data-id": slide.id }, button);
    this.#thumbnails.observe(row);
    return row;
  }

  async #showThumbnail(row) {
    try {
      const { response, type } = await this.#service.send("GET", `slides/${row.dataset.id}/thumbnail.jpeg`);
      const address = URL.createObjectURL(new Blob([response], { type }));
      const picture = element("img", { src: address, alt: "" });
      picture.onload = () => URL.revokeObjectURL(address);
      row.querySelector(".thumbnail").replaceChildren(picture);
    } catch {
      // the slide cannot be read: choosing it says why
    }
  }
}
