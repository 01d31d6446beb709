/** A region of the open slide: choose it, segment it, show it, take its result home. */

import { sourceInMemory } from "./cells.js";
import { $, element, grouped, micrometres, save, speak } from "./page.js";

/** Fires `result` with `{layer, summary}` when a region is segmented, and `closed` when it is left. */
export class SlideRegion extends EventTarget {
  /** What the service offers a region's result as. */
  formats = [];
  /** The um per pixel that the model was trained at, where it is known. */
  modelMpp = null;
  #service;
  #state;
  #view;
  #read;
  #askForKey;
  #region = null;
  #request = null;

  /**
   * @param {import("./service.js").Service} service
   * @param {{slide: object}} state what is open
   * @param {import("./slide_view.js").SlideView} view
   * @param {(buffer: ArrayBuffer) => Promise<object>} read cells of an answer
   * @param {(then: () => void) => void} askForKey
   */
  constructor(service, state, view, read, askForKey) {
    super();
    this.#service = service;
    this.#state = state;
    this.#view = view;
    this.#read = read;
    this.#askForKey = askForKey;
    $("draw").onclick = () => {
      view.drawing = !view.drawing;
      $("draw").setAttribute("aria-pressed", String(view.drawing));
      if (view.drawing) $("region-help").textContent = "Drag over the slide.";
      else this.showHelp();
    };
    view.addEventListener("region", ({ detail }) => {
      $("draw").setAttribute("aria-pressed", "false");
      this.#segment(detail);
    });
    $("in-view").onclick = () => this.#segment(view.regionInView());
    $("region-close").onclick = () => {
      this.close();
      this.showHelp();
      this.dispatchEvent(new CustomEvent("closed"));
    };
  }

  /** Whether a segmented region is shown. */
  get isShown() {
    return this.#region !== null;
  }

  /** Leave the region, and stop what is under way for it. */
  close() {
    this.#request?.abort();
    this.#request = this.#region = null;
    this.#view.showRegion(null);
    this.#view.drawing = false;
    $("draw").setAttribute("aria-pressed", "false");
    $("region-result").hidden = true;
    $("region-downloads").replaceChildren();
    $("region-failure").textContent = "";
  }

  /** Say how large a region may be. */
  showHelp() {
    const most = this.#state.slide.max_region_px;
    const side = this.modelMpp ? `, about ${micrometres(Math.sqrt(most) * this.modelMpp)} square` : "";
    $("region-help").textContent = `At most ${grouped(most / 1e6)} megapixels${side}. Large ones take a while.`;
  }

  /** Um per pixel of the slide along x and y; null where it is not known. */
  get sides() {
    const { mpp: known, mpp_xy: both } = this.#state.slide;
    const mpp = known ?? (Number($("mpp").value) || null);
    return both ?? (mpp && [mpp, mpp]);
  }

  async #segment(region) {
    this.#view.showRegion(region);
    if (!region) return;
    this.#request?.abort();
    const controller = new AbortController();
    this.#request = controller;
    $("region-failure").textContent = "";
    const sides = this.sides;
    const size = sides ? `${micrometres(region.width * sides[0])} × ${micrometres(region.height * sides[1])}` : "";
    $("region-help").textContent = `Segmenting ${size}`;
    try {
      const { response } = await this.#post(region, "arrays", controller.signal);
      const found = await this.#read(response);
      if (this.#request !== controller) return;
      const summary = JSON.parse(new TextDecoder().decode(found.arrays.get("summary").data));
      this.#show(region, found, summary);
      $("region-help").textContent = `The region of ${size} is segmented.`;
      speak("The region is segmented.");
    } catch (error) {
      if (error.name === "AbortError") return;
      this.#view.showRegion(null);
      this.showHelp();
      $("region-failure").textContent = error.message;
      if (error.asksForKey) this.#askForKey(() => this.#segment(region));
    }
  }

  #post(region, format, signal) {
    const { id, mpp } = this.#state.slide;
    const query = new URLSearchParams(region);
    if (mpp === null && $("mpp").value) query.set("mpp", $("mpp").value);
    return this.#service.send("POST", `slides/${id}/region/${format}?${query}`, { signal, keep: true });
  }

  #show(region, found, summary) {
    this.#region = region;
    const cell = [region.width / found.width, region.height / found.height];
    const layer = { source: sourceInMemory(found), origin: [region.x, region.y], cell };
    this.dispatchEvent(new CustomEvent("result", { detail: { layer, summary } }));
    $("region-result").hidden = false;
    $("region-downloads").replaceChildren(
      ...this.formats.map(({ name, title, kind, path, suffix }) => {
        const button = element("button", { type: "button", value: name, text: `${title} ` }, element("small", { text: kind }));
        button.onclick = () => this.#takeHome(button, path.slice(1), suffix);
        return button;
      }),
    );
  }

  async #takeHome(button, format, suffix) {
    const region = this.#region;
    const { name } = this.#state.slide;
    button.setAttribute("aria-busy", "true");
    $("region-failure").textContent = "";
    try {
      const { response, type } = await this.#post(region, format);
      save(new Blob([response], { type }), `${name}_x${region.x}_y${region.y}${suffix}`);
    } catch (error) {
      $("region-failure").textContent = error.message;
    } finally {
      button.removeAttribute("aria-busy");
    }
  }
}
