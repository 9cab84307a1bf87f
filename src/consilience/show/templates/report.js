// Click a heading to sort by it; the page reads the same without this.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value;
      const order = (x, y) => {
        const a = key(x), b = key(y);
        if (a === undefined && b === undefined) {
          return x.cells[column].textContent.localeCompare(y.cells[column].textContent, undefined, { numeric: true });
        }
        if (a === "" || b === "") return (a === "") - (b === "") || 0;  // without a number: always last
        return a - b;
      };
      const rows = [...body.rows].sort((x, y) => {
        const found = order(x, y);
        const last = key(x) === "" || key(y) === "";
        return down && !last ? -found : found;
      });
      body.append(...rows);
    });
  });
}
