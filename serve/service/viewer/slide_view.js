/** A slide on the stage: OpenSeadragon shows it, and layers of labels lie over it. */

import { CellLayer } from "./cells.js";
import { drawOverlay, newDraft, newStyle } from "./overlay.js";
import { moveByKey } from "./tools.js";

const THUMBNAIL_SHARE = 0.16;

/**
 * Fires `view` when the view has changed; `point` with `{x, y, px, py, label, confidence}` or null
 * when another place is pointed at, x and y in CSS pixels, px and py in the slide's level 0; and
 * `region` with `{x, y, width, height}` of level 0 when one was drawn; and `tile-failed` when a part of
 * the slide cannot be read.
 */
export class SlideView extends EventTarget {
  #element;
  #library = null;
  #viewer = null;
  #slide = null;
  #context = document.createElement("canvas").getContext("2d");
  #draft = newDraft();
  #layers = [];
  #style = newStyle();
  #region = null;
  #drag = null;

  /** @param {HTMLElement} element has `.osd`, `.draw` and `.region-box` in it */
  constructor(element) {
    super();
    this.#element = element;
    this.#context.canvas.className = "overlay";
    element.addEventListener("keydown", (event) => this.#onKey(event));
    element.addEventListener("pointermove", (event) => this.#point(this.#local(event)));
    element.addEventListener("pointerleave", () => this.#point(null));
    new ResizeObserver(() => this.#draw()).observe(element);
    const draw = element.querySelector(".draw");
    draw.addEventListener("pointerdown", (event) => this.#beginRegion(event));
    draw.addEventListener("pointermove", (event) => this.#dragRegion(event));
    draw.addEventListener("pointerup", (event) => this.#endRegion(event));
    draw.addEventListener("pointercancel", () => this.#cancelRegion());
  }

  /** Pixels of the slide's level 0 across one CSS pixel, or null without a slide. */
  get pixelsPerCssPixel() {
    const place = this.#place();
    return place && 1 / place.scale;
  }

  /** Whether the slide and its layers are there as far as they are in view. */
  get isComplete() {
    const image = this.#viewer?.world.getItemAt(0);
    return Boolean(image?.getFullyLoaded()) && this.#layers.every(({ layer }) => layer.isComplete);
  }

  /**
   * Show a slide.
   *
   * @param {object} OpenSeadragon the library
   * @param {object} slide as /slides/ID describes it
   * @param {string} tilesUrl of its tiles
   * @param {string} key of the service, or ""
   */
  open(OpenSeadragon, slide, tilesUrl, key) {
    this.close();
    this.#library = OpenSeadragon;
    this.#slide = slide;
    const { tiles } = slide;
    this.#viewer = new OpenSeadragon.Viewer({
      element: this.#element.querySelector(".osd"),
      drawer: "canvas",
      tabIndex: -1,
      keyboardNavEnabled: false,
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "TOP_RIGHT",
      navigatorSizeRatio: THUMBNAIL_SHARE,
      navigatorAutoFade: false,
      navigatorBackground: "#fff",
      navigatorOpacity: 1,
      navigatorDisplayRegionColor: "#1b4f8a",
      animationTime: matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.5,
      visibilityRatio: 0.3,
      maxZoomPixelRatio: 20,
      minZoomImageRatio: 0.7,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      loadTilesWithAjax: Boolean(key),
      ajaxHeaders: key ? { "X-API-Key": key } : {},
      tileSources: {
        width: tiles.width_px,
        height: tiles.height_px,
        tileSize: tiles.tile_px,
        tileOverlap: tiles.overlap_px,
        minLevel: Math.min(7, tiles.num_levels - 1),
        maxLevel: tiles.num_levels - 1,
        getTileUrl: (level, x, y) => `${tilesUrl}/${level}/${x}_${y}.jpeg?v=${tiles.version}`,
      },
    });
    this.#viewer.canvas.append(this.#context.canvas); // below the navigator
    this.#viewer.addHandler("update-viewport", () => this.#draw());
    this.#viewer.addHandler("open", () => this.#draw());
    this.#viewer.addHandler("tile-load-failed", () => this.dispatchEvent(new Event("tile-failed")));
  }

  /** Take everything off. */
  close() {
    this.setLayers([]);
    this.#context.canvas.remove();
    this.#viewer?.destroy();
    this.#viewer = this.#slide = null;
    this.showRegion(null);
    this.#draw();
  }

  /**
   * Show labels over the slide, the last on top.
   *
   * @param {{source: object, origin: [number, number], cell: [number, number]}[]} layers `source` of
   *   a `CellLayer`; `origin` and `cell` in pixels of the slide's level 0, x first
   */
  setLayers(layers) {
    for (const { layer } of this.#layers) layer.close();
    this.#layers = layers.map(({ source, origin, cell }) => ({
      layer: new CellLayer(source, this.#style, () => this.#draw()),
      origin,
      cell,
      size: [source.width, source.height],
    }));
    this.#draw();
  }

  /** Change how the layers look; see `Stage.setStyle`. */
  setStyle(change) {
    Object.assign(this.#style, change);
    if ("colors" in change || "outline" in change || "limit" in change) {
      for (const { layer } of this.#layers) layer.repaint();
    }
    this.#draw();
  }

  /** Where a pixel of level 0 is on the stage, in CSS pixels. */
  onStage(px, py) {
    const { x, y, scale } = this.#place();
    return { x: x + px * scale, y: y + py * scale };
  }

  fit() {
    this.#viewer?.viewport.goHome();
  }

  /** One pixel of level 0 for each pixel of the screen. */
  actualSize() {
    const place = this.#place();
    if (place) this.zoomBy(1 / (place.scale * this.#ratio));
  }

  zoomBy(factor) {
    this.#viewer?.viewport.zoomBy(factor);
    this.#viewer?.viewport.applyConstraints();
  }

  /** Move the view by CSS pixels. */
  panBy(x, y) {
    if (!this.#viewer) return;
    const { viewport } = this.#viewer;
    viewport.panBy(viewport.deltaPointsFromPixels(this.#xy(x, y)));
    viewport.applyConstraints();
  }

  /** Say what is under the middle of the stage, where the keyboard points. */
  pointAtCentre() {
    this.#point({ x: this.#element.clientWidth / 2, y: this.#element.clientHeight / 2 });
  }

  /** Let the next drag draw a region, or not. */
  set drawing(on) {
    this.#element.classList.toggle("drawing", on);
  }

  get drawing() {
    return this.#element.classList.contains("drawing");
  }

  /** The part of the slide that is in view, in whole pixels of level 0; null where none is. */
  regionInView() {
    const { clientWidth, clientHeight } = this.#element;
    return this.#within(this.#toSlide({ x: 0, y: 0 }), this.#toSlide({ x: clientWidth, y: clientHeight }));
  }

  /** Show where a region is, or take the last one off. */
  showRegion(region) {
    this.#region = region;
    this.#placeRegion();
  }

  #xy(x, y) {
    return new this.#library.Point(x, y);
  }

  get #ratio() {
    return window.devicePixelRatio || 1;
  }

  /** Where pixel (0, 0) of level 0 is in CSS pixels, and how many of these one has. */
  #place() {
    const image = this.#viewer?.world.getItemAt(0);
    if (!image) return null;
    const [first, last] = [0, this.#slide.tiles.width_px].map((x) =>
      image.imageToViewerElementCoordinates(this.#xy(x, 0)),
    );
    const scale = (last.x - first.x) / this.#slide.tiles.width_px;
    const [left, top] = this.#slide.tiles.origin_px;
    return { x: first.x - left * scale, y: first.y - top * scale, scale };
  }

  #toSlide({ x, y }) {
    const place = this.#place();
    return { x: (x - place.x) / place.scale, y: (y - place.y) / place.scale };
  }

  /** The rectangle of two corners, cut to the slide. */
  #within(one, other) {
    const { origin_px: [left, top], width_px: width, height_px: height } = this.#slide.tiles;
    const cut = (a, b, low, length) => [
      Math.max(low, Math.floor(Math.min(a, b))),
      Math.min(low + length, Math.ceil(Math.max(a, b))),
    ];
    const [x, right] = cut(one.x, other.x, left, width);
    const [y, bottom] = cut(one.y, other.y, top, height);
    return right > x && bottom > y ? { x, y, width: right - x, height: bottom - y } : null;
  }

  #draw() {
    const ratio = this.#ratio;
    const { clientWidth, clientHeight } = this.#element;
    const { canvas } = this.#context;
    const [width, height] = [clientWidth, clientHeight].map((side) => Math.max(1, Math.round(side * ratio)));
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = this.#draft.canvas.width = width;
      canvas.height = this.#draft.canvas.height = height;
    }
    this.#context.clearRect(0, 0, width, height);
    const place = this.#place();
    if (place && this.#style.shown) {
      for (const layer of this.#layers) this.#drawLayer(layer, place, ratio);
    }
    this.#placeRegion();
    this.dispatchEvent(new Event("view"));
  }

  #drawLayer({ layer, origin, cell, size }, place, ratio) {
    const scale = place.scale * ratio;
    const view = {
      x: place.x * ratio + origin[0] * scale,
      y: place.y * ratio + origin[1] * scale,
      scaleX: cell[0] * scale,
      scaleY: cell[1] * scale,
    };
    const context = this.#context;
    const corner = [view.x, view.y, size[0] * view.scaleX, size[1] * view.scaleY];
    if (this.#layers.length > 1) context.clearRect(...corner); // what is below does not shine through
    const draw = (surface, kind) => layer.draw(surface, kind, view);
    drawOverlay(context, this.#draft, { ...view, ratio }, this.#style, draw);
  }

  #local(event) {
    const { left, top } = this.#element.getBoundingClientRect();
    return { x: event.clientX - left, y: event.clientY - top };
  }

  #point(at) {
    let detail = null;
    if (at && this.#viewer && this.#place()) {
      const { x: px, y: py } = this.#toSlide(at);
      const { origin_px: [left, top], width_px: width, height_px: height } = this.#slide.tiles;
      if (px >= left && py >= top && px < left + width && py < top + height) {
        detail = { ...at, px: Math.floor(px), py: Math.floor(py), ...this.#found(px, py) };
      }
    }
    this.dispatchEvent(new CustomEvent("point", { detail }));
  }

  #found(px, py) {
    for (const { layer, origin, cell } of [...this.#layers].reverse()) {
      const found = layer.at(Math.floor((px - origin[0]) / cell[0]), Math.floor((py - origin[1]) / cell[1]));
      if (found) return found;
    }
    return { label: null, confidence: null };
  }

  #onKey(event) {
    if (!this.#viewer || !moveByKey(event, this, (x, y) => this.panBy(x, y))) return;
    setTimeout(() => this.pointAtCentre(), 600); // when the movement has ended
  }

  #beginRegion(event) {
    if (event.button !== 0 || !this.#place()) return;
    event.target.setPointerCapture(event.pointerId);
    this.#drag = this.#toSlide(this.#local(event));
  }

  #dragRegion(event) {
    if (this.#drag) this.showRegion(this.#within(this.#drag, this.#toSlide(this.#local(event))));
  }

  #endRegion(event) {
    if (!this.#drag) return;
    this.#dragRegion(event);
    this.#drag = null;
    this.drawing = false;
    this.dispatchEvent(new CustomEvent("region", { detail: this.#region }));
  }

  #cancelRegion() {
    this.#drag = null;
    this.showRegion(null);
  }

  #placeRegion() {
    const box = this.#element.querySelector(".region-box");
    const place = this.#region && this.#place();
    box.hidden = !place;
    if (!place) return;
    const { x, y, width, height } = this.#region;
    box.style.transform = `translate(${place.x + x * place.scale}px, ${place.y + y * place.scale}px)`;
    box.style.width = `${width * place.scale}px`;
    box.style.height = `${height * place.scale}px`;
  }
}
