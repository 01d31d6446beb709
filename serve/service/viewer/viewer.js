/** The page: choose an image, wait for the service, look at the answer, take it home. */

import { Classes } from "./classes.js";
import { readNpz } from "./npz.js";
import {
  $,
  element,
  grouped,
  micrometres,
  perPixel,
  percent,
  placeBeside,
  save,
  setUpKey,
  setUpTheme,
  showScale,
  speak,
  squeezedNote,
  swatch,
} from "./page.js";
import { Service, ServiceError } from "./service.js";
import { Stage } from "./stage.js";
import { setUpTools } from "./tools.js";

const BUSY_RETRIES = 5;
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
/** What a result can be downloaded as, by name. */
const formats = new Map();
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
  for (const controller of underWay.values()) controller.abort();
  stage.clear();
  $("file-name").textContent = "No image yet";
  $("file-facts").textContent = "";
  $("mpp-help").textContent = mppHelp;
  showNotes([]);
  $("preview-note").hidden = true;
  showDownloadFailure("");
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

/** Try again while the service says that it is busy, as often and as soon as it allows. */
async function patiently(request, clock, signal) {
  for (let attempt = 0; ; attempt++) {
    try {
      return await request();
    } catch (error) {
      if (error.status !== 429 || attempt === BUSY_RETRIES) throw error;
      await clock.countDown(error.retryAfterS ?? 2 ** attempt, signal);
    }
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

/** A card that says what is going on, and for how long. */
function startClock() {
  const started = performance.now();
  const bar = $("progress").querySelector("progress");
  let waiting = false;
  const tell = (phase, done) => {
    waiting = phase === "work";
    const titles = { upload: "Sending the image", work: "Segmenting", download: "Receiving the result" };
    $("progress-title").textContent = titles[phase];
    if (done === null) bar.removeAttribute("value");
    else bar.value = done;
    $("progress-detail").textContent = done === null ? elapsed() : percent(done);
    if (phase === "work") speak("Segmenting");
  };
  const elapsed = () => `${Math.floor((performance.now() - started) / 1000)} s`;
  const timer = setInterval(() => {
    if (waiting) $("progress-detail").textContent = elapsed();
  }, 500);
  const countDown = async (seconds, signal) => {
    waiting = false;
    $("progress-title").textContent = "The service is busy";
    bar.removeAttribute("value");
    speak(`The service is busy. Trying again in ${Math.ceil(seconds)} seconds.`);
    const end = performance.now() + 1000 * seconds;
    for (let left = seconds; left > 0; left = (end - performance.now()) / 1000) {
      $("progress-detail").textContent = `Trying again in ${Math.ceil(left)} s`;
      await new Promise((resolve) => setTimeout(resolve, Math.min(250, 1000 * left)));
      signal.throwIfAborted();
    }
  };
  tell("upload", 0);
  return { tell, countDown, stop: () => clearInterval(timer) };
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

/** How the pixels that were segmented differ from the file's. */
function showNotes(notes) {
  $("file-notes").textContent = notes.length ? `As segmented: ${notes.join("; ")}.` : "";
  $("file-notes").hidden = !notes.length;
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
  const readout = $("readout");
  readout.hidden = !detail || document.body.dataset.state !== "done";
  if (readout.hidden) return;
  const found = classes.of(detail.label);
  const confidence = detail.confidence / 255;
  const low = detail.confidence < classes.limit;
  readout.style.setProperty("--class-color", found?.color ?? "transparent");
  readout.querySelector("strong").textContent = found?.name ?? "Unlabelled";
  readout.querySelector(".value").textContent = percent(confidence);
  readout.querySelector("small").textContent = `${low ? "low confidence · " : ""}x ${detail.column}, y ${detail.row}`;
  placeBeside(readout, detail, $("stage"));
  if ($("view").classList.contains("by-keyboard")) {
    speak(`${found?.name ?? "Unlabelled"}, ${percent(confidence)}`);
  }
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

/** Downloads under way, by format; a second click on a button stops its own. */
const underWay = new Map();

$("downloads").addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (!button) return;
  if (underWay.has(button.value)) underWay.get(button.value).abort();
  else takeHome(button);
});

/** Download a format of the open image; the button tells how far it is. */
async function takeHome(button) {
  const { file } = state;
  const format = formats.get(button.value);
  const controller = new AbortController();
  const note = downloadNote(button.querySelector("small"));
  underWay.set(format.name, controller);
  showDownloadFailure("");
  button.setAttribute("aria-busy", "true");
  try {
    const content = await download(format, file, note, controller.signal);
    save(content, file.name.replace(/\.[^.]+$/, "") + format.suffix);
  } catch (error) {
    if (error.name === "AbortError") return;
    const retry = () => takeHome(button);
    const mayRetry = error.mayPass || error.asksForKey || error.title === undefined;
    showDownloadFailure(`${error.title ?? "That failed"}. ${error.message}`, mayRetry ? retry : null);
    if (error.asksForKey) askForKey(retry);
  } finally {
    note.stop();
    underWay.delete(format.name);
    button.removeAttribute("aria-busy");
  }
}

function showDownloadFailure(text, retry = null) {
  $("download-failure").textContent = text;
  $("download-again").hidden = !retry;
  $("download-again").onclick = retry;
}

/** Says in a download's button how far it is, and that a click stops it. */
function downloadNote(place) {
  const [before, started] = [place.textContent, performance.now()];
  let phase = "";
  const elapsed = () => `${Math.floor((performance.now() - started) / 1000)} s`;
  const say = () => (place.textContent = `${phase || elapsed()} · cancel`);
  const timer = setInterval(say, 500);
  const tell = (name, done) => {
    const words = { upload: "sent", work: "", download: "received" }[name];
    phase = words && done !== null ? `${percent(done)} ${words}` : "";
    say();
  };
  const countDown = async (seconds, signal) => {
    phase = "busy, trying again";
    say();
    const end = performance.now() + 1000 * seconds;
    while (performance.now() < end) {
      await new Promise((resolve) => setTimeout(resolve, 100));
      signal.throwIfAborted();
    }
  };
  const stop = () => {
    clearInterval(timer);
    place.textContent = before;
  };
  say();
  return { tell, countDown, stop };
}

/** An error that the field itself explains. */
function refusal(title, message) {
  return Object.assign(new Error(message), { title, mayPass: true });
}

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

/** Formats that the page writes itself, as the result is shown. */
const AS_SHOWN = {
  overlay: () =>
    stage.picture().catch(() => {
      throw refusal("The picture cannot be drawn", "It is too large for this browser. Crop the image.");
    }),
};

/** The shown result in a format: from this page, or else from the service. */
async function download({ name, path, options }, file, note, signal) {
  if (name in AS_SHOWN) return AS_SHOWN[name]();
  const query = new URLSearchParams(state.query);
  if (options.includes("min_area_px")) query.set("min_area_px", smallestArea());
  const request = () => service.post(path.slice(1), file, { query, signal, onProgress: note.tell });
  const { response, type } = await patiently(request, note, signal);
  return new Blob([response], { type });
}

/** Make a button for each format that the service offers. */
async function loadFormats() {
  try {
    const index = await service.index();
    $("to-slides").hidden = !index.endpoints.includes("GET /slides");
    for (const format of index.formats) formats.set(format.name, format);
  } catch (error) {
    $("download-failure").textContent = `${error.title ?? "The list of formats cannot be read"}. ${error.message}`;
  }
  $("downloads").replaceChildren(
    ...[...formats.values()].map(({ name, title, kind }) =>
      element(
        "button",
        { type: "button", value: name, text: `${title} ` },
        element("small", { text: name in AS_SHOWN ? `${kind}, as shown` : kind }),
      ),
    ),
  );
}

function smallestArea() {
  const { value, validity } = $("smallest");
  if (!validity.valid) throw refusal("The smallest outline cannot be used", "It has to be a whole number of pixels.");
  return Number(value);
}

function describeSmallest() {
  const mpp = knownMpp();
  const um2 = mpp ? ` ${$("smallest").value || 0} px are ${Number(($("smallest").value * mpp ** 2).toPrecision(3))} µm².` : "";
  $("smallest-help").textContent = `Smaller regions are left out of the outlines.${um2}`;
}
$("smallest").addEventListener("input", describeSmallest);

/* Opening --------------------------------------------------------------------------------------- */

function openFirst(files) {
  if (files.length) open(files[0]);
}

for (const id of ["open", "choose", "another"]) $(id).onclick = () => $("file").click();
$("file").addEventListener("change", () => {
  openFirst($("file").files);
  $("file").value = ""; // so that the same file can be chosen again
});
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

let dragDepth = 0; // dragenter and dragleave also come from what is inside
const dragging = (depth) => {
  dragDepth = depth;
  document.body.classList.toggle("dragging", depth > 0);
};
addEventListener("dragenter", (event) => {
  if (event.dataTransfer?.types.includes("Files")) dragging(dragDepth + 1);
});
addEventListener("dragleave", () => dragging(Math.max(0, dragDepth - 1)));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  dragging(0);
  openFirst(event.dataTransfer?.files ?? []);
});
addEventListener("paste", (event) => openFirst(event.clipboardData?.files ?? []));

/* Key, theme, model ----------------------------------------------------------------------------- */

const askForKey = setUpKey(service, () => {
  if (!manifest) loadModel();
});

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
loadFormats();
