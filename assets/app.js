// Enter or space on a cell of the atlas table chooses its row, as a click does: gradio tells of clicks alone.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" && event.key !== " ") return;
  const cell = event.target.closest?.("#dl-atlas-table [role=gridcell]");
  if (!cell) return;
  event.preventDefault();
  event.stopPropagation();
  for (const type of ["mousedown", "mouseup", "click"]) cell.dispatchEvent(new MouseEvent(type, { bubbles: true }));
}, true);

// gradio labels the table's search box by its title alone.
new MutationObserver(() => {
  const box = document.querySelector("#dl-atlas-table .search-input:not([aria-label])");
  if (box) box.setAttribute("aria-label", "Search the features");
}).observe(document.documentElement, { childList: true, subtree: true });
