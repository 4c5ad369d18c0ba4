"use strict";
// Sorts a table by the column whose head is clicked. Without it the page is complete, in the order of the report.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (!body || body.rows.length < 3) continue;
  const UNITS = { ms: 1e-3, min: 60, h: 3600 };
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text);
    if (Number.isNaN(number)) return text;
    const unit = text.match(/^-?[\d.]+(?:e-?\d+)? (ms|min|h)\b/);
    return unit ? number * UNITS[unit[1]] : number;
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a < b ? -1 : a > b ? 1 : 0;
  };
  for (const head of table.tHead.rows[0].cells) {
    const sort = () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [value(row, head.cellIndex), row]);
      rows.sort((a, b) => direction * compare(a[0], b[0]));
      body.append(...rows.map((entry) => entry[1]));
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        sort();
      }
    });
  }
  table.classList.add("sortable");
}
