/** The image with its layers on a canvas, and how people move and zoom it. */

import { TileLayer, paintClasses, paintLowConfidence } from "./layers.js";
import { drawOverlay, newDraft, newStyle } from "./overlay.js";
import { moveByKey } from "./tools.js";

const MAX_SCALE = 40; // canvas pixels for one of the image's
const MARGIN = 20;
const MARGIN_BELOW = 72; // where the buttons are
const SMOOTH_BELOW = 4; // above it people want to see the pixels
const HALVE_ABOVE_PX = 2048;
const BLOCK_PX = 2048;

/**
 * Fires `view` when the view has changed, and `point` with the detail `{x, y, label, confidence}`,
 * or null, when another pixel is pointed at: `x` and `y` are CSS pixels on the stage.
 */
export class Stage extends EventTarget {
  #element;
  #canvas;
  #context;
  #draft = newDraft();
  #size = null;
  #image = [];
  #result = null;
  #layers = null;
  #style = newStyle();
  #view = { x: 0, y: 0, scale: 1 };
  #fitted = true;
  #frame = 0;
  #pointers = new Map();

  /** @param {HTMLElement} element takes the keyboard and the pointer; has a canvas in it */
  constructor(element) {
    super();
    this.#element = element;
    this.#canvas = element.querySelector("canvas");
    this.#context = this.#canvas.getContext("2d");
    new ResizeObserver(() => this.#resize()).observe(element);
    element.addEventListener("wheel", (event) => this.#onWheel(event), { passive: false });
    element.addEventListener("keydown", (event) => this.#onKey(event));
    element.addEventListener("dblclick", (event) => this.zoomBy(2, this.#local(event)));
    element.addEventListener("pointerdown", (event) => this.#onPointerDown(event));
    element.addEventListener("pointermove", (event) => this.#onPointerMove(event));
    for (const kind of ["pointerup", "pointercancel"]) {
      element.addEventListener(kind, (event) => this.#onPointerUp(event));
    }
    element.addEventListener("pointerleave", () => this.#point(null));
  }

  /** Image pixels across one CSS pixel, or null without an image. */
  get pixelsPerCssPixel() {
    return this.#size ? this.#ratio / this.#view.scale : null;
  }

  get #ratio() {
    return window.devicePixelRatio || 1;
  }

  /** Take everything off. */
  clear() {
    this.#size = this.#result = this.#layers = null;
    for (const bitmap of this.#image) bitmap.close();
    this.#image = [];
    this.#point(null);
    this.#changed();
  }

  /**
   * Show an image.
   *
   * @param {ImageBitmap | null} bitmap null: grey stands for an image that cannot be shown
   * @param {{width: number, height: number}} size in pixels
   */
  setImage(bitmap, { width, height }) {
    const moved = this.#size?.width !== width || this.#size?.height !== height;
    for (const old of this.#image) old.close();
    this.#image = bitmap ? [bitmap] : [];
    this.#size = { width, height };
    if (moved) this.fit();
    this.#changed();
    if (bitmap) this.#addHalves(this.#image);
  }

  /** @param {{labels: Uint8Array, confidence: Uint8Array, width: number, height: number}} result */
  setResult(result) {
    this.#result = result;
    this.#layers = {
      classes: new TileLayer(result, paintClasses(result, this.#style)),
      low: new TileLayer(result, paintLowConfidence(result, this.#style), { soft: true }),
    };
    this.#changed();
  }

  /**
   * Change how the result looks.
   *
   * @param {Partial<import("./overlay.js").Style>} change
   */
  setStyle(change) {
    Object.assign(this.#style, change);
    if ("colors" in change || "outline" in change) this.#layers?.classes.clear();
    if ("colors" in change || "limit" in change) this.#layers?.low.clear();
    this.#changed();
  }

  /** Show the whole image. */
  fit() {
    if (!this.#size) return;
    const { width, height } = this.#canvas;
    const margin = MARGIN * this.#ratio;
    const free = height - margin - MARGIN_BELOW * this.#ratio;
    const scale = Math.min(
      Math.max(1, width - 2 * margin) / this.#size.width,
      Math.max(1, free) / this.#size.height,
      8 * this.#ratio,
    );
    this.#view.scale = scale;
    this.#view.x = (width - this.#size.width * scale) / 2;
    this.#view.y = margin + (free - this.#size.height * scale) / 2;
    this.#fitted = true;
    this.#changed();
  }

  /** One image pixel for each pixel of the screen. */
  actualSize() {
    this.zoomBy(1 / this.#view.scale);
  }

  /**
   * @param {number} factor above 1 magnifies
   * @param {{x: number, y: number}} [around] the CSS pixel that stays where it is
   */
  zoomBy(factor, around = this.#centre()) {
    if (!this.#size) return;
    const view = this.#view;
    const fitting = Math.min(
      this.#canvas.width / this.#size.width,
      this.#canvas.height / this.#size.height,
    );
    const scale = Math.min(
      Math.max(view.scale * factor, Math.min(fitting / 2, 1)),
      Math.max(MAX_SCALE, fitting),
    );
    const [x, y] = [around.x * this.#ratio, around.y * this.#ratio];
    view.x = x - ((x - view.x) * scale) / view.scale;
    view.y = y - ((y - view.y) * scale) / view.scale;
    view.scale = scale;
    this.#moved();
  }

  /** Move the image by CSS pixels. */
  panBy(x, y) {
    this.#view.x += x * this.#ratio;
    this.#view.y += y * this.#ratio;
    this.#moved();
  }

  /** Say what is under the middle of the stage, where the keyboard points. */
  pointAtCentre() {
    this.#point(this.#centre());
  }

  /**
   * The whole image as it is shown now, pixel by pixel, as a PNG.
   *
   * @returns {Promise<Blob>} rejected where the image is too large for the browser
   */
  async picture() {
    const { width, height } = this.#size;
    const whole = new OffscreenCanvas(width, height).getContext("2d");
    // In blocks: the hatching needs another canvas, which would be as large.
    const [context, draft] = [0, 1].map(() => new OffscreenCanvas(BLOCK_PX, BLOCK_PX).getContext("2d"));
    for (let y = 0; y < height; y += BLOCK_PX) {
      for (let x = 0; x < width; x += BLOCK_PX) {
        this.#drawOn({ context, draft, view: { x: -x, y: -y, scale: 1 }, ratio: 1 });
        whole.drawImage(context.canvas, x, y);
      }
    }
    return whole.canvas.convertToBlob();
  }

  /** Put halved bitmaps behind the first: faster to draw when zoomed out, and without moire. */
  async #addHalves(levels) {
    let last = levels[0];
    while (Math.max(last.width, last.height) > HALVE_ABOVE_PX) {
      const size = { resizeWidth: Math.ceil(last.width / 2), resizeHeight: Math.ceil(last.height / 2) };
      last = await createImageBitmap(last, { ...size, resizeQuality: "medium" }).catch(() => null);
      if (levels !== this.#image || !last) return; // another image has come, or memory is short
      levels.push(last);
    }
    this.#changed();
  }

  #moved() {
    if (!this.#size) return;
    const { width, height } = this.#canvas;
    const view = this.#view;
    // The middle of the stage stays on the image: it cannot get lost, and the keyboard points there.
    view.x = Math.min(width / 2 - 1, Math.max(width / 2 + 1 - this.#size.width * view.scale, view.x));
    view.y = Math.min(height / 2 - 1, Math.max(height / 2 + 1 - this.#size.height * view.scale, view.y));
    this.#fitted = false;
    this.#changed();
  }

  #changed() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
      this.dispatchEvent(new Event("view"));
    });
  }

  #resize() {
    const { clientWidth, clientHeight } = this.#element;
    const [width, height] = [clientWidth, clientHeight].map((size) =>
      Math.max(1, Math.round(size * this.#ratio)),
    );
    if (width === this.#canvas.width && height === this.#canvas.height) return;
    this.#view.x += (width - this.#canvas.width) / 2;
    this.#view.y += (height - this.#canvas.height) / 2;
    this.#canvas.width = this.#draft.canvas.width = width;
    this.#canvas.height = this.#draft.canvas.height = height;
    if (this.#fitted) this.fit();
    this.#draw(); // at once: the canvas has just been emptied
    this.dispatchEvent(new Event("view"));
  }

  #draw() {
    this.#drawOn({ context: this.#context, draft: this.#draft, view: this.#view, ratio: this.#ratio });
  }

  #drawOn({ context, draft, view, ratio }) {
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    if (!this.#size) return;
    this.#drawImage(context, view);
    if (!this.#layers || !this.#style.shown) return;
    const draw = (surface, kind) => this.#layers[kind].draw(surface, view);
    drawOverlay(context, draft, { ...view, ratio }, this.#style, draw);
  }

  #drawImage(context, { x, y, scale }) {
    const left = Math.round(x);
    const top = Math.round(y);
    const width = Math.round(x + this.#size.width * scale) - left;
    const height = Math.round(y + this.#size.height * scale) - top;
    context.fillStyle = this.#image.length ? "#fff" : "#a8adb4"; // white: what is transparent
    context.fillRect(left, top, width, height);
    const level = Math.min(this.#image.length - 1, Math.max(0, Math.floor(Math.log2(1 / scale))));
    if (level < 0) return;
    context.imageSmoothingEnabled = scale < SMOOTH_BELOW;
    context.drawImage(this.#image[level], left, top, width, height);
  }

  #centre() {
    return { x: this.#element.clientWidth / 2, y: this.#element.clientHeight / 2 };
  }

  #local(event) {
    const { left, top } = this.#element.getBoundingClientRect();
    return { x: event.clientX - left, y: event.clientY - top };
  }

  #point(place) {
    let detail = null;
    if (place && this.#result) {
      const { width, height, labels, confidence } = this.#result;
      const x = Math.floor((place.x * this.#ratio - this.#view.x) / this.#view.scale);
      const y = Math.floor((place.y * this.#ratio - this.#view.y) / this.#view.scale);
      if (x >= 0 && y >= 0 && x < width && y < height) {
        const at = y * width + x;
        detail = { ...place, column: x, row: y, label: labels[at], confidence: confidence[at] };
      }
    }
    this.dispatchEvent(new CustomEvent("point", { detail }));
  }

  #onWheel(event) {
    if (!this.#size) return;
    event.preventDefault();
    const pixels = event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1);
    const speed = event.ctrlKey ? 0.01 : 0.0016; // a trackpad's pinch comes as Ctrl and small steps
    this.zoomBy(Math.exp(-pixels * speed), this.#local(event));
    this.#point(this.#local(event));
  }

  #onKey(event) {
    if (!this.#size || !moveByKey(event, this, (x, y) => this.panBy(-x, -y))) return;
    this.pointAtCentre();
  }

  #onPointerDown(event) {
    if (event.button !== 0 || !this.#size) return;
    this.#element.setPointerCapture(event.pointerId);
    this.#pointers.set(event.pointerId, this.#local(event));
    this.#point(this.#local(event));
  }

  #onPointerMove(event) {
    const now = this.#local(event);
    const before = this.#pointers.get(event.pointerId);
    if (!before) {
      this.#point(now);
      return;
    }
    const [other] = [...this.#pointers].filter(([id]) => id !== event.pointerId);
    this.#pointers.set(event.pointerId, now);
    if (other) this.#pinch(before, now, other[1]);
    else if (now.x !== before.x || now.y !== before.y) this.panBy(now.x - before.x, now.y - before.y);
    this.#point(null);
  }

  /** One finger has moved while the other held still. */
  #pinch(before, now, other) {
    const distance = (point) => Math.hypot(point.x - other.x, point.y - other.y);
    this.panBy((now.x - before.x) / 2, (now.y - before.y) / 2);
    const middle = { x: (now.x + other.x) / 2, y: (now.y + other.y) / 2 };
    this.zoomBy(distance(now) / Math.max(1, distance(before)), middle);
  }

  #onPointerUp(event) {
    this.#pointers.delete(event.pointerId);
    if (event.type === "pointerup" && event.pointerType === "mouse") this.#point(this.#local(event));
  }
}
