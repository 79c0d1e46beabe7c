// The page: which conversation is open, what is asked, and what the server is up to.

import { hasKey, listModels, setKey } from "./api.js";
import {
  commonLength,
  listChats,
  newChat,
  openChat,
  rereadChats,
  retitleChat,
  saveChat,
  titleOf,
} from "./chats.js";
import { el } from "./dom.js";
import { say, sayAll, switchLanguage, t } from "./i18n.js";
import { AnswerView, announcement, fitHeight, QuestionView, resultNode } from "./messages.js";
import { messagesFor, Reply, wholeCalls } from "./replies.js";
import { openSettings, requestSettings, startSettings } from "./settings.js";
import { drawSidebar } from "./sidebar.js";
import { onChangeElsewhere, read, write } from "./storage.js";

const RETRY_MS = 2000; // how often a server that is gone is asked for
const SAVE_MS = 2000; // how often a growing reply is kept
const NEAR_PX = 80; // so near to its end, the view follows the text
const THEMES = ["auto", "light", "dark"];
const SUGGESTIONS = ["suggestion1", "suggestion2", "suggestion3", "suggestion4"];
const FULL_SHARE = 0.85; // of the context; from here on it is worth a warning

const $ = (selector) => document.querySelector(selector);
const question = $("#question");
const scroller = $("#scroller");
const narrow = window.matchMedia("(max-width: 760px)");

let chat; // the open conversation
let models = [];
let serverGone = false;
let views = []; // of the open conversation's messages, in their order
let following = true; // the view stays at the end of the text
let lastTop = 0;
const replies = new Map(); // of conversations whose reply is on its way: id -> {reply, chat, view}

// -------------------------------------------------------------------------------------------------
// The open conversation
// -------------------------------------------------------------------------------------------------

function show(next) {
  chat = next;
  write("current", chat.id);
  following = true;
  drawChat();
  drawList();
}

/** Take over what another tab made of the open conversation. */
function refresh() {
  const stored = openChat(chat.id);
  if (!stored || replies.has(chat.id)) return;
  // Messages that are the same stay as they are, and with them a question that is being edited
  const same = chat.messages.slice(0, commonLength(chat, stored));
  stored.messages.splice(0, same.length, ...same);
  chat = stored;
  drawChat();
}

/** Take over titles that another tab gave, and leave what it deleted. */
function refreshList() {
  rereadChats();
  for (const one of new Set([chat, ...Array.from(replies.values(), (running) => running.chat)])) {
    const entry = listChats().find(({ id }) => id === one.id);
    if (entry) one.title = entry.title;
    else if (one.isKept) {
      stopReply(one);
      if (one === chat) show(newChat(chat.system));
    }
  }
  drawAround();
  drawList();
}

/** Draw the messages that are not drawn yet; those that are stay as they are. */
function drawChat() {
  for (const view of views) if (!chat.messages.includes(view.message)) view.node.remove();
  const drawn = new Map(views.map((view) => [view.message, view]));
  views = chat.messages.map((message) => drawn.get(message) ?? makeView(message));
  for (const view of views) if (!view.node.isConnected) $("#messages").append(view.node);
  for (const view of views) view.setLast?.(view === views.at(-1));
  drawAround();
  followText();
}

function makeView(message) {
  if (message.role === "user")
    return new QuestionView(message, { edit: (text) => editQuestion(message, text) });
  if (message.role === "tool") return { message, node: resultNode(message) };
  const view = new AnswerView(message, {
    drawn: followText,
    help: helpFor,
    regenerate,
    sendResults,
  });
  const running = replies.get(chat.id);
  const isRunning = running?.reply.message === message;
  if (isRunning) running.view = view;
  const hasEnd = Boolean(message.finish || message.error);
  view.draw(!isRunning && (hasEnd || !isAnsweredElsewhere()));
  return view;
}

/** What stands around the messages: title, welcome, buttons, how full the context is. */
function drawAround() {
  const title = $("#chat-title");
  if (chat.title) {
    delete title.dataset.say;
    title.textContent = chat.title;
  } else say(title, "untitled");
  $("#welcome").hidden = chat.messages.length > 0;
  $("#system-note").hidden = !chat.system.trim();
  $("#system-text").textContent = chat.system;
  const isRunning = replies.has(chat.id);
  $("#stop").hidden = !isRunning;
  $("#send").hidden = isRunning;
  drawSend();
  drawContext();
  const isElsewhere = isAnsweredElsewhere();
  $("#elsewhere").hidden = !isElsewhere;
  $("#system").readOnly = isElsewhere;
  clearTimeout(drawAround.timer); // that tab may be gone without a word
  if (isElsewhere) drawAround.timer = setTimeout(refresh, chat.answeredUntil - Date.now() + 1);
}

function drawSend() {
  $("#send").disabled = !question.value.trim() || isAnsweredElsewhere();
}

const isAnsweredElsewhere = () => !replies.has(chat.id) && chat.answeredUntil > Date.now();

const isBusy = () => replies.has(chat.id) || isAnsweredElsewhere();

function drawContext() {
  const used = chat.messages.findLast((message) => message.stats)?.stats.contextTokens;
  const all = currentModel()?.context_length;
  const node = $("#context");
  node.hidden = !used || !all;
  $("#about").hidden = !node.hidden;
  if (node.hidden) return;
  say(node, "contextUsed", { used, all });
  node.classList.toggle("nearly-full", used > FULL_SHARE * all);
}

function drawList() {
  drawSidebar(chat.id, {
    open: (id) => {
      show(replies.get(id)?.chat ?? openChat(id) ?? newChat(chat.system));
      closeMenu();
    },
    rename: renameChat,
    deleted: (id) => {
      stopReply({ id });
      if ($("#banner").dataset.say === "quota") hideBanner();
      if (id === chat.id) startChat();
      else drawList();
    },
    restored: (id) => show(openChat(id) ?? newChat("")),
  });
}

function renameChat(id, title) {
  tellRoom(retitleChat(id, title));
  refreshList();
}

function startChat() {
  show(newChat(chat?.system ?? ""));
  closeMenu();
  if (!narrow.matches) question.focus();
}

function keep(kept, options) {
  tellRoom(saveChat(kept, { ...options, isAnswering: replies.has(kept.id) }));
}

/** Tell whether the browser had room for what was written last. */
function tellRoom(hadRoom) {
  if (!hadRoom) showBanner("quota");
  else if ($("#banner").dataset.say === "quota") hideBanner();
}

// -------------------------------------------------------------------------------------------------
// Asking
// -------------------------------------------------------------------------------------------------

function ask(text) {
  const settings = settingsOrDrawer();
  if (isBusy() || !text.trim() || !settings) return false;
  chat.messages.push({ role: "user", content: text });
  chat.title ||= titleOf(text);
  answer(settings);
  return true;
}

/** Put a question in the place of one and all that follows it. */
function editQuestion(message, text) {
  if (isAnsweredElsewhere() || !settingsOrDrawer()) return;
  stopReply();
  const place = chat.messages.indexOf(message);
  chat.messages.splice(place);
  if (place === 0 && chat.title === titleOf(message.content)) chat.title = "";
  ask(text);
}

function regenerate() {
  const settings = settingsOrDrawer();
  if (isBusy() || !settings) return;
  while (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
  answer(settings);
}

/** Give the model the results of the tools that it called. */
function sendResults(texts) {
  const settings = settingsOrDrawer();
  if (isBusy() || !settings) return;
  const calls = wholeCalls(chat.messages.at(-1));
  texts.forEach((content, n) => {
    const { id, name } = calls[n];
    chat.messages.push({ role: "tool", content, toolCallId: id, name });
  });
  answer(settings);
}

/** What the drawer adds to a request; opens it where something in it is not right. */
function settingsOrDrawer() {
  const settings = requestSettings(currentModel());
  if (!settings) showSettings();
  return settings;
}

function stopReply({ id } = chat) {
  const running = replies.get(id);
  if (!running) return;
  running.reply.stop();
  replies.delete(id); // at once: what is asked next need not wait for the end of this one
}

/** Have the open conversation answered. */
function answer(settings) {
  const asked = chat;
  const body = { model: currentModel()?.id, messages: messagesFor(asked), ...settings };
  const message = { role: "assistant", content: "" };
  asked.messages.push(message);
  const reply = new Reply(message, () => {
    if (replies.get(asked.id) === running) running.view?.grown(); // else stopped
  });
  const running = { reply, chat: asked, view: null };
  replies.set(asked.id, running);
  keep(asked, { toTop: true });
  say($("#status"), "answering");
  show(asked);
  reply.run(body).then(() => ended(running));
}

function ended(running) {
  const { reply, chat: asked, view } = running;
  if (replies.get(asked.id) === running) replies.delete(asked.id);
  keep(asked);
  const { message } = reply;
  if (message.error?.kind === "gone") waitForServer();
  if (["keyNeeded", "keyWrong"].includes(message.error?.kind)) askForKey(message.error.kind);
  view?.draw(true);
  if (asked !== chat || !views.includes(view)) return; // out of sight, or replaced
  delete $("#status").dataset.say;
  $("#status").textContent = announcement(message);
  drawAround();
  followText();
}

/** The button under an error that gets the reader on. */
function helpFor({ kind }) {
  if (kind === "tooLong") return { words: "newChat", act: startChat };
  return { words: "tryAgain", act: regenerate };
}

// -------------------------------------------------------------------------------------------------
// The server
// -------------------------------------------------------------------------------------------------

function currentModel() {
  const chosen = read("model", null);
  return models.find((model) => model.id === chosen) ?? models[0];
}

async function connect() {
  try {
    models = await listModels();
  } catch (error) {
    if (error.kind === "gone") waitForServer();
    else if (error.kind?.startsWith("key")) askForKey(error.kind);
    else showBanner(error.kind ?? "broken", error.values ?? { detail: String(error) });
    return;
  }
  if (serverGone) {
    serverGone = false;
    hideBanner();
    say($("#status"), "back");
  }
  if (!models.length) showBanner("noModels");
  drawModels();
}

function waitForServer() {
  serverGone = true;
  showBanner("goneWait");
  clearTimeout(waitForServer.timer);
  waitForServer.timer = setTimeout(connect, RETRY_MS);
}

function drawModels() {
  const select = $("#model");
  select.replaceChildren(...models.map(({ id }) => el("option", { value: id }, id)));
  select.hidden = models.length < 2;
  $("#model-name").textContent = models.length === 1 ? models[0].id : "";
  if (currentModel()) select.value = currentModel().id;
  const size = $("#model-size");
  const { parameters, context_length: context } = currentModel() ?? {};
  size.hidden = !parameters || !context;
  if (!size.hidden) say(size, "modelSize", { parameters: shortNumber(parameters), context });
  drawContext();
}

const shortNumber = (number) =>
  new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(number);

function askForKey(kind) {
  const dialog = $("#key-dialog");
  const error = $("#key-error");
  error.hidden = kind !== "keyWrong";
  say(error, "keyWrong");
  $("#key").value = "";
  if (!dialog.open) dialog.showModal();
}

function showBanner(words, values) {
  say($("#banner"), words, values);
  $("#banner").hidden = false;
}

function hideBanner() {
  $("#banner").hidden = true;
  delete $("#banner").dataset.say;
}

// -------------------------------------------------------------------------------------------------
// Around
// -------------------------------------------------------------------------------------------------

function followText() {
  if (following) scroller.scrollTop = chat.messages.length ? scroller.scrollHeight : 0;
  $("#latest").hidden = following;
}

function isNearEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_PX;
}

function showSettings() {
  openSettings(chat, currentModel(), (system) => {
    chat.system = system;
    keep(chat);
    drawAround();
  });
}

function openMenu() {
  document.body.classList.add("menu-open");
  $("#menu").setAttribute("aria-expanded", "true");
  drawMenu();
  $("#new-chat").focus();
}

function closeMenu() {
  if (!document.body.classList.contains("menu-open")) return;
  document.body.classList.remove("menu-open");
  $("#menu").setAttribute("aria-expanded", "false");
  drawMenu();
  $("#menu").focus();
}

/** On a narrow screen the list lies over the conversation: only one of them can be reached. */
function drawMenu() {
  const isOpen = document.body.classList.contains("menu-open");
  $("#sidebar").inert = narrow.matches && !isOpen;
  $("#stage").inert = narrow.matches && isOpen;
  $("#scrim").hidden = !(narrow.matches && isOpen);
}

function drawTheme() {
  const stored = read("theme", "auto");
  const theme = THEMES.includes(stored) ? stored : "auto";
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const words = { auto: "themeAuto", light: "themeLight", dark: "themeDark" };
  say($("#theme span"), words[theme]);
}

function nextTheme() {
  write("theme", THEMES[(THEMES.indexOf(read("theme", "auto")) + 1) % THEMES.length]);
  drawTheme();
}

function sendQuestion() {
  const text = question.value;
  if (!ask(text)) return;
  question.value = "";
  fitHeight(question);
  drawAround();
}

function wireComposer() {
  $("#composer").addEventListener("submit", (event) => {
    event.preventDefault();
    sendQuestion();
  });
  question.addEventListener("input", () => {
    fitHeight(question);
    drawSend();
  });
  question.addEventListener("keydown", (event) => {
    // Enter that ends the spelling of a Chinese word sends nothing
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229)
      return;
    event.preventDefault();
    sendQuestion();
  });
  $("#stop").addEventListener("click", () => {
    stopReply();
    question.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (document.body.classList.contains("menu-open")) closeMenu();
    else stopReply();
  });
}

function wirePage() {
  $("#new-chat").addEventListener("click", startChat);
  $("#menu").addEventListener("click", openMenu);
  $("#scrim").addEventListener("click", closeMenu);
  narrow.addEventListener("change", drawMenu);
  $("#open-settings").addEventListener("click", showSettings);
  $("#theme").addEventListener("click", nextTheme);
  $("#system-note").addEventListener("click", showSettings);
  $("#language").addEventListener("click", switchLanguage);
  $("#model").addEventListener("change", (event) => {
    write("model", event.target.value);
    drawModels();
  });
  $("#latest").addEventListener("click", () => {
    following = true;
    followText();
  });
  scroller.addEventListener("scroll", () => {
    // Text may have grown since: only who scrolls up wants to stay there
    if (isNearEnd()) following = true;
    else if (scroller.scrollTop < lastTop) following = false;
    lastTop = scroller.scrollTop;
    $("#latest").hidden = following;
  });
  new ResizeObserver(followText).observe(scroller);
  $("#key-dialog").addEventListener("close", () => {
    setKey($("#key").value.trim());
    if (hasKey()) connect();
  });
  const suggest = (key) => el("button", { type: "button", say: key, click: () => ask(t(key)) });
  $("#suggestions").append(...SUGGESTIONS.map((key) => el("li", {}, suggest(key))));
  window.addEventListener("pagehide", () => {
    for (const { chat: unfinished } of replies.values()) {
      stopReply(unfinished);
      keep(unfinished);
    }
  });
  window.addEventListener("pageshow", ({ persisted }) => {
    if (!persisted) return;
    refreshList(); // what the others did meanwhile was not told
    refresh();
  });
  onChangeElsewhere((name) => {
    if (name === "chats") refreshList();
    else if (name === `chat.${chat.id}`) refresh();
  });
  setInterval(() => {
    for (const { chat: growing } of replies.values()) keep(growing);
  }, SAVE_MS);
}

startSettings();
wireComposer();
wirePage();
drawTheme();
drawMenu();
show(openChat(read("current", "")) ?? newChat(""));
sayAll();
if (!narrow.matches) question.focus();
connect();
