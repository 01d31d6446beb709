/** The job of the open slide: start it, show how far it is, cancel it. */

import { $, element, grouped, speak } from "./page.js";

const POLL_MS = 1000;
const ACTIVE = new Set(["waiting", "running"]);

export class SlideJob {
  #service;
  #state;
  #list;
  #refresh;
  #askForKey;
  #polling = 0;

  /**
   * @param {import("./service.js").Service} service
   * @param {{slide: object}} state what is open
   * @param {import("./slide_list.js").SlideList} list
   * @param {() => Promise<void>} refresh reads the open slide again
   * @param {(then: (() => void) | null) => void} askForKey
   */
  constructor(service, state, list, refresh, askForKey) {
    this.#service = service;
    this.#state = state;
    this.#list = list;
    this.#refresh = refresh;
    this.#askForKey = askForKey;
    $("job-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#start();
    });
    $("job-cancel").onclick = () => this.#cancel();
  }

  /**
   * Offer the formats of a slide's result.
   *
   * @param {{name: string, title: string, description: string, chosen: boolean, always: boolean}[]} formats
   */
  offer(formats) {
    const fields = formats.map(({ name, title, description, chosen, always }) =>
      element(
        "label",
        { className: "check" },
        element("input", { type: "checkbox", value: name, ...(chosen && { checked: "" }), ...(always && { disabled: "" }) }),
        element("span", { text: `${title}: ${description}` }),
      ),
    );
    $("job-formats").replaceChildren($("job-formats").firstElementChild, ...fields);
  }

  /** Another slide is opened: follow no job. */
  close() {
    clearTimeout(this.#polling);
  }

  /** Show a job, or that there is none, and follow it until it ends. */
  show(job) {
    const isActive = Boolean(job) && ACTIVE.has(job.status);
    const { slide } = this.#state;
    $("job-progress").hidden = !isActive;
    $("job-form").hidden = isActive;
    const reason = meetsOther(job) ? job.error.replace(/\. \w[^.]*--overwrite.*$/, ". “Replace it” discards that.") : job?.error;
    $("job-failure").textContent = job?.status === "failed" ? `The last run failed: ${reason}` : "";
    const words = { other: "Replace it", done: "Segment it again", stopped: "Go on with this slide" };
    const kind = meetsOther(job) ? "other" : slide.result ? "done" : slide.state;
    $("job-start").textContent = words[kind] ?? "Segment this slide";
    if (isActive) {
      showProgress(job);
      this.#polling = setTimeout(() => this.#poll(job.id), POLL_MS);
    }
  }

  async #poll(id) {
    const state = this.#state;
    if (state.slide?.job?.id !== id) return;
    try {
      const job = await this.#service.json(`jobs/${id}`).catch((error) => {
        if (error.status !== 404) throw error;
        return { id, status: "gone" };
      });
      if (state.slide?.job?.id !== id) return;
      const before = state.slide.job.status;
      state.slide.job = job;
      if (ACTIVE.has(job.status)) {
        this.show(job);
        if (job.status !== before) this.#list.load();
        return;
      }
      await this.#refresh();
      const ends = { done: "The slide is segmented.", failed: "The run has failed.", cancelled: "The run is cancelled.", gone: "The service no longer knows this run." };
      speak(ends[job.status]);
    } catch (error) {
      $("job-failure").textContent = error.mayPass ? "" : error.message;
      this.#polling = setTimeout(() => this.#poll(id), 3 * POLL_MS);
    }
  }

  async #start() {
    const { slide } = this.#state;
    const chosen = $("job-formats").querySelectorAll("input:checked");
    const body = {
      slide: slide.id,
      tissue: $("everywhere").checked ? "none" : "auto",
      formats: [...chosen].map((box) => box.value),
      overwrite: Boolean(slide.result || slide.result_problem || meetsOther(slide.job)),
    };
    if (!$("mpp-field").hidden && $("mpp").value) body.mpp = Number($("mpp").value);
    $("job-failure").textContent = "";
    try {
      slide.job = await this.#service.json("jobs", { method: "POST", body });
      if (this.#state.slide === slide) {
        this.show(slide.job);
        speak("The run has been started.");
        $("job-cancel").focus();
      }
      await this.#list.load();
    } catch (error) {
      $("job-failure").textContent = error.message;
      if (error.asksForKey) this.#askForKey(null);
    }
  }

  async #cancel() {
    try {
      await this.#service.json(`jobs/${this.#state.slide.job.id}`, { method: "DELETE" });
      $("job-state").textContent = "Cancelling";
    } catch (error) {
      $("job-failure").textContent = error.message;
    }
  }
}

/** Whether a job has failed for what was made with other settings or another model. */
const meetsOther = (job) => job?.status === "failed" && job.code === "result_differs";

const duration = (seconds) => {
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
};

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
