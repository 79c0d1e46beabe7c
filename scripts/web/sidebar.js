// The list of conversations.

import { deleteChat, listChats } from "./chats.js";
import { el, iconButton } from "./dom.js";
import { say, t } from "./i18n.js";

const UNDO_MS = 10_000;

const node = document.querySelector("#chats");
const toast = document.querySelector("#toast");
let toastTimer;

/**
 * Draw the list.
 *
 * `actions`: open(id), rename(id, title), deleted(id), restored(id)
 */
export function drawSidebar(currentId, actions) {
  if (node.querySelector("input")) return; // a title is being edited; its end draws the list
  const focused = node.contains(document.activeElement) && document.activeElement.dataset.focus;
  node.replaceChildren(...listChats().map((entry) => item(entry, entry.id === currentId, actions)));
  if (focused) node.querySelector(`[data-focus="${focused}"]`)?.focus();
}

function item({ id, title }, isCurrent, actions) {
  const open = el("button", {
    type: "button",
    class: "chat-link",
    "aria-current": isCurrent ? "page" : null,
    "data-focus": `open-${id}`,
    click: () => actions.open(id),
  });
  if (title) open.append(title);
  else say(open, "untitled");
  open.title = title;
  const line = el("li", {}, open);
  const edit = iconButton("edit", "rename", () => showEditor(line, title, id, actions));
  edit.dataset.focus = `rename-${id}`;
  const remove = iconButton("trash", "delete", () => deleteWithUndo(id, title, actions));
  line.append(el("span", { class: "chat-actions" }, edit, remove));
  return line;
}

function showEditor(line, title, id, actions) {
  const field = el("input", { label: "rename", maxlength: 200, autocomplete: "off" });
  field.value = title;
  let open = true;
  const close = (save) => {
    if (!open) return;
    open = false;
    field.remove();
    actions.rename(id, (save && field.value.trim()) || title);
    node.querySelector(`[data-focus="rename-${id}"]`)?.focus();
  };
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault(); // else Enter would press the button that takes the focus
    event.stopPropagation();
    close(event.key === "Enter");
  });
  field.addEventListener("blur", () => close(true));
  line.replaceChildren(field);
  field.select();
}

function deleteWithUndo(id, title, actions) {
  const restore = deleteChat(id);
  actions.deleted(id);
  const [words, undo] = toast.children;
  say(words, "deleted", { title: title || t("untitled") });
  toast.hidden = false;
  undo.focus();
  const hide = () => {
    if (toast.contains(document.activeElement)) document.querySelector("#new-chat").focus();
    toast.hidden = true;
  };
  undo.onclick = () => {
    hide();
    restore();
    actions.restored(id);
  };
  clearTimeout(toastTimer);
  toastTimer = setTimeout(hide, UNDO_MS);
}
