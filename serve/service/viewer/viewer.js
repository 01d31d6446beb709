/** The page: choose an image, wait for the service, look at the answer, take it home. */

import { Classes } from "./classes.js";
import { Downloads } from "./downloads.js";
import { readNpz } from "./npz.js";
import { setUpOpening } from "./opening.js";
import {
  $,
  element,
  grouped,
  micrometres,
  perPixel,
  percent,
  setUpKey,
  setUpTheme,
  showNotes,
  showScale,
  speak,
  squeezedNote,
  swatch,
} from "./page.js";
import { Service, ServiceError } from "./service.js";
import { Stage } from "./stage.js";
import { setUpTools, showReadout } from "./tools.js";
import { patiently, refusal, startClock } from "./waiting.js";

const EXAMPLE = { path: "viewer/example.jpg", name: "synthetic-example.jpg", mpp: "0.5" };
const ASSUMED = "model (assumed)"; // the service's words for where an image's um per pixel is from
const UNKNOWN = "unknown";

const TITLE = document.title;
const service = new Service();
const stage = new Stage($("view"));
const classes = new Classes(stage);

const NOTHING = { file: null, bitmap: null, request: null, query: null, summary: null, histogram: null };
/** What is open: the file, its bitmap, the request under way, and the answer with its own query. */
const state = { ...NOTHING };
let manifest = null;
let mppHelp = "";

/* States ---------------------------------------------------------------------------------------- */

/** @param {"empty" | "bare" | "working" | "failed" | "done"} name `bare`: no picture behind it */
function show(name) {
  const pictureless = name === "working" || name === "failed" ? !state.bitmap : false;
  document.body.dataset.state = pictureless ? "bare" : name;
  $("progress").hidden = name !== "working";
  $("failure").hidden = name !== "failed";
  $("view").tabIndex = state.bitmap || name === "done" ? 0 : -1;
  $("readout").hidden = true;
}

function fail(error, retry) {
  const expected = error.title !== undefined;
  if (!expected) console.warn(error);
  const card = $("failure");
  card.querySelector("h2").textContent = error.title ?? "The answer cannot be read";
  card.querySelector("p").textContent = expected
    ? error.message
    : `${error.message}. Try again, or tell whoever runs the service.`;
  $("retry").hidden = expected && !error.mayPass && !error.asksForKey;
  $("retry").onclick = retry;
  show("failed");
  if (error.asksForKey) askForKey(retry);
}

/* One image ------------------------------------------------------------------------------------- */

/** Back to where nothing is open. */
function close() {
  const { request } = state;
  Object.assign(state, NOTHING);
  request?.abort();
  stage.clear();
  $("file-name").textContent = "No image yet";
  $("file-facts").textContent = "";
  $("mpp-help").textContent = mppHelp;
  showNotes([]);
  $("preview-note").hidden = true;
  downloads.close();
  document.title = TITLE;
  show("empty");
}

async function open(file, mpp) {
  close();
  state.file = file;
  takeMpp(mpp);
  $("file-name").textContent = file.name;
  document.title = `${file.name}: FocalPath`;
  const bitmap = await createImageBitmap(file).catch(() => null); // TIFF: the service shows it later
  if (state.file !== file) return;
  showBitmap(bitmap);
  await segment();
}

function showBitmap(bitmap) {
  state.bitmap = bitmap;
  if (bitmap) stage.setImage(bitmap, bitmap);
}

/** Ask for the segmentation of the open image, and show it. */
async function segment() {
  const { file } = state;
  const controller = new AbortController();
  state.request = controller;
  $("again").hidden = true;
  show("working");
  const clock = startClock();
  try {
    const query = mppQuery();
    const options = { query, signal: controller.signal, onProgress: clock.tell };
    const { response } = await patiently(() => service.post("arrays", file, options), clock, controller.signal);
    const result = await readResult(response);
    if (state.request !== controller) return;
    await ensurePicture(file, result, controller.signal);
    if (state.request !== controller) return;
    state.query = query; // the field may say something else by the time of a download
    present(result);
  } catch (error) {
    if (state.request !== controller) return;
    fail(error, segment);
  } finally {
    clock.stop();
  }
}

async function readResult(buffer) {
  const arrays = await readNpz(buffer);
  const [labels, confidence, json] = ["labels", "confidence", "summary"].map((name) => {
    if (!arrays.has(name)) throw new Error(`the answer has no ${name}`);
    return arrays.get(name);
  });
  const [height, width] = labels.shape;
  if (confidence.data.length !== width * height) throw new Error("labels and confidence differ in size");
  const summary = JSON.parse(new TextDecoder().decode(json.data));
  return { labels: labels.data, confidence: confidence.data, width, height, summary };
}

/**
 * Show the pixels that were segmented. The browser's own picture is those, unless the service had to
 * change what the file stores (turned it upright, converted its colours) or the browser reads another
 * size; then the service sends its picture.
 */
async function ensurePicture(file, { width, height, summary }, signal) {
  const isStored = !summary.image.notes?.length;
  if (isStored && state.bitmap?.width === width && state.bitmap.height === height) return;
  try {
    const { response } = await service.post("image", file, { signal });
    const bitmap = await createImageBitmap(new Blob([response], { type: "image/png" }));
    signal.throwIfAborted();
    showBitmap(bitmap);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    state.bitmap = null;
    stage.setImage(null, { width, height });
    $("preview-note").textContent = "This browser cannot show the image, so grey stands for it. The overlay is right.";
    $("preview-note").hidden = false;
  }
}

/* The answer ------------------------------------------------------------------------------------ */

function present(result) {
  const { summary } = result;
  state.summary = summary;
  state.histogram = new Uint32Array(256);
  for (const value of result.confidence) state.histogram[value]++;
  describeImage(summary.image);
  showModel(summary.model); // a newer one may have answered than was there when the page was opened
  $("threshold").value = Math.round(100 * (summary.low_confidence_threshold ?? 0.5));
  stage.setResult(result);
  fillClasses(summary.classes);
  describeLow();
  describeSmallest();
  show("done");
  const found = summary.classes.filter((row) => row.pixel_count > 0);
  speak(`Segmented ${state.file.name}. ${found.map((row) => `${row.name} ${percent(row.pixel_share)}`).join(", ")}.`);
}

/** um per pixel, where the request or the file says it; null where it is only assumed. */
function knownMpp() {
  const { mpp, mpp_source: source } = state.summary?.image ?? {};
  return source === ASSUMED || source === UNKNOWN ? null : (mpp ?? null);
}

function describeImage({ width_px: width, height_px: height, mpp, mpp_xy: sides, mpp_source: source, mpp_note: doubt, notes = [] }) {
  const known = knownMpp();
  const size = `${grouped(width)} × ${grouped(height)} px`;
  const extent = known ? ` · ${micrometres(width * (sides?.[0] ?? known))} × ${micrometres(height * (sides?.[1] ?? known))}` : "";
  $("file-facts").textContent = size + extent;
  showNotes(notes);
  const help = {
    request: `As you stated for this image. ${mppHelp}`,
    [ASSUMED]: `Not known: taken to be ${mpp}, what the model was trained at. If that is wrong, so are the labels.`,
    [UNKNOWN]: "Not known: neither the image nor the model says it.",
  };
  const stated = known && `The file says ${perPixel(sides ?? [mpp])} (${source}).`;
  const parts = [help[source] ?? stated, squeezedNote(sides), doubt?.replaceAll("um per", "µm per")];
  $("mpp-help").textContent = parts.filter(Boolean).join(" ");
}

function fillClasses(rows) {
  const total = rows.reduce((sum, row) => sum + (row.area_um2 ?? 0), 0);
  const [unit, perUnit] = total >= 1e5 ? ["mm²", 1e6] : ["µm²", 1];
  const area = (row) => {
    const value = row.area_um2 / perUnit;
    return perUnit === 1 ? grouped(value) : value.toFixed(3);
  };
  const header = document.querySelector("th.area");
  header.hidden = !total;
  header.textContent = `Area, ${unit}`;
  const cells = (row) => [
    percent(row.pixel_share, 1),
    ...(total ? [area(row)] : []),
    row.mean_confidence === null ? "–" : percent(row.mean_confidence),
    row.predicted_iou === null ? "–" : row.predicted_iou.toFixed(2),
  ];
  classes.fill(rows.map((row) => ({ ...row, share: row.pixel_share, cells: cells(row) })));
}

/** Say how much of the image is below the chosen confidence. */
function describeLow() {
  if (!state.histogram) return;
  const total = state.histogram.reduce((sum, count) => sum + count, 0);
  const low = state.histogram.slice(0, classes.limit).reduce((sum, count) => sum + count, 0);
  $("low-share").textContent = `${percent(low / total, 1)} of the image is below it.`;
}
$("threshold").addEventListener("input", describeLow);

/* On the stage ---------------------------------------------------------------------------------- */

stage.addEventListener("point", ({ detail }) => {
  const shown = document.body.dataset.state === "done" ? detail : null;
  showReadout(classes, shown, "Unlabelled", shown && `x ${shown.column}, y ${shown.row}`);
});

stage.addEventListener("view", () => {
  const across = stage.pixelsPerCssPixel;
  if (!across) return;
  $("zoom").textContent = `${Math.round(100 / across / devicePixelRatio)} %`;
  const mpp = document.body.dataset.state === "done" ? knownMpp() : null;
  const along = state.summary?.image.mpp_xy?.[0] ?? mpp; // the bar lies along a row
  showScale($("scale-bar"), mpp && along * across, Math.min(120, $("stage").clientWidth / 5));
});

setUpTools(stage, classes, () => Boolean(state.bitmap));

/* Panel ----------------------------------------------------------------------------------------- */

$("mpp").addEventListener("input", () => {
  $("mpp").dataset.forImage = state.file ? "this" : "next";
  $("again").hidden = !state.file || document.body.dataset.state !== "done";
});
$("mpp-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.file && document.body.dataset.state === "done") segment();
});

/** Take over a pixel size that is meant for the image being opened; one of an image before is not. */
function takeMpp(given) {
  const field = $("mpp");
  if (given !== undefined || field.dataset.forImage !== "next") field.value = given ?? "";
  field.dataset.forImage = "this";
}

/** The pixel size, if one is given. */
function mppQuery() {
  const { min, max, value, validity } = $("mpp");
  if (!validity.valid) {
    throw refusal("The pixel size cannot be used", `µm per pixel has to be a number from ${min} to ${max}, or empty.`);
  }
  return new URLSearchParams(value ? { mpp: value } : {});
}

function describeSmallest() {
  const mpp = knownMpp();
  const um2 = mpp ? ` ${$("smallest").value || 0} px are ${Number(($("smallest").value * mpp ** 2).toPrecision(3))} µm².` : "";
  $("smallest-help").textContent = `Smaller regions are left out of the outlines.${um2}`;
}
$("smallest").addEventListener("input", describeSmallest);

/* Opening --------------------------------------------------------------------------------------- */

setUpOpening(open);
$("example").onclick = async () => {
  try {
    const answer = await fetch(EXAMPLE.path);
    if (!answer.ok) throw new ServiceError(answer.status);
    await open(new File([await answer.blob()], EXAMPLE.name, { type: "image/jpeg" }), EXAMPLE.mpp);
  } catch (error) {
    fail(error instanceof ServiceError ? error : new ServiceError(0), () => $("example").click());
  }
};
$("cancel").onclick = () => {
  close();
  $("choose").focus();
};

/* Key, theme, model ----------------------------------------------------------------------------- */

const askForKey = setUpKey(service, () => {
  if (!manifest) loadModel();
});
const downloads = new Downloads(service, stage, state, askForKey);

function showModel({ name, version }) {
  $("model").textContent = `${name} ${version}`;
  $("model").hidden = false;
}

async function loadModel() {
  try {
    manifest = await service.model();
  } catch (error) {
    if (error.asksForKey) askForKey(null);
    else $("about").replaceChildren(element("dd", { text: `${error.title}. ${error.message}` }));
    return;
  }
  const { name, version, classes, mpp, tile_size_px: tile } = manifest;
  showModel({ name, version });
  if (mpp) {
    mppHelp = `The image is resampled from this scale to the ${mpp} µm per pixel that the model was trained at. A wrong value changes the labels, not only the areas and the scale bar.`;
  }
  if (!state.file) $("mpp-help").textContent = mppHelp;
  const legend = classes.map((row) =>
    element("span", { className: "legend" }, swatch(row.color), element("span", { text: row.name })),
  );
  const facts = [
    ["Name", [name]],
    ["Version", [version]],
    ["Classes", legend, "legend-row"],
    ["Trained at", [mpp ? `${mpp} µm per pixel` : "an unknown pixel size"]],
    ["Tiles", [`${tile} × ${tile} px`]],
  ];
  $("about").replaceChildren(
    ...facts.flatMap(([term, values, className]) => [
      element("dt", { text: term, className }),
      element("dd", { className }, ...values),
    ]),
  );
}

setUpTheme();
show("empty");
loadModel();
downloads.load();
