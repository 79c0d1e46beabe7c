// Runs before anything is drawn, so that the page never flashes in the wrong colours.
// "dark" or "light" where the reader chose one; without either, style.css follows the system.
try {
  const chosen = JSON.parse(localStorage.getItem("minimind.theme"));
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is switched off, or not ours: follow the system.
}
