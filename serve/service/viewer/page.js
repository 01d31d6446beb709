/** What the pages of images and of slides share: elements, words, the key, the theme. */

const SPOKEN_AFTER_MS = 400;
const KEY_ITEM = "focalpath-key"; // in sessionStorage: gone with the tab
const THEME_ITEM = "focalpath-theme";
const grouping = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const $ = (id) => document.getElementById(id);
export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;
export const grouped = (number) => grouping.format(number);

/** Make an element whose text is text: names of files and classes are never markup. */
export function element(tag, { text, className, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function swatch(color) {
  const made = element("span", { className: "swatch" });
  made.style.setProperty("--class-color", color);
  return made;
}

let speaking = 0;
/** Tell screen readers, once things have settled. */
export function speak(text) {
  clearTimeout(speaking);
  speaking = setTimeout(() => ($("status").textContent = text), SPOKEN_AFTER_MS);
}

/** The largest of 1, 2, 5, 10, 20, ... that is not above a length. */
export function roundLength(length) {
  const power = 10 ** Math.floor(Math.log10(length));
  return [5, 2, 1].find((first) => first * power <= length) * power;
}

export function micrometres(length) {
  return length >= 1000 ? `${(length / 1000).toPrecision(3)} mm` : `${length.toPrecision(3)} µm`;
}

/** A size of a file. */
export const bytes = (count) => {
  const [unit, size] = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]].find(([, size]) => count >= size) ?? ["B", 1];
  return `${Number((count / size).toPrecision(3))} ${unit}`;
};

/** Show a scale bar of a round length, or none where a CSS pixel's length is not known. */
export function showScale(bar, umPerCssPixel, widest) {
  bar.hidden = !umPerCssPixel;
  if (bar.hidden) return;
  const um = roundLength(widest * umPerCssPixel);
  bar.querySelector("span").textContent = um >= 1000 ? `${um / 1000} mm` : `${um} µm`;
  bar.style.setProperty("--bar-width", `${um / umPerCssPixel}px`);
}

/** What to tell of an image with um per pixel of [x, y]; empty where its pixels are squares. */
export function squeezedNote(sides) {
  if (!sides) return "";
  const [x, y] = sides;
  const [axis, times] = x < y ? ["height", y / x] : ["width", x / y];
  return `Its pixels are not squares. Each is shown as one, so the ${axis} should look ${Number(times.toPrecision(3))} times as large. The scale bar holds along rows.`;
}

/** Um per pixel, once or for each axis, for people. */
export function perPixel(sides) {
  return `${sides.map((side) => Number(side.toPrecision(4))).join(" × ")} µm per pixel`;
}

/** Put the read-out beside a place of the stage, in CSS pixels. */
export function placeBeside(readout, { x, y }, { clientWidth, clientHeight }) {
  const beside = (at, size, limit) => Math.max(4, at + 18 + size > limit ? at - 18 - size : at + 18);
  const left = beside(x, readout.offsetWidth, clientWidth);
  const top = beside(y, readout.offsetHeight, clientHeight);
  readout.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
}

/** RGBA of a color such as #d62728, as a number of a canvas's pixels. */
export function rgbaOf(color) {
  const rgb = Number.parseInt(color.slice(1), 16);
  const bytes = new Uint8Array([rgb >> 16, (rgb >> 8) & 255, rgb & 255, 255]);
  return new Uint32Array(bytes.buffer)[0];
}

export function save(blob, name) {
  const address = URL.createObjectURL(blob);
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** Read, or write, what the browser keeps; it may refuse to keep anything. */
function stored(storage, name, value) {
  try {
    if (value !== undefined) storage.setItem(name, value);
    return storage.getItem(name);
  } catch {
    return null;
  }
}

/** How the pixels that were segmented differ from the file's, and other warnings of a result. */
export function showNotes(notes) {
  const text = notes.map((note) => note.replace(/\.$/, "")).join("; "); // some are sentences
  $("notes").textContent = notes.length ? `As segmented: ${text}.` : "";
  $("notes").hidden = !notes.length;
}

/**
 * Give the service the key that this tab knows, and set up the dialog that asks for one.
 *
 * @param {{key: string}} service
 * @param {() => void} onKey called with each new key
 * @returns {(then: (() => void) | null) => void} asks for a key, and then calls `then`
 */
export function setUpKey(service, onKey) {
  let after = null;
  const ask = (then) => {
    after = then;
    $("enter-key").hidden = false;
    $("key-message").textContent = service.key
      ? "The service does not know the key that was used. Check it, or ask whoever runs the service."
      : "Ask whoever runs the service for one. It is kept until this tab is closed.";
    $("key").value = service.key;
    if (!$("key-dialog").open) $("key-dialog").showModal();
    $("key").select();
  };
  $("enter-key").onclick = () => ask(null);
  $("key-cancel").onclick = () => $("key-dialog").close();
  $("key-form").addEventListener("submit", () => {
    service.key = $("key").value;
    stored(sessionStorage, KEY_ITEM, service.key);
    onKey();
    after?.();
  });
  service.key = stored(sessionStorage, KEY_ITEM) ?? "";
  return ask;
}

/** The system's theme, until another is chosen. */
export function setUpTheme() {
  const root = document.documentElement;
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ?? (systemIsDark.matches ? "dark" : "light")) === "dark";
  const show = () => ($("theme").textContent = isDark() ? "Light theme" : "Dark theme");
  $("theme").onclick = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored(localStorage, THEME_ITEM, root.dataset.theme);
    show();
  };
  systemIsDark.addEventListener("change", show);
  const chosen = stored(localStorage, THEME_ITEM);
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  show();
}
