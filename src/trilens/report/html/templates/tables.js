// Tables: every row of the data as CSV, and as rows where the file holds the first ones alone.
const FORMULA = /^[=+\-@\t\r]/;

function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = FORMULA.test(value) ? `'${value}` : String(value); // a spreadsheet would run it
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

const csvText = (names, rows) =>
  [names, ...rows].map((row) => row.map(csvCell).join(",")).join("\r\n") + "\r\n";

function download(name, names, rows) {
  const url = URL.createObjectURL(new Blob([csvText(names, rows)], { type: "text/csv" }));
  const link = make("a", { href: url, download: `${name.replace(/[^\p{L}\p{N}]+/gu, "-")}.csv` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

const MOST_ROWS = 20000;

function showAll(button, table) {
  const body = $(`table[data-table="${button.dataset.more}"] tbody`);
  const rows = table.rows.slice(0, MOST_ROWS).map((row) => make("tr", {}, ...row.map((value, i) => {
    const cell = make(i < table.keys ? "th" : "td", i < table.keys ? { scope: "row" } : {});
    if (table.columns[i].left) cell.className = "left";
    cell.append(make("bdi", {}, number(value)));
    return cell;
  })));
  body.replaceChildren(...rows);
  const left = table.rows.length - rows.length;
  button.replaceWith(left > 0 ? `The CSV has ${left.toLocaleString("en")} more rows.` : "");
}

function plainTable(columns, rows) {
  const head = make("tr", {}, ...columns.map((c) => make("th", { scope: "col", class: c.left ? "left" : "" }, c.title)));
  const body = rows.map((row) => make("tr", {}, ...row.map((value, i) =>
    make("td", { class: columns[i].left ? "left" : "" }, make("bdi", {}, number(value))))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

function wireTables() {
  for (const button of $$("button[data-csv]")) {
    const { table } = page.blocks[button.dataset.csv];
    const names = table.columns.map((column) => column.name);
    button.addEventListener("click", () => download(table.title || "table", names, table.rows));
  }
  for (const button of $$("button[data-more]")) {
    button.addEventListener("click", () => showAll(button, page.blocks[button.dataset.more].table));
  }
}
