/** How the classes are laid over a picture: the style, and the hatching where confidence is low. */

const HATCH_PERIOD = 8; // CSS pixels

/**
 * @typedef {object} Style
 * @property {Uint32Array} colors RGBA by label, 0 for what is not shown
 * @property {boolean} outline draw outlines instead of areas
 * @property {number} opacity 0 to 1
 * @property {boolean} shown whether anything is drawn at all
 * @property {boolean} hatched hatch where confidence is low
 * @property {number} limit confidence bytes below it are low
 */

/** @returns {Style} */
export function newStyle() {
  return { colors: new Uint32Array(256), outline: false, opacity: 0.5, shown: true, hatched: true, limit: 128 };
}

/** A canvas as large as the picture's, for drafts of the hatching. */
export function newDraft() {
  return document.createElement("canvas").getContext("2d");
}

/**
 * Lay classes and hatching over what is drawn.
 *
 * @param {CanvasRenderingContext2D} context to draw on
 * @param {CanvasRenderingContext2D} draft of the same size
 * @param {{x: number, y: number, ratio: number}} place canvas pixels where the stripes begin, and
 *   canvas pixels for one CSS pixel
 * @param {Style} style
 * @param {(context: CanvasRenderingContext2D, kind: "classes" | "low") => void} draw one of the layers
 */
export function drawOverlay(context, draft, place, { outline, opacity, hatched }, draw) {
  const hatch = () => {
    const { width, height } = draft.canvas;
    draft.clearRect(0, 0, width, height);
    draw(draft, "low");
    const pattern = draft.createPattern(stripes(HATCH_PERIOD * place.ratio), "repeat");
    pattern.setTransform(new DOMMatrix().translate(Math.round(place.x), Math.round(place.y)));
    draft.globalCompositeOperation = "source-in";
    draft.fillStyle = pattern;
    draft.fillRect(0, 0, width, height);
    draft.globalCompositeOperation = "source-over";
    context.drawImage(draft.canvas, 0, 0);
  };
  if (hatched && outline) hatch();
  context.globalAlpha = outline ? Math.min(1, 2 * opacity) : opacity; // thin lines need more
  draw(context, "classes");
  context.globalAlpha = 1;
  if (hatched && !outline) hatch();
}

/** A square of diagonal stripes, dark beside light: seen on every colour. */
function stripes(period) {
  const size = Math.max(4, Math.round(period));
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  for (const [color, shift] of [["rgb(255 255 255 / 70%)", 0], ["rgb(20 22 26 / 60%)", size / 5]]) {
    context.strokeStyle = color;
    context.lineWidth = size / 7;
    context.beginPath();
    for (const start of [-size, 0, size]) {
      context.moveTo(start + shift - 1, size + 1);
      context.lineTo(start + shift + size + 1, -1);
    }
    context.stroke();
  }
  return canvas;
}
