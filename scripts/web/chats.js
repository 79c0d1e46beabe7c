// The conversations, kept in the browser: "chats" lists them, the latest first, "chat.ID" holds
// each one's messages. While a tab has a conversation answered, its `answeredUntil` says for how
// long the others leave it alone; the tab renews it.
//
// A message is {role, content} as in OpenAI's API. A user's is a question, "tool" the result of a
// call. An assistant's has besides: reasoning, thinkingMs, toolCalls [{id, name, arguments}],
// finish ("stop", "length", "tool_calls", "stopped"), error {kind, values}, and
// stats {tokens, rate, firstMs, contextTokens}.

import { asText, isObject, read, remove, write } from "./storage.js";

const TITLE_LENGTH = 60;
const LEASE_MS = 90_000; // a browser may wake a tab behind others only once a minute

let list = asList(read("chats", []));

function asList(value) {
  const isEntry = (entry) => typeof entry?.id === "string" && typeof entry.title === "string";
  return Array.isArray(value) ? value.filter(isEntry) : [];
}

export const listChats = () => list;

/** Read the list again, after another tab changed it. */
export function rereadChats() {
  list = asList(read("chats", []));
}

export function newChat(system) {
  const id = Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");
  return { id, title: "", system, messages: [], answeredUntil: 0, isKept: false };
}

/** A conversation from whatever is stored; null where there is none. */
export function openChat(id) {
  const stored = read(`chat.${asText(id)}`, null);
  if (!Array.isArray(stored?.messages)) return null;
  const messages = stored.messages.map(asMessage).filter(Boolean);
  const title = list.find((entry) => entry.id === id)?.title ?? "";
  const until = asNumber(stored.answeredUntil) ?? 0;
  const answeredUntil = until <= Date.now() + LEASE_MS ? until : 0;
  const growing = answeredUntil > Date.now() ? messages.at(-1) : null;
  for (const message of messages)
    if (message.role === "assistant" && !message.error && message !== growing)
      message.finish ??= "stopped"; // its tab ended before it did
  return { id, title, system: asText(stored.system), messages, answeredUntil, isKept: true };
}

function asMessage(value) {
  const { role, content } = value ?? {};
  if (typeof content !== "string") return null;
  if (role === "user") return { role, content };
  if (role === "tool")
    return { role, content, toolCallId: asText(value.toolCallId), name: asText(value.name) };
  if (role !== "assistant") return null;
  return {
    role,
    content,
    reasoning: asText(value.reasoning),
    thinkingMs: asNumber(value.thinkingMs),
    toolCalls: Array.isArray(value.toolCalls) ? value.toolCalls.map(asToolCall) : [],
    finish: asText(value.finish) || undefined,
    error: asError(value.error),
    stats: asStats(value.stats),
  };
}

const asNumber = (value) => (Number.isFinite(value) ? value : undefined);

const asToolCall = (value) => ({
  id: asText(value?.id),
  name: asText(value?.name),
  arguments: asText(value?.arguments),
});

function asError(value) {
  if (typeof value?.kind !== "string") return undefined;
  return { kind: value.kind, values: isObject(value.values) ? value.values : {} };
}

function asStats(value) {
  const { tokens, rate, firstMs, contextTokens } = value ?? {};
  if (![tokens, rate, firstMs].every(Number.isFinite)) return undefined;
  return { tokens, rate, firstMs, contextTokens: asNumber(contextTokens) };
}

/** How many messages two conversations begin with in common. */
export function commonLength(one, other) {
  const texts = [one, other].map(({ messages }) =>
    messages.map((message) => JSON.stringify(asMessage(message))),
  );
  const end = texts[0].findIndex((text, n) => text !== texts[1][n]);
  return end < 0 ? texts[0].length : end;
}

/**
 * Keep a conversation, once it has messages and unless it was deleted, here or in another tab;
 * false where the browser has no room.
 */
export function saveChat(chat, { toTop = false, isAnswering = false } = {}) {
  if (!chat.messages.length) return true;
  rereadChats();
  const place = list.findIndex((entry) => entry.id === chat.id);
  if (place < 0 && chat.isKept) return true;
  chat.isKept = true;
  const entry = { id: chat.id, title: chat.title };
  if (place < 0) list = [entry, ...list];
  else if (toTop) list = [entry, ...list.toSpliced(place, 1)];
  else list = list.with(place, entry);
  const { system, messages } = chat;
  const answeredUntil = isAnswering ? Date.now() + LEASE_MS : 0;
  const kept = write(`chat.${chat.id}`, { system, messages, answeredUntil });
  return write("chats", list) && kept;
}

/** Give a conversation another title; false where the browser has no room. */
export function retitleChat(id, title) {
  rereadChats();
  list = list.map((entry) => (entry.id === id ? { id, title } : entry));
  return write("chats", list);
}

/** Delete a conversation; what is returned puts it back. */
export function deleteChat(id) {
  rereadChats();
  const place = list.findIndex((entry) => entry.id === id);
  if (place < 0) return () => {}; // another tab was faster
  const entry = list[place];
  const stored = read(`chat.${id}`, null);
  list = list.toSpliced(place, 1);
  write("chats", list); // before its messages go: a tab that has it answered saves it no more
  remove(`chat.${id}`);
  return () => {
    rereadChats();
    list = list.toSpliced(Math.min(place, list.length), 0, entry);
    write(`chat.${id}`, { ...stored, answeredUntil: 0 });
    write("chats", list);
  };
}

/** A title from the first question: its first line, cut at a word. */
export function titleOf(question) {
  const line = question.trim().split("\n")[0];
  if (line.length <= TITLE_LENGTH) return line;
  const cut = line.slice(0, TITLE_LENGTH);
  return `${cut.slice(0, cut.lastIndexOf(" ") > 20 ? cut.lastIndexOf(" ") : TITLE_LENGTH)}…`;
}
