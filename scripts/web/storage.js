// What the browser keeps, as JSON under names of ours. Where its storage is switched off, what is
// written is kept until the page is closed.

const PREFIX = "minimind.";
const MEMORY = new Map();

/** Whether a value is an object with names: what is stored may be anything. */
export const isObject = (value) =>
  typeof value === "object" && value !== null && !Array.isArray(value);

export const asText = (value) => (typeof value === "string" ? value : "");

function storage() {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}

/** The value of a name, or what to take where there is none or one that is not ours. */
export function read(name, otherwise) {
  try {
    const text = MEMORY.get(name) ?? storage()?.getItem(PREFIX + name);
    return text == null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

/** Keep a value; false where the browser has no room for it (then it is kept until the page is
 * closed). */
export function write(name, value) {
  const text = JSON.stringify(value);
  try {
    storage().setItem(PREFIX + name, text);
    MEMORY.delete(name);
    return true;
  } catch {
    MEMORY.set(name, text);
    return false;
  }
}

export function remove(name) {
  MEMORY.delete(name);
  try {
    storage()?.removeItem(PREFIX + name);
    // There may be room now for what had none
    for (const [waiting, text] of MEMORY) {
      storage().setItem(PREFIX + waiting, text);
      MEMORY.delete(waiting);
    }
  } catch {
    // Switched off, or still full
  }
}

/** Call with the name of a value that another tab changed. */
export function onChangeElsewhere(changed) {
  window.addEventListener("storage", (event) => {
    if (event.key?.startsWith(PREFIX)) changed(event.key.slice(PREFIX.length));
  });
}
