/** The page of whole slides: choose one, look at it, segment it or a part of it, take results home. */

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
  save,
  setUpKey,
  setUpTheme,
  showNotes,
  showScale,
  speak,
  squeezedNote,
} from "./page.js";
import { Service } from "./service.js";
import { SlideJob } from "./slide_job.js";
import { SlideList } from "./slide_list.js";
import { SlideRegion } from "./slide_region.js";
import { SlideView } from "./slide_view.js";
import { setUpTools, showReadout } from "./tools.js";

const BASE = "../";
const LIBRARY = "openseadragon.min.js";
const POLL_LIST_MS = 10_000;
const TITLE = document.title;

const service = new Service(BASE);
const view = new SlideView($("view"));
const classes = new Classes(view);
const list = new SlideList(service, choose);
window.focalpath = view; // for the browser's console, and for tests
let library = null;
let manifest = null;
/** The open slide as /slides/ID describes it. */
const state = { slide: null };

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
const job = new SlideJob(service, state, list, refresh, askForKey);
const region = new SlideRegion(service, state, view, readCells, askForKey);

/* One slide ------------------------------------------------------------------------------------- */

function choose(id) {
  if (location.hash.slice(1) === id) open(id);
  else location.hash = id; // which opens it
}

async function open(id) {
  region.close();
  job.close();
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
  const { sides } = region;
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
  $("job-section").hidden = Boolean(slide.problem);
  $("mpp-field").hidden = mpp !== null;
  $("mpp").required = mpp === null;
  region.showHelp();
  showOutputs();
  job.show(slide.job);
  if (!region.isShown) showSlideResult();
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

const mm2 = (area) => (area >= 0.1 || !area ? area.toFixed(2) : area < 0.0001 ? "<0.0001" : area.toFixed(4));

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
  showNotes(summary.notes ?? summary.image.notes ?? []);
  classes.fill(rows, { keepChoice: true });
  const { low_confidence_share: low, low_confidence_threshold: threshold } = summary;
  $("low-share").textContent = low === null ? "" : `${percent(low, 1)} of it is below ${percent(threshold)}.`;
}

/* A region -------------------------------------------------------------------------------------- */

region.addEventListener("result", ({ detail: { layer, summary } }) => {
  view.setLayers([...(state.slide.result ? [slideLayer(state.slide.result)] : []), layer]);
  const rows = summary.classes.map((row) =>
    rowOf(row, row.pixel_share, row.area_um2 === null ? null : row.area_um2 / 1e6),
  );
  showTable(rows, "Of the region", { low_confidence_threshold: 0.5, ...summary });
});
region.addEventListener("closed", showSlideResult);

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
  const shown = detail?.label === null ? null : detail;
  const place = shown && `x ${grouped(shown.px)}, y ${grouped(shown.py)}`;
  showReadout(classes, shown, "Outside of the tissue", place);
});

view.addEventListener("view", () => {
  const across = view.pixelsPerCssPixel;
  if (!across || !state.slide) return;
  const zoom = 100 / across / devicePixelRatio;
  $("zoom").textContent = `${zoom < 10 ? zoom.toPrecision(2) : Math.round(zoom)} %`;
  const { sides } = region; // the bar lies along a row
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
    region.formats = index.formats;
    job.offer(index.slide_formats);
    await list.load();
    manifest = await service.model().catch(() => null);
    region.modelMpp = manifest?.mpp ?? null;
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
