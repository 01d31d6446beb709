/** The table of classes and the controls of the overlay, on the page of images and that of slides. */

import { $, element, percent, rgbaOf, swatch } from "./page.js";

/**
 * A class of a result, as the table shows it.
 *
 * @typedef {{label: number, name: string, color: string, share: number, cells: string[]}} Row
 */

/** Shows the rows, and tells the view what the controls say. */
export class Classes {
  #rows = [];
  #view;
  #style = {};

  /** @param {{setStyle: (change: Partial<import("./overlay.js").Style>) => void}} view */
  constructor(view) {
    this.#view = view;
    for (const id of ["opacity", "threshold"]) $(id).addEventListener("input", () => this.apply());
    for (const id of ["hatch", "classes"]) $(id).addEventListener("change", () => this.apply());
    for (const radio of document.querySelectorAll("[name=drawing]")) {
      radio.addEventListener("change", () => this.apply());
    }
    for (const [id, checked] of [["all", true], ["none", false]]) {
      $(id).onclick = () => {
        for (const check of this.#checks) check.checked = checked;
        this.apply();
      };
    }
  }

  /** What is shown of a label; undefined where it is none of the classes. */
  of(label) {
    return this.#rows.find((row) => row.label === label);
  }

  /** The confidence byte below which confidence is low. */
  get limit() {
    return Math.ceil(($("threshold").value / 100) * 255);
  }

  /**
   * Fill the table.
   *
   * @param {Row[]} rows
   * @param {{keepChoice?: boolean}} [options] `keepChoice`: classes that are not shown stay so
   */
  fill(rows, { keepChoice = false } = {}) {
    const chosen = new Map(keepChoice ? this.#checks.map((check) => [Number(check.value), check.checked]) : []);
    this.#rows = rows;
    $("classes").replaceChildren(...rows.map((row) => tableRow(row, chosen.get(row.label) ?? true)));
    $("composition").replaceChildren(
      ...rows.filter((row) => row.share).map((row) =>
        shareOf(row, element("span", { title: `${row.name} ${percent(row.share, 1)}` })),
      ),
    );
    const shares = rows.map((row) => `${row.name} ${percent(row.share, 1)}`).join(", ");
    $("composition").setAttribute("aria-label", `Share by class: ${shares}`);
    this.apply();
  }

  /** Draw as the controls say. */
  apply() {
    const opacity = $("opacity").value / 100;
    $("opacity-value").textContent = percent(opacity);
    $("threshold-value").textContent = percent($("threshold").value / 100);
    $("threshold").disabled = !$("hatch").checked;
    const colors = new Uint32Array(256);
    const shown = new Set(this.#checks.filter((check) => check.checked).map((check) => Number(check.value)));
    for (const { label, color } of this.#rows) if (shown.has(label)) colors[label] = rgbaOf(color);
    const outline = document.querySelector("[name=drawing]:checked").value === "outline";
    const style = { colors, outline, opacity, hatched: $("hatch").checked, limit: this.limit };
    // Only what has changed: other colours or limits are painted again.
    const changed = Object.entries(style).filter(([name, value]) => String(value) !== String(this.#style[name]));
    this.#style = style;
    this.#view.setStyle(Object.fromEntries(changed));
  }

  /** Show the overlay, or hide it. */
  toggle() {
    const shown = $("show-overlay").getAttribute("aria-pressed") !== "true";
    $("show-overlay").setAttribute("aria-pressed", String(shown));
    this.#view.setStyle({ shown });
  }

  get #checks() {
    return [...$("classes").querySelectorAll("input")];
  }
}

function tableRow(row, isShown) {
  const check = element("input", { type: "checkbox", value: row.label, "aria-label": `Show ${row.name}` });
  check.checked = isShown;
  const name = element("span", { className: "name", text: row.name });
  const bar = shareOf(row, element("span", { className: "bar" }));
  return element(
    "tr",
    { className: row.share ? "" : "absent" },
    element("th", { scope: "row" }, element("label", {}, check, swatch(row.color), name), bar),
    ...row.cells.map((text) => element("td", { text })),
  );
}

function shareOf({ share, color }, part) {
  part.style.setProperty("--share", share);
  part.style.setProperty("--class-color", color);
  return part;
}
