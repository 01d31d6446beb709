/** The page of whole slides: choose one, look at it, segment it or a part of it, take results home. */

import { sourceInMemory } from "./cells.js";
import { Classes } from "./classes.js";
import { readNpz } from "./npz.js";
import {
  $,
  bytes,
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
} from "./page.js";
import { Service } from "./service.js";
import { SlideList } from "./slide_list.js";
import { SlideView } from "./slide_view.js";
import { setUpTools } from "./tools.js";

const BASE = "../";
const LIBRARY = "openseadragon.min.js";
const POLL_MS = 1000;
const POLL_LIST_MS = 10_000;
const TITLE = document.title;
const ACTIVE = new Set(["waiting", "running"]);

const service = new Service(BASE);
const view = new SlideView($("view"));
const classes = new Classes(view);
const list = new SlideList(service, choose);
window.focalpath = view; // for the browser's console, and for tests
let library = null;
let manifest = null;
let formats = [];
/** The open slide as /slides/ID describes it, and the region of it that is segmented. */
const state = { slide: null, region: null, polling: 0, request: null };

/* The library ----------------------------------------------------------------------------------- */

function loadLibrary() {
  // Stands where the library would add a style of its own, which the page's policy forbids.
  const marker = document.createElementNS("none", "style");
  marker.setAttribute("data-openseadragon-mobile-css", "");
  document.head.append(marker);
  return new Promise((resolve, reject) => {
    const script = element("script", { src: LIBRARY });
    script.onload = () => resolve(window.OpenSeadragon);
    script.onerror = () =>
      reject(
        Object.assign(
          new Error("This page shows slides with OpenSeadragon. Whoever runs the service installs it with `make page`, or with `npm ci` in serve/service/viewer. Then load this page again."),
          { title: "OpenSeadragon is not installed" },
        ),
      );
    document.head.append(script);
  });
}

/* States ---------------------------------------------------------------------------------------- */

/** @param {"empty" | "failed" | "done"} name */
function show(name) {
  document.body.dataset.state = name;
  $("failure").hidden = name !== "failed";
  $("view").tabIndex = name === "done" ? 0 : -1;
  $("readout").hidden = true;
}

function fail(error, retry) {
  const card = $("failure");
  card.querySelector("h2").textContent = error.status === 400 ? "This slide cannot be read" : (error.title ?? "That failed");
  card.querySelector("p").textContent = error.message;
  $("retry").hidden = !retry || (!error.mayPass && !error.asksForKey);
  $("retry").onclick = retry;
  show("failed");
  if (error.asksForKey) askForKey(retry);
}

const askForKey = setUpKey(service, () => {
  if (!manifest) start();
});

/* One slide ------------------------------------------------------------------------------------- */

function choose(id) {
  if (location.hash.slice(1) === id) open(id);
  else location.hash = id; // which opens it
}

async function open(id) {
  closeRegion();
  clearTimeout(state.polling);
  state.slide = null;
  view.close();
  hideTable();
  $("outputs-section").hidden = true;
  $("welcome").hidden = true;
  show("empty");
  list.show();
  try {
    const slide = await service.json(`slides/${id}`);
    if (location.hash.slice(1) !== id) return; // another was chosen meanwhile
    state.slide = slide;
    document.title = `${slide.name}: FocalPath`;
    show("done");
    view.open(library, slide, `${BASE}slides/${id}/tiles`, service.key);
    present();
    speak(`${slide.name} is open.`);
  } catch (error) {
    fail(error, () => open(id));
  }
  list.show();
}

/** Read the open slide again, after its job has ended. */
async function refresh() {
  const { id } = state.slide;
  const slide = await service.json(`slides/${id}`);
  if (state.slide?.id !== id) return;
  state.slide = slide;
  present();
  await list.load();
}

function present() {
  const { slide } = state;
  $("file-name").textContent = slide.file;
  const { width_px: width, height_px: height, mpp } = slide;
  const sides = slideSides();
  const facts = [
    `${grouped(width)} × ${grouped(height)} px`,
    mpp ? `${micrometres(width * sides[0])} × ${micrometres(height * sides[1])}` : "",
    mpp ? perPixel(slide.mpp_xy ?? [mpp]) : "",
    slide.num_bytes === null ? "" : bytes(slide.num_bytes),
  ];
  $("file-facts").textContent = facts.filter(Boolean).join(" · ");
  const isOld = slide.result && !slide.result.is_of_this_file;
  const notes = [squeezedNote(slide.mpp_xy), slide.problem, slide.result_problem, isOld ? "The result is of another file that was in this place. Segment the slide again." : ""];
  $("slide-note").textContent = notes.filter(Boolean).join(" ");
  $("slide-note").hidden = !$("slide-note").textContent;
  $("mpp-field").hidden = mpp !== null;
  $("mpp").required = mpp === null;
  $("region-help").textContent = regionHelp();
  showOutputs();
  showJob(slide.job);
  if (!state.region) showSlideResult();
}

function showSlideResult() {
  const { result } = state.slide;
  view.setLayers(result ? [slideLayer(result)] : []);
  if (!result) {
    hideTable();
    return;
  }
  const { summary } = result;
  const rows = summary.classes.map((row) => rowOf(row, row.tissue_share ?? 0, row.area_mm2));
  showTable(rows, `Of the slide: ${mm2(summary.tissue_mm2)} mm² of tissue`, summary);
}

const mm2 = (area) => (area >= 0.1 || !area ? area.toFixed(2) : area.toFixed(4));

/** @param {number | null} area in mm² */
function rowOf({ label, name, color, mean_confidence: confidence }, share, area) {
  const cells = [
    area === null ? "–" : mm2(area),
    percent(share, 1),
    confidence === null ? "–" : percent(confidence),
  ];
  return { label, name, color, share, cells };
}

function slideLayer(result) {
  const { id } = state.slide;
  const load = async (level, column, row, signal) => {
    const path = `slides/${id}/result/tiles/${level}/${column}_${row}.npz?v=${result.version}`;
    return readCells((await service.send("GET", path, { signal })).response);
  };
  const source = {
    width: result.width_cells,
    height: result.height_cells,
    tileSize: result.tile_cells,
    numLevels: result.num_levels,
    load,
  };
  return { source, origin: result.origin_px, cell: result.cell_px };
}

async function readCells(buffer) {
  const arrays = await readNpz(buffer);
  const [labels, confidence] = ["labels", "confidence"].map((name) => arrays.get(name));
  const [height, width] = labels.shape;
  return { labels: labels.data, confidence: confidence.data, width, height, arrays };
}

/* The table and the overlay --------------------------------------------------------------------- */

function hideTable() {
  document.body.classList.remove("has-result");
}

function showTable(rows, title, summary) {
  document.body.classList.add("has-result");
  $("classes-of").textContent = title;
  classes.fill(rows, { keepChoice: true });
  const { low_confidence_share: low, low_confidence_threshold: threshold } = summary;
  $("low-share").textContent = low === null ? "" : `${percent(low, 1)} of it is below ${percent(threshold)}.`;
}

/* The job --------------------------------------------------------------------------------------- */

function showJob(job) {
  const isActive = Boolean(job) && ACTIVE.has(job.status);
  const { slide } = state;
  $("job-progress").hidden = !isActive;
  $("job-form").hidden = isActive || Boolean(slide.problem);
  $("job-failure").textContent = job?.status === "failed" ? `The last run failed: ${job.error}` : "";
  const words = { done: "Segment it again", stopped: "Go on with this slide" };
  $("job-start").textContent = words[slide.result ? "done" : slide.state] ?? "Segment this slide";
  if (isActive) {
    showProgress(job);
    state.polling = setTimeout(() => poll(job.id), POLL_MS);
  }
}

function showProgress(job) {
  const bar = $("job-progress").querySelector("progress");
  const isPlanned = job.status === "running" && job.tiles > 0;
  $("job-state").textContent = job.status === "waiting" ? "Waiting for other slides" : job.step ? `Writing ${job.step}` : isPlanned ? "Segmenting" : "Starting";
  if (isPlanned) bar.value = job.tiles_done / job.tiles;
  else bar.removeAttribute("value");
  const parts = [
    isPlanned ? `${grouped(job.tiles_done)} of ${grouped(job.tiles)} tiles` : "",
    job.tiles_per_second ? `${Number(job.tiles_per_second.toPrecision(2))} per second` : "",
    job.seconds_left && !job.step ? `${duration(job.seconds_left)} left` : "",
  ];
  $("job-detail").textContent = parts.filter(Boolean).join(" · ");
}

const duration = (seconds) => {
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
};

async function poll(id) {
  if (state.slide?.job?.id !== id) return;
  try {
    const job = await service.json(`jobs/${id}`);
    if (state.slide?.job?.id !== id) return;
    const before = state.slide.job.status;
    state.slide.job = job;
    if (ACTIVE.has(job.status)) {
      showJob(job);
      if (job.status !== before) list.load();
      return;
    }
    await refresh();
    const ends = { done: "The slide is segmented.", failed: "The run has failed.", cancelled: "The run is cancelled." };
    speak(ends[job.status]);
  } catch (error) {
    $("job-failure").textContent = error.mayPass ? "" : error.message;
    state.polling = setTimeout(() => poll(id), 3 * POLL_MS);
  }
}

$("job-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const { slide } = state;
  const more = [...document.querySelectorAll("[name=format]:checked")].map((check) => check.value);
  const body = {
    slide: slide.id,
    tissue: $("everywhere").checked ? "none" : "auto",
    formats: ["ome-zarr", "overview", "geojson", ...more],
    overwrite: Boolean(slide.result || slide.result_problem),
  };
  if (!$("mpp-field").hidden && $("mpp").value) body.mpp = Number($("mpp").value);
  $("job-failure").textContent = "";
  try {
    state.slide.job = await service.json("jobs", { method: "POST", body });
    showJob(state.slide.job);
    speak("The run has been started.");
    $("job-cancel").focus();
    await list.load();
  } catch (error) {
    $("job-failure").textContent = error.message;
    if (error.asksForKey) askForKey(null);
  }
});

$("job-cancel").onclick = async () => {
  try {
    await service.json(`jobs/${state.slide.job.id}`, { method: "DELETE" });
    $("job-state").textContent = "Cancelling";
  } catch (error) {
    $("job-failure").textContent = error.message;
  }
};

/* A region -------------------------------------------------------------------------------------- */

/** Um per pixel along x and y; null where it is not known. */
function slideSides() {
  const mpp = state.slide.mpp ?? (Number($("mpp").value) || null);
  return state.slide.mpp_xy ?? (mpp && [mpp, mpp]);
}

function regionHelp() {
  const most = state.slide.max_region_px;
  const side = manifest?.mpp ? `, about ${micrometres(Math.sqrt(most) * manifest.mpp)} square` : "";
  return `At most ${grouped(most / 1e6)} megapixels${side}. Large ones take a while.`;
}

async function segmentRegion(region) {
  view.showRegion(region);
  if (!region) return;
  state.request?.abort();
  const controller = new AbortController();
  state.request = controller;
  $("region-failure").textContent = "";
  const sides = slideSides();
  const size = sides ? `${micrometres(region.width * sides[0])} × ${micrometres(region.height * sides[1])}` : "";
  $("region-help").textContent = `Segmenting ${size}`;
  try {
    const { response } = await postRegion(region, "arrays", controller.signal);
    const found = await readCells(response);
    if (state.request !== controller) return;
    const summary = JSON.parse(new TextDecoder().decode(found.arrays.get("summary").data));
    showRegionResult(region, found, summary);
    $("region-help").textContent = `The region of ${size} is segmented.`;
    speak("The region is segmented.");
  } catch (error) {
    if (error.name === "AbortError") return;
    view.showRegion(null);
    $("region-help").textContent = regionHelp();
    $("region-failure").textContent = error.message;
    if (error.asksForKey) askForKey(() => segmentRegion(region));
  }
}

function postRegion(region, format, signal) {
  const query = new URLSearchParams(region);
  if (state.slide.mpp === null && $("mpp").value) query.set("mpp", $("mpp").value);
  return service.send("POST", `slides/${state.slide.id}/region/${format}?${query}`, { signal, keep: true });
}

function showRegionResult(region, found, summary) {
  state.region = region;
  const cell = [region.width / found.width, region.height / found.height];
  const layers = state.slide.result ? [slideLayer(state.slide.result)] : [];
  view.setLayers([...layers, { source: sourceInMemory(found), origin: [region.x, region.y], cell }]);
  const rows = summary.classes.map((row) =>
    rowOf(row, row.pixel_share, row.area_um2 === null ? null : row.area_um2 / 1e6),
  );
  showTable(rows, "Of the region", { low_confidence_threshold: 0.5, ...summary });
  $("region-result").hidden = false;
  $("region-downloads").replaceChildren(
    ...formats.map(({ name, title, kind, path, suffix }) => {
      const button = element("button", { type: "button", value: name, text: `${title} ` }, element("small", { text: kind }));
      button.onclick = () => takeRegionHome(button, path.slice(1), suffix);
      return button;
    }),
  );
}

async function takeRegionHome(button, format, suffix) {
  const { region, slide } = state;
  button.setAttribute("aria-busy", "true");
  $("region-failure").textContent = "";
  try {
    const { response, type } = await postRegion(region, format);
    save(new Blob([response], { type }), `${slide.name}_x${region.x}_y${region.y}${suffix}`);
  } catch (error) {
    $("region-failure").textContent = error.message;
  } finally {
    button.removeAttribute("aria-busy");
  }
}

function closeRegion() {
  state.request?.abort();
  state.request = state.region = null;
  view.showRegion(null);
  view.drawing = false;
  $("draw").setAttribute("aria-pressed", "false");
  $("region-result").hidden = true;
  $("region-downloads").replaceChildren();
  $("region-failure").textContent = "";
}

$("draw").onclick = () => {
  view.drawing = !view.drawing;
  $("draw").setAttribute("aria-pressed", String(view.drawing));
  $("region-help").textContent = view.drawing ? "Drag over the slide." : regionHelp();
};
view.addEventListener("region", ({ detail }) => {
  $("draw").setAttribute("aria-pressed", "false");
  segmentRegion(detail);
});
$("in-view").onclick = () => segmentRegion(view.regionInView());
$("region-close").onclick = () => {
  closeRegion();
  $("region-help").textContent = regionHelp();
  showSlideResult();
};

/* Outputs --------------------------------------------------------------------------------------- */

function showOutputs() {
  const { id, result } = state.slide;
  $("outputs-section").hidden = !result;
  $("outputs").replaceChildren(
    ...(result?.files ?? []).map((entry) => {
      const size = entry.num_bytes === null ? "zip" : bytes(entry.num_bytes);
      const link = element(
        "a",
        {
          className: "button",
          href: `${BASE}slides/${id}/result/files/${encodeURIComponent(entry.file)}`,
          download: entry.num_bytes === null ? `${entry.file}.zip` : entry.file,
        },
        element("span", { text: `${entry.title} ` }, element("small", { text: entry.description })),
        element("small", { text: size }),
      );
      link.onclick = (event) => takeHome(event, link);
      return link;
    }),
  );
}

/** A link cannot send a key, so with one the page itself loads the file. */
async function takeHome(event, link) {
  if (!service.key) return;
  event.preventDefault();
  $("outputs-failure").textContent = "";
  link.setAttribute("aria-busy", "true");
  try {
    const path = link.getAttribute("href").slice(BASE.length);
    const { response, type } = await service.send("GET", path);
    save(new Blob([response], { type }), link.download);
  } catch (error) {
    $("outputs-failure").textContent = error.message;
  } finally {
    link.removeAttribute("aria-busy");
  }
}

/* On the stage ---------------------------------------------------------------------------------- */

view.addEventListener("point", ({ detail }) => {
  const readout = $("readout");
  readout.hidden = !detail || detail.label === null;
  if (readout.hidden) return;
  const found = classes.of(detail.label);
  const confidence = detail.confidence / 255;
  const low = found && detail.confidence < classes.limit;
  const name = found?.name ?? "Outside of the tissue";
  readout.style.setProperty("--class-color", found?.color ?? "transparent");
  readout.querySelector("strong").textContent = name;
  readout.querySelector(".value").textContent = found ? percent(confidence) : "";
  readout.querySelector("small").textContent = `${low ? "low confidence · " : ""}x ${grouped(detail.px)}, y ${grouped(detail.py)}`;
  placeBeside(readout, detail, $("stage"));
  if ($("view").classList.contains("by-keyboard")) speak(found ? `${name}, ${percent(confidence)}` : name);
});

view.addEventListener("view", () => {
  const across = view.pixelsPerCssPixel;
  if (!across || !state.slide) return;
  const zoom = 100 / across / devicePixelRatio;
  $("zoom").textContent = `${zoom < 10 ? zoom.toPrecision(2) : Math.round(zoom)} %`;
  const sides = slideSides(); // the bar lies along a row
  showScale($("scale-bar"), sides && sides[0] * across, Math.min(140, $("stage").clientWidth / 5));
});

view.addEventListener("tile-failed", () => {
  $("slide-note").textContent = "A part of this slide cannot be read.";
  $("slide-note").hidden = false;
});

$("view").addEventListener("keydown", (event) => {
  if (event.key === "Escape" && view.drawing) $("draw").click();
});
setUpTools(view, classes, () => Boolean(state.slide));
addEventListener("hashchange", () => open(location.hash.slice(1)));

/* Start ----------------------------------------------------------------------------------------- */

async function start() {
  try {
    library ??= await loadLibrary();
    const index = await service.index();
    if (!index.endpoints.includes("GET /slides")) {
      throw Object.assign(new Error("Whoever runs the service starts it with --slides FOLDER."), { title: "This service has no slides" });
    }
    formats = index.formats;
    await list.load();
    manifest = await service.model().catch(() => null);
    if (manifest) $("model").textContent = `${manifest.name} ${manifest.version}`;
    $("model").hidden = !manifest;
  } catch (error) {
    fail(error, start);
    return;
  }
  if (location.hash) open(location.hash.slice(1));
  else show("empty");
}

setInterval(() => {
  if (list.isBusy && !document.hidden) list.load().catch(() => {});
}, POLL_LIST_MS);
setUpTheme();
document.title = TITLE;
show("empty");
start();
