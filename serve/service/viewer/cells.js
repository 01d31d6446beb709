/** A layer of labels over a slide, loaded and painted in tiles as they come into view. */

import { paintClasses, paintLowConfidence } from "./layers.js";

const MAX_TILES = 120;
const MAX_LOADING = 6;
const FINER = 0.75; // canvas pixels per cell from which the next finer level is shown

/**
 * A part of a result: its labels and confidence, cell by cell.
 *
 * @typedef {{labels: Uint8Array, confidence: Uint8Array, width: number, height: number}} Cells
 */

export class CellLayer {
  #source;
  #style;
  #onChange;
  #tiles = new Map();
  #loading = new Map();
  #failed = new Set();

  /**
   * @param {{width: number, height: number, tileSize: number, numLevels: number,
   *   load: (level: number, column: number, row: number, signal: AbortSignal) => Promise<Cells>}} source
   *   sizes in cells of level 0, the finest
   * @param {object} style of `paintClasses` and `paintLowConfidence`, read at each painting
   * @param {() => void} onChange called when there is more to draw
   */
  constructor(source, style, onChange) {
    this.#source = source;
    this.#style = style;
    this.#onChange = onChange;
  }

  /** Whether all that was in view at the last drawing is there. */
  get isComplete() {
    return this.#loading.size === 0;
  }

  /** Forget what is painted: it looks different now. */
  repaint() {
    for (const tile of this.#tiles.values()) tile.classes = tile.low = null;
  }

  /** Stop to load. */
  close() {
    for (const controller of this.#loading.values()) controller.abort();
    this.#loading.clear();
  }

  /**
   * Draw what is in view, and load what is missing.
   *
   * @param {CanvasRenderingContext2D} context
   * @param {"classes" | "low"} kind
   * @param {{x: number, y: number, scaleX: number, scaleY: number}} view where the corner of cell 0
   *   is, and how many canvas pixels a cell has
   */
  draw(context, kind, view) {
    const { numLevels, tileSize, width, height } = this.#source;
    const scale = Math.min(view.scaleX, view.scaleY);
    const level = Math.min(numLevels - 1, Math.max(0, Math.floor(Math.log2(FINER / scale) + 1)));
    const span = tileSize * 2 ** level;
    const range = (start, side, scaled, length) => [
      Math.max(0, Math.floor(-start / scaled / span)),
      Math.min(Math.ceil(length / span), Math.ceil((side - start) / scaled / span)),
    ];
    const [firstColumn, endColumn] = range(view.x, context.canvas.width, view.scaleX, width);
    const [firstRow, endRow] = range(view.y, context.canvas.height, view.scaleY, height);
    context.imageSmoothingEnabled = kind === "low" || scale * 2 ** level < 1;
    const missing = [];
    for (let row = firstRow; row < endRow; row++) {
      for (let column = firstColumn; column < endColumn; column++) {
        if (!this.#drawTile(context, kind, view, level, column, row)) missing.push([level, column, row]);
      }
    }
    if (kind === "classes") this.#loadOnly(missing);
  }

  /** What is at a cell of level 0, from the finest tile that is there; null where none is. */
  at(x, y) {
    const { numLevels, tileSize, width, height } = this.#source;
    if (x < 0 || y < 0 || x >= width || y >= height) return null;
    for (let level = 0; level < numLevels; level++) {
      const [column, row] = [x, y].map((place) => Math.floor(place / 2 ** level));
      const tile = this.#tiles.get(keyOf(level, Math.floor(column / tileSize), Math.floor(row / tileSize)));
      if (!tile) continue;
      const { cells } = tile;
      const at = (row % tileSize) * cells.width + (column % tileSize);
      return { label: cells.labels[at], confidence: cells.confidence[at] };
    }
    return null;
  }

  /** Draw a tile, or what a coarser one has in its place; returns whether it is the tile itself. */
  #drawTile(context, kind, view, level, column, row) {
    const { numLevels, tileSize, width, height } = this.#source;
    const span = tileSize * 2 ** level;
    const [left, top] = [column * span, row * span];
    const [right, bottom] = [Math.min(left + span, width), Math.min(top + span, height)];
    // Whole canvas pixels, else there would be seams between the tiles.
    const x = Math.round(view.x + left * view.scaleX);
    const y = Math.round(view.y + top * view.scaleY);
    const across = Math.round(view.x + right * view.scaleX) - x;
    const down = Math.round(view.y + bottom * view.scaleY) - y;
    for (let coarser = level; coarser < numLevels; coarser++) {
      const factor = 2 ** (coarser - level);
      const key = keyOf(coarser, Math.floor(column / factor), Math.floor(row / factor));
      const tile = this.#tiles.get(key);
      if (!tile) continue;
      this.#tiles.delete(key); // and behind the others: the first is the one not used for longest
      this.#tiles.set(key, tile);
      const size = 2 ** coarser;
      const [fromX, fromY] = [(left / size) % tileSize, (top / size) % tileSize];
      const picture = this.#painted(tile, kind);
      const [w, h] = [(right - left) / size, (bottom - top) / size];
      if (across > 0 && down > 0) context.drawImage(picture, fromX, fromY, w, h, x, y, across, down);
      return coarser === level;
    }
    return false;
  }

  #painted(tile, kind) {
    if (tile[kind]) return tile[kind];
    const { cells } = tile;
    const canvas = document.createElement("canvas");
    canvas.width = cells.width;
    canvas.height = cells.height;
    const data = new ImageData(cells.width, cells.height);
    const paint = kind === "low" ? paintLowConfidence(cells, this.#style) : paintClasses(cells, this.#style);
    const whole = { x: 0, y: 0, width: cells.width, height: cells.height, step: 1 };
    paint(new Uint32Array(data.data.buffer), whole);
    canvas.getContext("2d").putImageData(data, 0, 0);
    tile[kind] = canvas;
    return canvas;
  }

  /** Load these tiles, the middle ones first, and no others. */
  #loadOnly(places) {
    const wanted = new Map(places.map((place) => [keyOf(...place), place]));
    for (const [key, controller] of this.#loading) {
      if (wanted.has(key)) continue;
      controller.abort();
      this.#loading.delete(key);
    }
    for (const [key, place] of wanted) {
      if (this.#loading.size >= MAX_LOADING) return;
      if (!this.#loading.has(key) && !this.#failed.has(key)) this.#load(key, place);
    }
  }

  async #load(key, place) {
    const controller = new AbortController();
    this.#loading.set(key, controller);
    try {
      const cells = await this.#source.load(...place, controller.signal);
      this.#tiles.set(key, { cells, classes: null, low: null });
      if (this.#tiles.size > MAX_TILES) this.#tiles.delete(this.#tiles.keys().next().value);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.#failed.add(key); // its place shows a coarser one; a new look at the slide tries again
    }
    if (this.#loading.get(key) === controller) this.#loading.delete(key);
    this.#onChange();
  }
}

const keyOf = (level, column, row) => `${level}/${column}/${row}`;

/**
 * Cells in memory as the source of a layer.
 *
 * @param {Cells} cells
 */
export function sourceInMemory({ labels, confidence, width, height }) {
  const tileSize = 256;
  const numLevels = 1 + Math.max(0, Math.ceil(Math.log2(Math.max(width, height) / tileSize)));
  const load = async (level, column, row) => {
    const step = 2 ** level;
    const [left, top] = [column * tileSize, row * tileSize];
    const w = Math.min(tileSize, Math.ceil(width / step) - left);
    const h = Math.min(tileSize, Math.ceil(height / step) - top);
    const part = { labels: new Uint8Array(w * h), confidence: new Uint8Array(w * h), width: w, height: h };
    for (let y = 0; y < h; y++) {
      for (let x = 0; x < w; x++) {
        const at = (top + y) * step * width + (left + x) * step;
        part.labels[y * w + x] = labels[at];
        part.confidence[y * w + x] = confidence[at];
      }
    }
    return part;
  };
  return { width, height, tileSize, numLevels, load };
}
