// What a message looks like.

import { copyButton, el, icon, iconButton } from "./dom.js";
import { say, sayAttribute, t } from "./i18n.js";
import { MarkdownView } from "./markdown.js";
import { wholeCalls } from "./replies.js";

const FRAME_MS = 40;
const SHARE = 3; // of the time: drawing takes at most a quarter, however long the text gets

/** A question; `actions.edit(text)` replaces it. */
export class QuestionView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.node = el("article", { class: "question", label: "questionSays" });
    this.showText();
  }

  showText() {
    const buttons = el(
      "div",
      { class: "actions" },
      copyButton("copyQuestion", () => this.message.content),
      iconButton("edit", "editQuestion", () => this.showEditor()),
    );
    this.node.replaceChildren(buttons, el("div", { class: "bubble" }, this.message.content));
  }

  showEditor() {
    const field = el("textarea", { label: "editQuestion", rows: 3 });
    field.value = this.message.content;
    const close = () => {
      this.showText();
      this.node.querySelector(".actions button:last-child").focus();
    };
    const save = () => field.value.trim() && this.actions.edit(field.value);
    const form = el(
      "form",
      { class: "editor" },
      field,
      el(
        "div",
        { class: "buttons" },
        el("button", { type: "button", class: "text-button", say: "cancel", click: close }),
        el("button", { class: "filled-button", say: "save" }),
      ),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      save();
    });
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        save();
      }
    });
    field.addEventListener("input", () => fitHeight(field));
    this.node.replaceChildren(form);
    fitHeight(field);
    field.focus();
  }
}

/** Make a text field as high as its text; style.css bounds it. */
export function fitHeight(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

/**
 * A reply, while it comes and after.
 *
 * `actions`: regenerate(), sendResults(texts), help(error) -> {words: key, act()}, drawn()
 */
export class AnswerView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.body = el("div", { class: "body" });
    this.text = new MarkdownView(this.body);
    this.below = el("div", { class: "below" });
    this.waiting = el("div", { class: "waiting" }, el("span"), el("span"), el("span"));
    this.node = el("article", { class: "answer", label: "assistantSays" }, this.body, this.below);
  }

  /** Draw soon what has come; often enough to look alive, seldom enough to leave the page usable. */
  grown() {
    this.timer ??= setTimeout(
      () => {
        const started = performance.now();
        this.draw(false);
        this.actions.drawn();
        this.drawMs = performance.now() - started;
      },
      FRAME_MS + SHARE * (this.drawMs ?? 0),
    );
  }

  /** Whether no message follows: only the last reply can be asked for again. */
  setLast(isLast) {
    if (this.isLast === isLast) return;
    this.isLast = isLast;
    if (this.complete) this.drawBelow();
  }

  /** Draw what there is now; `complete` when no more comes. */
  draw(complete) {
    clearTimeout(this.timer);
    this.timer = undefined;
    const { message } = this;
    this.complete = complete;
    this.drawThoughts(complete);
    this.text.update(message.content, complete);
    const silent = !message.content && !message.reasoning && !message.toolCalls?.length;
    if (!complete && silent) this.below.replaceChildren(this.waiting);
    else if (this.waiting.isConnected) this.waiting.remove();
    this.node.classList.toggle("streaming", !complete);
    if (complete) this.drawBelow();
  }

  drawThoughts(complete) {
    const { message } = this;
    if (!message.reasoning) return;
    if (!this.thoughts) {
      this.thoughtsTitle = el("span");
      this.thoughtsBody = el("div", { class: "thoughts-body" });
      this.thoughts = el(
        "details",
        { class: "thoughts" },
        el("summary", {}, this.thoughtsTitle),
        this.thoughtsBody,
      );
      this.thoughtsText = new MarkdownView(this.thoughtsBody);
      this.node.prepend(this.thoughts);
    }
    const thinking = !complete && message.thinkingMs === undefined;
    this.thoughts.classList.toggle("thinking", thinking);
    if (thinking) say(this.thoughtsTitle, "thinking");
    else if (!(message.thinkingMs >= 100)) say(this.thoughtsTitle, "thought");
    else say(this.thoughtsTitle, "thoughtFor", { seconds: roundTo(message.thinkingMs / 1000, 1) });
    this.thoughtsText.update(message.reasoning, complete);
  }

  drawBelow() {
    const { message } = this;
    this.below.replaceChildren();
    for (const call of message.toolCalls ?? [])
      if (call.name || call.arguments) this.below.append(toolCall(call));
    const calls = wholeCalls(message);
    if (this.isLast && calls.length)
      this.below.append(resultsForm(calls, this.actions.sendResults));
    const help = this.isLast && message.error && this.actions.help(message.error);
    if (message.error) this.below.append(errorCard(message.error, help));
    const buttons = el("div", { class: "actions" });
    if (message.content) buttons.append(copyButton("copyAnswer", () => message.content));
    if (this.isLast && !help)
      buttons.append(iconButton("again", "regenerate", this.actions.regenerate));
    this.below.append(el("div", { class: "foot" }, buttons, statsLine(message)));
  }
}

function statsLine({ stats, finish }) {
  const line = el("p", { class: "stats" });
  const add = (words, values) => {
    const part = el("span");
    say(part, words, values);
    line.append(part);
  };
  if (stats) {
    if (stats.tokens > 1)
      add("tokensPerSecond", { rate: roundTo(stats.rate, stats.rate < 100 ? 1 : 0) });
    add(stats.tokens === 1 ? "tokensOne" : "tokens", { count: stats.tokens });
    add("firstToken", { seconds: roundTo(stats.firstMs / 1000, 2) });
  }
  if (finish === "length" || finish === "stopped") add(finish);
  return line;
}

const roundTo = (number, digits) => Number(number.toFixed(digits));

function errorCard({ kind, values }, help) {
  const words = el("p");
  say(words, kind, values);
  const card = el("div", { class: "error", role: "alert" }, words);
  if (help)
    card.append(
      el("button", { type: "button", class: "text-button", say: help.words, click: help.act }),
    );
  return card;
}

function toolCall({ name, arguments: text }) {
  const title = el("p", { class: "tool-name" });
  const words = el("span");
  say(words, "toolCall", { name: name || "?" });
  title.append(icon("tool"), words);
  const scroller = el("pre", { tabindex: 0, role: "region" }, el("code", {}, prettyJson(text)));
  sayAttribute(scroller, "aria-label", "arguments");
  return el("div", { class: "tool-call" }, title, scroller);
}

function prettyJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // the model's JSON is not right: as it wrote it
  }
}

function resultsForm(calls, send) {
  const fields = calls.map(({ name }) => {
    const field = el("textarea", { rows: 2, class: "mono" });
    const words = el("span");
    say(words, "result", { name });
    return { field, label: el("label", { class: "field" }, words, field) };
  });
  const form = el("form", { class: "results" }, ...fields.map(({ label }) => label));
  form.append(el("button", { class: "filled-button", say: "sendResults" }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(fields.map(({ field }) => field.value));
  });
  return form;
}

/** The result of a tool that a reader gave. */
export function resultNode({ content, name }) {
  const title = el("p", { class: "tool-name" });
  say(title, "result", { name: name || "?" });
  const scroller = el("pre", { tabindex: 0, role: "region" }, el("code", {}, content));
  sayAttribute(scroller, "aria-label", "result", { name: name || "?" });
  return el("div", { class: "tool-call result" }, title, scroller);
}

/** What a screen reader says when a reply is complete: its text, the beginning of a long one. */
export function announcement({ content, error }) {
  const text = content.length > 1000 ? `${content.slice(0, 1000)}…` : content;
  return error ? text : `${t("answer")}: ${text}`;
}
