/** The buttons and the keys of the stage, on the page of images and that of slides. */

import { $ } from "./page.js";

const ZOOM_STEP = 1.4;

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
