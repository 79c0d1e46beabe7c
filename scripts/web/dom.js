// Making DOM nodes. Text goes in as text: nothing here or elsewhere in this folder takes HTML.

import { say, sayAttribute } from "./i18n.js";

const SVG = "http://www.w3.org/2000/svg";

// Path data on a grid of 24, drawn with a line.
const ICONS = {
  check: "M5 12.5l4.5 4.5L19 7.5",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  again: "M19.5 12a7.5 7.5 0 1 1-2.2-5.3L20 9.4M20 4.5v4.9h-4.9",
  trash: "M4.5 7h15M10 7V4.5h4V7M6.5 7l1 13h9l1-13M10 11v5M14 11v5",
  tool: "M14.5 6.5a4 4 0 0 0-5 5L4 17l3 3 5.5-5.5a4 4 0 0 0 5-5L15 12l-3-3z",
};

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", "icon");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/**
 * An element with attributes and children.
 *
 * @param {string} tag
 * @param {object} attributes  `say`: key of its text in i18n.js; `label`: key of its aria-label and
 *   title; a function: a listener, by the name of its event; true, false: there or not
 * @param {...(Node|string)} children
 */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "say") say(node, value);
    else if (name === "label") {
      sayAttribute(node, "aria-label", value);
      if (tag === "button") sayAttribute(node, "title", value);
    } else if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export const iconButton = (name, label, click) =>
  el("button", { type: "button", class: "icon-button", label, click }, icon(name));

/** A button that copies a text, and shows for a moment that it did. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const copied = await copy(text());
    button.replaceChildren(icon(copied ? "check" : "copy"));
    sayAttribute(button, "aria-label", copied ? "copied" : "notCopied");
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      sayAttribute(button, "aria-label", label);
    }, 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // No clipboard without https (or on localhost): select the text in a field, and copy that.
    const field = el("textarea", { class: "visually-hidden" });
    field.value = text;
    const focused = document.activeElement;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return copied;
  }
}
