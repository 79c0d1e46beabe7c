// A model's Markdown as DOM nodes. marked splits the text into tokens; every token becomes an
// element made here, whose text is set as text. HTML in the text is shown, not obeyed.

import { copyButton, el } from "./dom.js";
import { sayAttribute } from "./i18n.js";
import { Lexer } from "./vendored/marked.esm.js";

const LONGEST_LINE = 10_000; // characters; a text with a longer line is shown as it is,
const LONGEST_BLOCK = 60_000; // as is one whose last block is longer and not code,
const DEEPEST = 40; // and what is nested deeper
const PLAIN_PIECE = 8_000; // characters of plain text in one element, so that it is laid out in parts
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const SAFE_PROTOCOLS = ["http:", "https:", "mailto:"];

/**
 * A text that grows. Blocks that are complete are drawn once; while it grows, only what may still
 * change is drawn anew: the last two blocks.
 */
export class MarkdownView {
  constructor(container) {
    this.container = container;
    this.clear();
  }

  clear() {
    this.container.replaceChildren();
    this.blocks = []; // those drawn, as {raw, token, node}
    this.text = "";
    this.settled = 0; // characters, and
    this.settledBlocks = 0; // blocks, that do not change any more
    this.plain = false;
  }

  /** Show a text; `complete` when no more of it comes. */
  update(source, complete) {
    const text = source.replace(/\r\n?/g, "\n"); // as marked counts
    if (!text.startsWith(this.text)) this.clear();
    this.text = text;
    const rest = text.slice(this.settled);
    const longLine = this.plain ? -1 : longLineStart(rest);
    if (longLine >= 0) {
      if (this.drawTokens(rest.slice(0, longLine), true)) this.settleAll(longLine);
      this.plain = true;
    }
    if (!this.plain) this.plain = !this.drawTokens(rest, complete);
    if (this.plain) this.drawPlain(text.slice(this.settled));
  }

  drawTokens(rest, complete) {
    if (rest.length > LONGEST_BLOCK && !complete && this.blocks.at(-1)?.token.type !== "code")
      return false;
    let tokens;
    try {
      tokens = new Lexer({ gfm: true, breaks: true }).lex(rest);
    } catch {
      return false; // nested too deep for its stack
    }
    this.replaceBlocks(tokens.filter((token) => token.type !== "space"));
    if (!complete) this.settle(tokens);
    return true;
  }

  replaceBlocks(tokens) {
    const old = this.blocks.splice(this.settledBlocks);
    tokens.forEach((token, n) => {
      if (old[n]?.token.raw !== token.raw && !appendToCode(old[n], token)) {
        const node = drawBlock(token, 0);
        if (old[n]) old[n].node.replaceWith(node);
        else this.container.append(node);
        old[n] = { node };
      }
      this.blocks.push({ node: old[n].node, token });
    });
    for (const { node } of old.slice(tokens.length)) node.remove();
  }

  /** All but the last two blocks are complete: a list may go on behind an empty line. */
  settle(tokens) {
    let unsettled = 0;
    let last = tokens.length;
    while (last > 0 && unsettled < 2) if (tokens[--last].type !== "space") unsettled++;
    for (const token of tokens.slice(0, last)) {
      this.settled += token.raw.length;
      if (token.type !== "space") this.settledBlocks++;
    }
  }

  settleAll(characters) {
    this.settled += characters;
    this.settledBlocks = this.blocks.length;
  }

  drawPlain(rest) {
    if (!this.plainBox) this.plainBox = el("div", { class: "plain" });
    if (!this.plainBox.parentNode) {
      for (const { node } of this.blocks.splice(this.settledBlocks)) node.remove();
      this.plainBox.replaceChildren();
      this.container.append(this.plainBox);
      this.plainShown = 0;
    }
    while (this.plainShown < rest.length) {
      let piece = this.plainBox.lastChild;
      if (!piece || piece.firstChild.length >= PLAIN_PIECE) {
        piece = el("div", {}, document.createTextNode(""));
        this.plainBox.append(piece);
      }
      const room = PLAIN_PIECE - piece.firstChild.length;
      piece.firstChild.appendData(rest.slice(this.plainShown, this.plainShown + room));
      this.plainShown += Math.min(room, rest.length - this.plainShown);
    }
  }
}

/** Where the first line begins that is too long; -1 where none is. */
function longLineStart(text) {
  let start = 0;
  while (start < text.length) {
    const end = text.indexOf("\n", start);
    if ((end < 0 ? text.length : end) - start > LONGEST_LINE) return start;
    if (end < 0) return -1;
    start = end + 1;
  }
  return -1;
}

/** Code that grows keeps its element: what was selected stays so, and its button focused. */
function appendToCode(old, token) {
  if (old?.token?.type !== "code" || token.type !== "code") return false;
  if (old.token.lang !== token.lang || !token.text.startsWith(old.token.text)) return false;
  const text = old.node.querySelector("code").firstChild;
  text.appendData(token.text.slice(old.token.text.length));
  return true;
}

const BLOCKS = {
  blockquote: (token, depth) => el("blockquote", {}, ...drawBlocks(token.tokens, depth)),
  code: drawCode,
  // The page's own headings are of the first and second level
  heading: (token, depth) =>
    el(`h${Math.min(token.depth + 2, 6)}`, {}, ...drawInline(token.tokens, depth)),
  hr: () => el("hr"),
  html: (token) => el("p", { class: "as-it-is" }, token.raw.trimEnd()),
  list: drawList,
  paragraph: (token, depth) => el("p", {}, ...drawInline(token.tokens, depth)),
  table: drawTable,
};

function drawBlock(token, depth) {
  const draw = depth < DEEPEST && BLOCKS[token.type];
  return draw ? draw(token, depth + 1) : el("p", { class: "as-it-is" }, token.raw);
}

function drawBlocks(tokens, depth) {
  const nodes = [];
  for (const token of tokens) {
    if (token.type === "space") continue;
    // Of a list without empty lines between its items
    if (token.type === "text") nodes.push(...drawInline(token.tokens ?? [token], depth));
    else if (token.type === "checkbox") nodes.push(...drawInline([token], depth));
    else nodes.push(drawBlock(token, depth));
  }
  return nodes;
}

function drawCode(token) {
  const code = el("code", {}, document.createTextNode(token.text));
  const language = (token.lang ?? "").split(/\s/)[0].slice(0, 30);
  const scroller = el("pre", { tabindex: 0, role: "region" }, code);
  sayAttribute(scroller, "aria-label", "code");
  return el(
    "div",
    { class: "code" },
    el(
      "div",
      { class: "code-head" },
      el("span", {}, language),
      copyButton("copyCode", () => code.textContent),
    ),
    scroller,
  );
}

function drawList(token, depth) {
  const list = el(token.ordered ? "ol" : "ul", token.ordered ? { start: token.start } : {});
  for (const item of token.items) list.append(el("li", {}, ...drawBlocks(item.tokens, depth)));
  return list;
}

function drawTable(token, depth) {
  const row = (cells, tag) =>
    el(
      "tr",
      {},
      ...cells.map((cell, n) =>
        el(
          tag,
          { class: token.align[n] && `align-${token.align[n]}` },
          ...drawInline(cell.tokens, depth),
        ),
      ),
    );
  const table = el(
    "table",
    {},
    el("thead", {}, row(token.header, "th")),
    el("tbody", {}, ...token.rows.map((cells) => row(cells, "td"))),
  );
  const scroller = el("div", { class: "table", tabindex: 0, role: "region" }, table);
  sayAttribute(scroller, "aria-label", "table");
  return scroller;
}

const INLINE = {
  br: () => el("br"),
  checkbox: (token) => (token.checked ? "☑ " : "☐ "),
  codespan: (token) => el("code", {}, token.text),
  del: (token, depth) => el("del", {}, ...drawInline(token.tokens, depth)),
  em: (token, depth) => el("em", {}, ...drawInline(token.tokens, depth)),
  escape: (token) => token.text,
  // Nothing is loaded from elsewhere
  image: (token) =>
    drawLink(token, [el("span", { say: "image" }), `: ${token.text || token.href}`]),
  link: (token, depth) => drawLink(token, drawInline(token.tokens, depth)),
  strong: (token, depth) => el("strong", {}, ...drawInline(token.tokens, depth)),
  text: (token, depth) =>
    token.tokens ? drawInline(token.tokens, depth) : [decodeEntities(token.text)],
};

function drawInline(tokens, depth) {
  return tokens.flatMap((token) => {
    const draw = depth < DEEPEST && INLINE[token.type];
    return draw ? draw(token, depth + 1) : [token.raw];
  });
}

/** A link where it leads somewhere on the web, else its text with the address behind it. */
function drawLink(token, children) {
  const href = decodeEntities(token.href);
  if (!SAFE_PROTOCOLS.includes(protocolOf(href))) return [token.raw];
  return el("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

function protocolOf(href) {
  try {
    return new URL(href).protocol;
  } catch {
    return ""; // not a whole address
  }
}

function decodeEntities(text) {
  return text.replace(
    /&(?:#(\d{1,7})|#[xX]([\da-fA-F]{1,6})|([a-z]{2,4}));/g,
    (whole, decimal, hex, name) => {
      if (name) return ENTITIES[name] ?? whole;
      const code = decimal ? Number(decimal) : parseInt(hex, 16);
      return code > 0 && code <= 0x10ffff ? String.fromCodePoint(code) : "\ufffd";
    },
  );
}
