/** The buttons and the keys of the stage, on the page of images and that of slides. */

import { $, percent, placeBeside, speak } from "./page.js";

const ZOOM_STEP = 1.4;
const PAN_STEP = 48;

/**
 * @param {{zoomBy: (factor: number) => void, fit: () => void, actualSize: () => void}} view
 * @param {import("./classes.js").Classes} classes
 * @param {() => boolean} isOpen whether there is a picture for the keyboard to point at
 */
export function setUpTools(view, classes, isOpen) {
  const place = $("view");
  place.addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() === "h" && !event.ctrlKey && !event.metaKey) classes.toggle();
  });
  // Before the view sees the key, so that the first one is spoken too.
  place.addEventListener("keydown", () => place.classList.toggle("by-keyboard", isOpen()), { capture: true });
  for (const kind of ["pointermove", "blur"]) {
    place.addEventListener(kind, () => place.classList.remove("by-keyboard"), { capture: true });
  }
  place.addEventListener("blur", () => ($("readout").hidden = true));
  $("zoom-in").onclick = () => view.zoomBy(ZOOM_STEP);
  $("zoom-out").onclick = () => view.zoomBy(1 / ZOOM_STEP);
  $("fit").onclick = () => view.fit();
  $("actual").onclick = () => view.actualSize();
  $("show-overlay").onclick = () => classes.toggle();
}

/**
 * Move a view by a key that does so.
 *
 * @param {(x: number, y: number) => void} look moves what is looked at, in CSS pixels
 * @returns {boolean} whether the key does that
 */
export function moveByKey(event, view, look) {
  if (event.ctrlKey || event.metaKey || event.altKey) return false;
  const step = event.shiftKey ? 4 * PAN_STEP : PAN_STEP;
  const actions = {
    ArrowLeft: () => look(-step, 0),
    ArrowRight: () => look(step, 0),
    ArrowUp: () => look(0, -step),
    ArrowDown: () => look(0, step),
    "+": () => view.zoomBy(ZOOM_STEP),
    "=": () => view.zoomBy(ZOOM_STEP),
    "-": () => view.zoomBy(1 / ZOOM_STEP),
    0: () => view.fit(),
    1: () => view.actualSize(),
  };
  if (!Object.hasOwn(actions, event.key)) return false;
  event.preventDefault();
  actions[event.key]();
  return true;
}

/**
 * Show class and confidence at a point, and speak them where the keyboard points.
 *
 * @param {import("./classes.js").Classes} classes
 * @param {{x: number, y: number, label: number, confidence: number} | null} detail null: hide it
 * @param {string} nameless what a point without a class is called
 * @param {string} place where the point is, in words
 */
export function showReadout(classes, detail, nameless, place) {
  const readout = $("readout");
  readout.hidden = !detail;
  if (!detail) return;
  const found = classes.of(detail.label);
  const name = found?.name ?? nameless;
  const confidence = found ? percent(detail.confidence / 255) : "";
  const low = found && detail.confidence < classes.limit ? "low confidence · " : "";
  readout.style.setProperty("--class-color", found?.color ?? "transparent");
  readout.querySelector("strong").textContent = name;
  readout.querySelector(".value").textContent = confidence;
  readout.querySelector("small").textContent = low + place;
  placeBeside(readout, detail, $("stage"));
  if ($("view").classList.contains("by-keyboard")) speak(found ? `${name}, ${confidence}` : name);
}
