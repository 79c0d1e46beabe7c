// Replies that stream: from the conversation to a request, and from the server's chunks to a message.

import { ApiError, streamChat } from "./api.js";
import { isObject } from "./storage.js";

const MOST_CALLS = 128; // of tools, in one reply

/** The messages of a conversation as the server takes them; thoughts stay here. */
export function messagesFor(chat) {
  const system = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  const calls = chat.messages.flatMap(wholeCalls);
  const sent = chat.messages.filter((message) => {
    if (message.role === "tool") return calls.some(({ id }) => id === message.toolCallId);
    // What failed before it began is no reply
    return message.role === "user" || message.content || wholeCalls(message).length;
  });
  return [...system, ...sent.map(messageFor)];
}

function messageFor(message) {
  const { role, content, toolCallId } = message;
  if (role === "tool") return { role, content, tool_call_id: toolCallId };
  const calls = wholeCalls(message).map(({ id, name, arguments: text }) => ({
    id,
    type: "function",
    function: { name, arguments: text },
  }));
  return calls.length ? { role, content, tool_calls: calls } : { role, content };
}

/** The calls of a message that can be answered: the server refuses those that were cut short. */
export function wholeCalls({ toolCalls, finish, error }) {
  if (!toolCalls || error || finish === "length" || finish === "stopped") return [];
  return toolCalls.filter(({ name, arguments: text }) => {
    try {
      return name && isObject(JSON.parse(text || "{}"));
    } catch {
      return false;
    }
  });
}

/** One reply on its way: `message` grows, and `grown` is called whenever it has. */
export class Reply {
  constructor(message, grown) {
    this.message = message;
    this.grown = grown;
    this.controller = new AbortController();
  }

  /** What came is complete at once: a page that is left has no time for more. */
  stop() {
    this.controller.abort();
    this.message.finish = "stopped";
    this.message.stats = this.stats();
  }

  /** Stream until the end, an error or stop(); what went wrong stands in the message then. */
  async run(body) {
    const started = performance.now();
    this.chunks = 0;
    this.characters = 0;
    try {
      for await (const chunk of streamChat(body, this.controller.signal)) {
        this.take(chunk, performance.now() - started);
        this.grown();
      }
      this.message.finish ??= "stop";
    } catch (error) {
      if (this.controller.signal.aborted) return; // stop() said so
      if (error instanceof ApiError)
        this.message.error = { kind: error.kind, values: error.values };
      else {
        this.message.error = { kind: "broken", values: { detail: String(error) } };
        console.error(error);
      }
    } finally {
      this.message.stats = this.stats();
    }
  }

  take(chunk, ms) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { message } = this;
    const delta = choice.delta ?? {};
    if (delta.reasoning_content)
      message.reasoning = (message.reasoning ?? "") + delta.reasoning_content;
    if (delta.content) message.content += delta.content;
    for (const call of delta.tool_calls ?? []) takeToolCall(message, call);
    if (delta.reasoning_content || delta.content || delta.tool_calls) {
      this.count(delta, ms);
      if (message.reasoning && !delta.reasoning_content) message.thinkingMs ??= ms - this.firstMs;
    }
    if (choice.finish_reason) message.finish = choice.finish_reason;
  }

  count({ reasoning_content: thought, content, tool_calls: calls }, ms) {
    this.characters +=
      `${thought ?? ""}${content ?? ""}${calls ? JSON.stringify(calls) : ""}`.length;
    this.firstMs ??= ms;
    if (!this.chunks) this.firstCharacters = this.characters;
    this.lastMs = ms;
    this.chunks++;
  }

  /** Without the server's count, of a reply that was stopped, a chunk counts as a token. */
  stats() {
    if (!this.chunks) return null;
    const tokens = this.usage?.completion_tokens ?? this.chunks;
    // Behind the first chunk, so that reading the question does not count; of its share of the tokens
    // its share of the text tells
    const since = this.lastMs > this.firstMs ? this.firstMs : 0;
    const share = since ? 1 - this.firstCharacters / this.characters : 1;
    return {
      tokens,
      rate: (tokens * share) / ((this.lastMs - since) / 1000),
      firstMs: this.firstMs,
      contextTokens: this.usage?.total_tokens ?? null,
    };
  }
}

function takeToolCall(message, { index = 0, id, function: part = {} }) {
  if (!(index < MOST_CALLS)) return;
  message.toolCalls ??= [];
  while (message.toolCalls.length <= index)
    message.toolCalls.push({ id: "", name: "", arguments: "" });
  const call = message.toolCalls[index];
  if (id) call.id = id;
  if (part.name) call.name += part.name;
  if (part.arguments) call.arguments += part.arguments;
}
