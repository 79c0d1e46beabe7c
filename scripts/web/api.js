// Talking to the server: /v1/models and /v1/chat/completions, as OpenAI's API has them.

const PATIENCE_S = 5; // where a full server does not say when to come again

/**
 * What went wrong, for people: `kind` is the key of its sentence in i18n.js, `values` what stands
 * in it.
 */
export class ApiError extends Error {
  constructor(kind, values = {}) {
    super(kind);
    this.kind = kind;
    this.values = values;
  }
}

let apiKey = "";
try {
  apiKey = sessionStorage.getItem("minimind.key") ?? "";
} catch {
  // Switched off: the reader gives it anew
}

export function setKey(key) {
  apiKey = key;
  try {
    sessionStorage.setItem("minimind.key", key);
  } catch {
    // Switched off: it is known until the page is closed
  }
}

export const hasKey = () => apiKey !== "";

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // A key that no header can hold (Chinese, say) fails here, too
    throw new ApiError(/^[\x20-\x7e]*$/.test(apiKey) ? "gone" : "keyWrong");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const body = await response.text().catch(() => "");
  let said = {};
  try {
    said = JSON.parse(body).error ?? {};
  } catch {
    // Not a server of this API: its status is all that can be told
  }
  const detail = String(said.message ?? `HTTP ${response.status}`);
  if (response.status === 401) return new ApiError(apiKey ? "keyWrong" : "keyNeeded");
  if (response.status === 429) {
    const seconds = Number(response.headers.get("Retry-After")) || PATIENCE_S;
    return new ApiError("full", { seconds });
  }
  if (said.code === "context_length_exceeded") return new ApiError("tooLong", { detail });
  if (response.status >= 502) return new ApiError("gone"); // what stands before it, of a server that is not there
  return new ApiError(response.status >= 500 ? "failed" : "refused", { detail });
}

/** The server's models, as /v1/models lists them. */
export async function listModels() {
  const response = await request("v1/models", { cache: "no-store" });
  const list = await response.json().catch(() => null);
  if (!Array.isArray(list?.data)) throw new ApiError("broken", { detail: "/v1/models" });
  return list.data;
}

/**
 * Ask for a reply, and yield the server's chunks (`chat.completion.chunk`) as they come.
 *
 * Throws an ApiError where the server is not there, refuses, or ends early; an AbortError when
 * `signal` stops it.
 */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of serverSentEvents(response.body, signal)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ApiError("broken", { detail: data.slice(0, 200) });
    }
    if (chunk?.error) throw new ApiError("failed", { detail: String(chunk.error.message) });
    yield chunk;
  }
  throw new ApiError("cut");
}

/** The `data` of each event. Bytes that are not UTF-8 become U+FFFD. */
async function* serverSentEvents(stream, signal) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let pending = ""; // a line that has not ended yet
  let data = [];
  while (true) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new ApiError("cut");
    }
    if (piece.done) return;
    const lines = (pending + decoder.decode(piece.value, { stream: true })).split("\n");
    pending = lines.pop();
    for (const line of lines.map((text) => text.replace(/\r$/, ""))) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}
