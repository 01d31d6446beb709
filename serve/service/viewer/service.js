/** Requests to the service, and what to tell people when one fails. */

const TITLES = new Map([
  [0, "The service cannot be reached"],
  [400, "This image cannot be used"],
  [401, "This service asks for a key"],
  [403, "The key was not accepted"],
  [413, "The image is too large"],
  [429, "The service is busy"],
  [502, "The service cannot be reached"],
  [503, "The model is not available right now"],
  [504, "The service took too long"],
]);

/** For answers without a message of the service: from a proxy before it, or from the network. */
const FALLBACKS = new Map([
  [0, "Check the network connection, then try again. The image is still open here."],
  [401, "Ask whoever runs the service for one."],
  [403, "Ask whoever runs the service which key to use."],
  [413, "A proxy before the service refuses uploads of this size. Crop or compress the image, or ask whoever runs the proxy to raise its limit."],
  [429, "Other images are being worked on. Try again in a moment."],
  [502, "A proxy cannot reach the service. Try again in a moment."],
  [503, "Try again in a moment."],
  [504, "A proxy before the service stopped waiting for it. Try again with a smaller part of the image, or ask whoever runs the proxy to let it wait longer."],
]);

/** Statuses after which the same request may succeed. */
const PASSING = new Set([0, 408, 429, 500, 502, 503, 504]);

/** A request that did not succeed. */
export class ServiceError extends Error {
  /**
   * @param {number} status HTTP status; 0 when there was no answer
   * @param {string} [message] the service's own words
   * @param {number | null} [retryAfterS] seconds that the service asks to wait
   */
  constructor(status, message, retryAfterS = null) {
    const own = status === 401 ? undefined : message; // that one is for programmers
    super(own || FALLBACKS.get(status) || `It answered with status ${status}.`);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }

  get title() {
    return TITLES.get(this.status) ?? (this.status < 500 ? "The request was refused" : "The service failed");
  }

  get mayPass() {
    return PASSING.has(this.status);
  }

  get asksForKey() {
    return this.status === 401 || this.status === 403;
  }
}

/** The service that this page came from. */
export class Service {
  /** Sent with every request once it is set. */
  key = "";

  /** @param {string} [base] the service's address as seen from the page, with its slash */
  constructor(base = "") {
    this.base = base;
  }

  /** The model's manifest. */
  async model() {
    return this.json("model");
  }

  /** What there is: the endpoints, and the formats of answers that are for people. */
  async index() {
    return this.json("./");
  }

  /**
   * The JSON that a path answers with.
   *
   * @param {string} path relative to the service
   * @param {{method?: string, body?: object, signal?: AbortSignal}} [options] `body` is sent as JSON
   */
  async json(path, { method = "GET", body, signal } = {}) {
    const text = body === undefined ? undefined : JSON.stringify(body);
    const { response } = await this.send(method, path, { body: text, signal });
    return JSON.parse(new TextDecoder().decode(response));
  }

  /**
   * Upload an image to an endpoint.
   *
   * XMLHttpRequest, since fetch does not tell how much of a body has been sent.
   *
   * @param {string} path the endpoint
   * @param {File} image the file as it was chosen
   * @param {{query?: URLSearchParams, signal?: AbortSignal,
   *   onProgress?: (phase: "upload" | "work" | "download", done: number | null) => void}} [options]
   *   `done` is the finished share of the phase where it is known
   * @returns {Promise<{response: ArrayBuffer, type: string}>} the answer
   */
  post(path, image, { query = new URLSearchParams(), signal, onProgress } = {}) {
    const body = new FormData();
    body.append("image", image);
    const options = { body, signal, onProgress, keep: true };
    return this.send("POST", query.size ? `${path}?${query}` : path, options);
  }

  /**
   * Send a request.
   *
   * @param {string} method
   * @param {string} path relative to the service
   * @param {{body?: FormData | string, signal?: AbortSignal, keep?: boolean,
   *   onProgress?: (phase: string, done: number | null) => void}} [options] `body`: a string is JSON;
   *   `keep`: the service may keep the result, so that downloads do not run the model again
   * @returns {Promise<{response: ArrayBuffer, type: string}>} the answer
   */
  send(method, path, { body, signal, onProgress, keep } = {}) {
    return new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      request.open(method, this.base + path);
      request.responseType = "arraybuffer";
      request.setRequestHeader("Accept", "*/*"); // at "./" HTML is the page
      if (this.key) request.setRequestHeader("X-API-Key", this.key);
      if (typeof body === "string") request.setRequestHeader("Content-Type", "application/json");
      if (keep) request.setRequestHeader("X-Keep-Result", "yes");
      if (onProgress) {
        request.upload.onprogress = (event) => onProgress("upload", event.loaded / event.total);
        request.upload.onload = () => onProgress("work", null);
        request.onprogress = (event) =>
          onProgress("download", event.lengthComputable ? event.loaded / event.total : null);
      }
      request.onload = () => {
        const { status, response } = request;
        if (status >= 200 && status < 300) resolve({ response, type: request.getResponseHeader("Content-Type") });
        else reject(new ServiceError(status, message(response), retryAfter(request)));
      };
      request.onerror = () => reject(new ServiceError(0));
      request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
      signal?.addEventListener("abort", () => request.abort(), { once: true });
      request.send(body);
    });
  }
}

function message(response) {
  try {
    const { error } = JSON.parse(new TextDecoder().decode(response));
    return typeof error === "string" ? error : undefined;
  } catch {
    return undefined; // not ours, for example a proxy's page
  }
}

function retryAfter(request) {
  const seconds = Number(request.getResponseHeader("Retry-After") || NaN);
  return seconds > 0 ? seconds : null;
}
