/** A layer over the image, painted in tiles when they come into view: any size stays smooth. */

const TILE_SIZE = 512;
const MAX_TILES = 160;
const OUTLINE_WIDTH = 2;

/**
 * Paints one tile: `pixels` RGBA, row by row; pixel (column, row) of the tile stands for the image's
 * pixel at (x + column * step, y + row * step).
 *
 * @typedef {(pixels: Uint32Array, tile: {x: number, y: number, width: number, height: number,
 *   step: number}) => void} Paint
 */

export class TileLayer {
  #tiles = new Map();
  #paint;
  #size;
  #soft;

  /**
   * @param {{width: number, height: number}} size of the image in pixels
   * @param {Paint} paint
   * @param {{soft?: boolean}} [options] `soft`: edges are smooth when magnified, else they show pixels
   */
  constructor(size, paint, { soft = false } = {}) {
    this.#size = size;
    this.#paint = paint;
    this.#soft = soft;
  }

  /** Forget what is painted: it looks different now. */
  clear() {
    this.#tiles.clear();
  }

  /**
   * Draw what is in view.
   *
   * @param {CanvasRenderingContext2D} context
   * @param {{x: number, y: number, scale: number}} view where the image's corner is and how many
   *   canvas pixels one image pixel has
   */
  draw(context, { x, y, scale }) {
    const { width, height } = this.#size;
    const level = Math.max(0, Math.floor(Math.log2(1 / scale)));
    const span = TILE_SIZE * 2 ** level;
    const first = (offset) => Math.max(0, Math.floor(-offset / scale / span));
    const last = (offset, canvas, image) =>
      Math.min(Math.ceil(image / span), Math.ceil((canvas - offset) / scale / span));
    context.imageSmoothingEnabled = this.#soft || scale < 1;
    const rowEnd = last(y, context.canvas.height, height);
    const columnEnd = last(x, context.canvas.width, width);
    for (let row = first(y); row < rowEnd; row++) {
      for (let column = first(x); column < columnEnd; column++) {
        // Whole canvas pixels, else there would be seams between the tiles.
        const left = Math.round(x + column * span * scale);
        const top = Math.round(y + row * span * scale);
        const right = Math.round(x + Math.min(width, (column + 1) * span) * scale);
        const bottom = Math.round(y + Math.min(height, (row + 1) * span) * scale);
        if (right > left && bottom > top) {
          context.drawImage(this.#tile(level, column, row), left, top, right - left, bottom - top);
        }
      }
    }
  }

  #tile(level, column, row) {
    const key = `${level}/${column}/${row}`;
    const tile = this.#tiles.get(key) ?? this.#paintTile(2 ** level, column, row);
    this.#tiles.delete(key); // and behind the others: the first is the one not used for longest
    this.#tiles.set(key, tile);
    if (this.#tiles.size > MAX_TILES) this.#tiles.delete(this.#tiles.keys().next().value);
    return tile;
  }

  #paintTile(step, column, row) {
    const [x, y] = [column * TILE_SIZE * step, row * TILE_SIZE * step];
    const tile = document.createElement("canvas");
    tile.width = Math.min(TILE_SIZE, Math.ceil((this.#size.width - x) / step));
    tile.height = Math.min(TILE_SIZE, Math.ceil((this.#size.height - y) / step));
    const data = new ImageData(tile.width, tile.height);
    const pixels = new Uint32Array(data.data.buffer);
    this.#paint(pixels, { x, y, width: tile.width, height: tile.height, step });
    tile.getContext("2d").putImageData(data, 0, 0);
    return tile;
  }
}

/**
 * Paints each class in its colour, filled or as an outline.
 *
 * @param {{labels: Uint8Array, width: number, height: number}} result
 * @param {{colors: Uint32Array, outline: boolean}} style read at each painting: RGBA by label
 * @returns {Paint}
 */
export function paintClasses({ labels, width, height }, style) {
  return (pixels, tile) => {
    const { colors, outline } = style;
    eachPixel(tile, width, height, (at, index, x, y) => {
      const label = labels[at];
      const reach = OUTLINE_WIDTH * tile.step;
      const inside =
        outline &&
        (x < reach || labels[at - reach] === label) &&
        (x + reach >= width || labels[at + reach] === label) &&
        (y < reach || labels[at - reach * width] === label) &&
        (y + reach >= height || labels[at + reach * width] === label);
      pixels[index] = inside ? 0 : colors[label];
    });
  };
}

/**
 * Paints the pixels whose confidence is below the limit, where their class is shown.
 *
 * @param {{labels: Uint8Array, confidence: Uint8Array, width: number, height: number}} result
 * @param {{colors: Uint32Array, limit: number}} style read at each painting
 * @returns {Paint}
 */
export function paintLowConfidence({ labels, confidence, width, height }, style) {
  return (pixels, tile) => {
    const { colors, limit } = style;
    eachPixel(tile, width, height, (at, index) => {
      pixels[index] = confidence[at] < limit && colors[labels[at]] ? 0xffffffff : 0;
    });
  };
}

/** Visit the image's pixel in the middle of each of the tile's. */
function eachPixel(tile, width, height, visit) {
  const middle = tile.step >> 1;
  let index = 0;
  for (let row = 0; row < tile.height; row++) {
    const y = Math.min(height - 1, tile.y + row * tile.step + middle);
    for (let column = 0; column < tile.width; column++) {
      const x = Math.min(width - 1, tile.x + column * tile.step + middle);
      visit(y * width + x, index++, x, y);
    }
  }
}
