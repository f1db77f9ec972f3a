/** The server's interface: calls, streams of events, and errors in words. */

const UNREACHABLE =
  "The server cannot be reached. Check that it runs and that you are connected, then try again.";

const CANCEL_TIMEOUT_MS = 5000;
const LARGEST_BODY = 2 ** 20; // bytes that the server takes

/** What the server, or the way to it, refused. `status` is 0 where no answer came. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, code = null, headers = new Headers() } = {}) {
    super(message);
    Object.assign(this, { status, param, code });
    this.retryAfterS = Number(headers.get("Retry-After")) || null;
    this.position = headers.get("X-Paris-Queue-Position");
  }
}

export class Api {
  key = ""; // in memory alone: a page that is left has forgotten it

  /** Return the answer to one request. Paths are relative: the page works below any prefix. */
  async fetch(path, { headers = {}, ...options } = {}) {
    if (this.key) headers = { ...headers, Authorization: `Bearer ${this.key}` };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      throw error.name === "AbortError" ? error : new ApiError(UNREACHABLE);
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }

  /** Return the JSON of an answer. */
  async json(path, options) {
    const response = await this.fetch(path, options);
    return response.json().catch(() => { throw new ApiError(UNREACHABLE); });
  }

  /** Begin to draw; return the head of the answer, of which `events` reads the rest. */
  draw(body, { id, signal }) {
    return this.fetch("v1/images/generations", {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Request-Id": id },
      body: JSON.stringify({ ...body, stream: true, partial_images: 3 }),
      signal,
    });
  }

  /** Stop a request; return after which step it stopped. */
  async cancel(id) {
    const signal = AbortSignal.timeout(CANCEL_TIMEOUT_MS);
    return (await this.json(`v1/images/generations/${id}`, { method: "DELETE", signal })).step;
  }

  /** Return how a picture file says that it was drawn. */
  provenance(file) {
    const headers = { "Content-Type": file.type };
    const body = file.slice(0, LARGEST_BODY); // of a PNG that is enough: its record comes first
    return this.json("v1/images/provenance", { method: "POST", headers, body });
  }
}

/** Yield the data of each server-sent event; the event `error` is thrown. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new ApiError(UNREACHABLE);
    });
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (data === undefined) continue; // a comment, as proxies send to keep a connection
      const event = JSON.parse(data.slice("data: ".length));
      if (event.error) throw lateRefusal(event.error);
      yield event;
    }
  }
}

/** Return the error of a stream that had begun, whose status the head could not tell any more. */
function lateRefusal(error) {
  const status = { rate_limit_error: 429, unavailable_error: 503 }[error.type] ?? 500;
  return new ApiError(error.message, { ...error, status });
}

async function refusal(response) {
  const { status, headers } = response;
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `The server answered with the error ${status}.`;
  return new ApiError(message, { ...error, status, headers });
}
