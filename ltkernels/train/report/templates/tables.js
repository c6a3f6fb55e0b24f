for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const key = (row, i) => row.cells[i].dataset.key ?? row.cells[i].textContent;
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const numbers = rows.every((row) => !Number.isNaN(Number(key(row, i))));
    const compare = (a, b) => numbers ? key(a, i) - key(b, i) : key(a, i).localeCompare(key(b, i), undefined, {numeric: true});
    rows.sort((a, b) => up ? compare(a, b) : compare(b, a));
    body.append(...rows);
  }));
  if (rows.length < 12) continue;
  const search = Object.assign(document.createElement("input"), {type: "search", placeholder: "find a class"});
  search.setAttribute("aria-label", "find a class");
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  table.parentElement.before(search);
}
