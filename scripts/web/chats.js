// The conversations, kept in the browser: "chats" lists them, the latest first, "chat.ID" holds
// each one's messages.
//
// A message is {role, content} as in OpenAI's API. A user's is a question, "tool" the result of a
// call. An assistant's has besides: reasoning, thinkingMs, toolCalls [{id, name, arguments}],
// finish ("stop", "length", "tool_calls", "stopped"), error {kind, values}, and
// stats {tokens, rate, firstMs, contextTokens}.

import { read, remove, write } from "./storage.js";

const TITLE_LENGTH = 60;
const ROLES = ["user", "assistant", "tool"];

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
  return { id, title: "", system, messages: [] };
}

export function openChat(id) {
  const stored = read(`chat.${id}`, null);
  if (!Array.isArray(stored?.messages)) return null;
  const messages = stored.messages.filter(
    (message) => ROLES.includes(message?.role) && typeof message.content === "string",
  );
  const title = list.find((entry) => entry.id === id)?.title ?? "";
  return { id, title, system: String(stored.system ?? ""), messages };
}

/** Keep a conversation, once it has messages; false where the browser has no room. */
export function saveChat(chat, { toTop = false } = {}) {
  if (!chat.messages.length) return true;
  const place = list.findIndex((entry) => entry.id === chat.id);
  const entry = { id: chat.id, title: chat.title };
  if (place < 0) list = [entry, ...list];
  else if (toTop) list = [entry, ...list.toSpliced(place, 1)];
  else list = list.with(place, entry);
  const { system, messages } = chat;
  const kept = write(`chat.${chat.id}`, { system, messages });
  return write("chats", list) && kept;
}

/** Delete a conversation; what is returned puts it back. */
export function deleteChat(id) {
  const place = list.findIndex((entry) => entry.id === id);
  if (place < 0) return () => {}; // another tab was faster
  const entry = list[place];
  const stored = read(`chat.${id}`, null);
  list = list.toSpliced(place, 1);
  remove(`chat.${id}`);
  write("chats", list);
  return () => {
    list = list.toSpliced(Math.min(place, list.length), 0, entry);
    write(`chat.${id}`, stored);
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
