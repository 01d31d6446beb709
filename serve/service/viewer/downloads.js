/** The buttons that download the open image's result, one per format of the service. */

import { $, element, percent, save } from "./page.js";
import { countDown, patiently, refusal, since } from "./waiting.js";

export class Downloads {
  #service;
  #state;
  #askForKey;
  #formats = new Map();
  /** Downloads under way, by format; a second click on a button stops its own. */
  #underWay = new Map();
  /** Formats that the page writes itself, as the result is shown. */
  #asShown;

  /**
   * @param {import("./service.js").Service} service
   * @param {import("./stage.js").Stage} stage
   * @param {{file: File, query: URLSearchParams}} state what is open
   * @param {(then: () => void) => void} askForKey
   */
  constructor(service, stage, state, askForKey) {
    this.#service = service;
    this.#state = state;
    this.#askForKey = askForKey;
    const tooLarge = () => {
      throw refusal("The picture cannot be drawn", "It is too large for this browser. Crop the image.");
    };
    this.#asShown = { overlay: () => stage.picture().catch(tooLarge) };
    $("downloads").addEventListener("click", ({ target }) => {
      const button = target.closest("button");
      if (!button) return;
      if (this.#underWay.has(button.value)) this.#underWay.get(button.value).abort();
      else this.#takeHome(button);
    });
  }

  /** Stop all downloads, and forget the last failure. */
  close() {
    for (const controller of this.#underWay.values()) controller.abort();
    this.#showFailure("");
  }

  /** Make a button for each format that the service offers. */
  async load() {
    try {
      const index = await this.#service.index();
      $("to-slides").hidden = !index.endpoints.includes("GET /slides");
      for (const format of index.formats) this.#formats.set(format.name, format);
    } catch (error) {
      $("download-failure").textContent = `${error.title ?? "The list of formats cannot be read"}. ${error.message}`;
    }
    $("downloads").replaceChildren(
      ...[...this.#formats.values()].map(({ name, title, kind }) =>
        element(
          "button",
          { type: "button", value: name, text: `${title} ` },
          element("small", { text: name in this.#asShown ? `${kind}, as shown` : kind }),
        ),
      ),
    );
  }

  /** Download a format of the open image; the button tells how far it is. */
  async #takeHome(button) {
    const { file } = this.#state;
    const format = this.#formats.get(button.value);
    const controller = new AbortController();
    const note = startNote(button.querySelector("small"));
    this.#underWay.set(format.name, controller);
    this.#showFailure("");
    button.setAttribute("aria-busy", "true");
    try {
      const content = await this.#download(format, file, note, controller.signal);
      save(content, file.name.replace(/\.[^.]+$/, "") + format.suffix);
    } catch (error) {
      if (error.name === "AbortError") return;
      const retry = () => this.#takeHome(button);
      const mayRetry = error.mayPass || error.asksForKey || error.title === undefined;
      this.#showFailure(`${error.title ?? "That failed"}. ${error.message}`, mayRetry ? retry : null);
      if (error.asksForKey) this.#askForKey(retry);
    } finally {
      note.stop();
      this.#underWay.delete(format.name);
      button.removeAttribute("aria-busy");
    }
  }

  /** The shown result in a format: from this page, or else from the service. */
  async #download({ name, path, options }, file, note, signal) {
    if (name in this.#asShown) return this.#asShown[name]();
    const query = new URLSearchParams(this.#state.query);
    if (options.includes("min_area_px")) query.set("min_area_px", smallestArea());
    const request = () => this.#service.post(path.slice(1), file, { query, signal, onProgress: note.tell });
    const { response, type } = await patiently(request, note, signal);
    return new Blob([response], { type });
  }

  #showFailure(text, retry = null) {
    $("download-failure").textContent = text;
    $("download-again").hidden = !retry;
    $("download-again").onclick = retry;
  }
}

/** Says in a download's button how far it is, and that a click stops it. */
function startNote(place) {
  const [before, started] = [place.textContent, performance.now()];
  let phase = "";
  const say = () => (place.textContent = `${phase || since(started)} · cancel`);
  const timer = setInterval(say, 500);
  const tell = (name, done) => {
    const words = { upload: "sent", work: "", download: "received" }[name];
    phase = words && done !== null ? `${percent(done)} ${words}` : "";
    say();
  };
  const busy = (seconds, signal) => {
    phase = "busy, trying again";
    return countDown(seconds, signal, say);
  };
  const stop = () => {
    clearInterval(timer);
    place.textContent = before;
  };
  say();
  return { tell, countDown: busy, stop };
}

function smallestArea() {
  const { value, validity } = $("smallest");
  if (!validity.valid) throw refusal("The smallest outline cannot be used", "It has to be a whole number of pixels.");
  return Number(value);
}
