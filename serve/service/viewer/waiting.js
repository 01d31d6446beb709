/** Waiting for the service: how long it takes, and another try while it is busy. */

import { $, percent, speak } from "./page.js";

const BUSY_RETRIES = 5;

/** An error that the page itself explains. */
export function refusal(title, message) {
  return Object.assign(new Error(message), { title, mayPass: true });
}

/** Try again while the service says that it is busy, as often and as soon as it allows. */
export async function patiently(request, clock, signal) {
  for (let attempt = 0; ; attempt++) {
    try {
      return await request();
    } catch (error) {
      if (error.status !== 429 || attempt === BUSY_RETRIES) throw error;
      await clock.countDown(error.retryAfterS ?? 2 ** attempt, signal);
    }
  }
}

/** Seconds since a time of `performance.now()`, for people. */
export const since = (started) => `${Math.floor((performance.now() - started) / 1000)} s`;

/** Wait, and tell every now and then how many seconds are left. */
export async function countDown(seconds, signal, tell) {
  const end = performance.now() + 1000 * seconds;
  for (let left = seconds; left > 0; left = (end - performance.now()) / 1000) {
    tell(Math.ceil(left));
    await new Promise((resolve) => setTimeout(resolve, Math.min(250, 1000 * left)));
    signal.throwIfAborted();
  }
}

/** A card that says what is going on, and for how long. */
export function startClock() {
  const started = performance.now();
  const bar = $("progress").querySelector("progress");
  const detail = $("progress-detail");
  let waiting = false;
  const tell = (phase, done) => {
    waiting = phase === "work";
    const titles = { upload: "Sending the image", work: "Segmenting", download: "Receiving the result" };
    $("progress-title").textContent = titles[phase];
    if (done === null) bar.removeAttribute("value");
    else bar.value = done;
    detail.textContent = done === null ? since(started) : percent(done);
    if (phase === "work") speak("Segmenting");
  };
  const timer = setInterval(() => {
    if (waiting) detail.textContent = since(started);
  }, 500);
  const busy = (seconds, signal) => {
    waiting = false;
    $("progress-title").textContent = "The service is busy";
    bar.removeAttribute("value");
    speak(`The service is busy. Trying again in ${Math.ceil(seconds)} seconds.`);
    return countDown(seconds, signal, (left) => (detail.textContent = `Trying again in ${left} s`));
  };
  tell("upload", 0);
  return { tell, countDown: busy, stop: () => clearInterval(timer) };
}
