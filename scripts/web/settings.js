// The drawer: the conversation's system prompt, and how replies are sampled.

import { el } from "./dom.js";
import { say } from "./i18n.js";
import { asText, isObject, read, write } from "./storage.js";

// Name in the API -> what the field takes. Empty: the server decides.
const NUMBERS = {
  temperature: { words: "temperature", min: 0, max: 2, step: 0.1 },
  top_p: { words: "topP", min: 0, max: 1, step: 0.05 },
  top_k: { words: "topK", min: 0, max: 100000, step: 1 },
  max_tokens: { words: "maxTokens", min: 1, max: 1000000, step: 1 },
  seed: { words: "seed", min: 0, max: 2147483647, step: 1, hint: "seedHint" },
};

const dialog = document.querySelector("#settings");
const system = document.querySelector("#system");
const thinking = document.querySelector("#thinking");
const tools = document.querySelector("#tools");
const toolsError = document.querySelector("#tools-error");
const fields = {}; // name -> {input, error}

const stored = read("sampling", {});
let sampling = isObject(stored) ? stored : {}; // name -> what stands in the field

function makeNumberField(name, { words, min, max, step, hint }) {
  const input = el("input", {
    id: name,
    type: "number",
    inputmode: step < 1 ? "decimal" : "numeric",
    min,
    max,
    step,
    "data-say-placeholder": "byDefault",
    "aria-describedby": `${name}-error`,
    input: () => change(name, input.value),
  });
  const error = el("p", { id: `${name}-error`, class: "field-error", hidden: true });
  const field = el("div", { class: "field" }, el("label", { for: name, say: words }), input, error);
  if (hint) field.append(el("p", { class: "hint", say: hint }));
  fields[name] = { input, error };
  return field;
}

function change(name, text) {
  sampling = { ...sampling, [name]: text };
  write("sampling", sampling);
  check();
}

/** The number in a field: undefined where it is empty, null where it is not right. */
function numberOf(name) {
  const { min, max, step } = NUMBERS[name];
  const { input } = fields[name];
  if (input.value === "" && !input.validity.badInput) return undefined;
  const number = input.valueAsNumber;
  const right = number >= min && number <= max && (step < 1 || Number.isInteger(number));
  return right ? number : null;
}

/** The tools that the model may call: undefined where there are none, null where it is no list. */
function toolsOf(text) {
  if (!text.trim()) return undefined;
  try {
    const list = JSON.parse(text);
    return Array.isArray(list) ? list : null;
  } catch {
    return null;
  }
}

function check() {
  for (const [name, { input, error }] of Object.entries(fields)) {
    const wrong = numberOf(name) === null;
    showError(input, error, wrong, "badNumber", NUMBERS[name]);
  }
  showError(tools, toolsError, toolsOf(tools.value) === null, "badTools", {});
}

function showError(input, error, wrong, words, values) {
  error.hidden = !wrong;
  input.setAttribute("aria-invalid", String(wrong));
  if (wrong) say(error, words, values);
}

function fill() {
  for (const [name, { input }] of Object.entries(fields)) input.value = asText(sampling[name]);
  thinking.value = asText(sampling.thinking);
  tools.value = asText(sampling.tools);
  check();
}

/** What the drawer adds to a request to a model; null where a field is not right. */
export function requestSettings(model) {
  const settings = {};
  for (const name of Object.keys(NUMBERS)) settings[name] = numberOf(name);
  settings.tools = toolsOf(tools.value);
  if (Object.values(settings).includes(null)) return null;
  if (model?.thinking && thinking.value)
    settings.chat_template_kwargs = { enable_thinking: thinking.value === "on" };
  return settings; // JSON leaves out what is undefined
}

/** Open the drawer for a conversation and a model; `changed` is called with each new prompt. */
export function openSettings(chat, model, changed) {
  system.value = chat.system;
  system.oninput = () => changed(system.value);
  document.querySelector("#thinking-field").hidden = !model?.thinking;
  dialog.showModal();
}

export function startSettings() {
  document
    .querySelector("#numbers")
    .append(...Object.entries(NUMBERS).map(([name, field]) => makeNumberField(name, field)));
  thinking.addEventListener("change", () => change("thinking", thinking.value));
  tools.addEventListener("input", () => change("tools", tools.value));
  document.querySelector("#reset").addEventListener("click", () => {
    sampling = {};
    write("sampling", sampling);
    fill();
  });
  // A click beside the drawer closes it, as Esc does
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  fill();
}
