// What each layer would predict: a grid of tokens, and lines of the chosen token.
const GRID = 48; // columns of a long prompt that are drawn at once, around the chosen token

function buildLens(element, block) {
  const box = $(".lens", element);
  const detail = $(".lens-detail", element);
  const { layers, positions, texts, top, probabilities } = block;
  let drawn = "";

  function windowed() {
    if (positions.length <= 2 * GRID) return [0, positions.length];
    const at = nearest(positions, state.token);
    const start = Math.min(Math.max(0, at - GRID / 2), positions.length - GRID);
    return [start - (start % 8), Math.min(positions.length, start - (start % 8) + GRID)];
  }

  function draw() {
    const [start, stop] = windowed();
    if (drawn !== `${start} ${stop}`) {
      drawn = `${start} ${stop}`;
      const columns = positions.slice(start, stop);
      const head = make("tr", {}, make("th", { scope: "col" }, "layer"), ...columns.map((p) => make("th", { scope: "col", "data-p": p, title: placed(p) }, make("bdi", {}, tokenText(p) || String(p)))));
      const rows = layers.map((layer, i) => make("tr", {}, make("th", { scope: "row" }, String(layer)), ...columns.map((p, j) => {
        const share = probabilities[i][start + j][0];
        const text = texts[top[i][start + j][0]];
        const cell = make("td", { "data-p": p, title: `layer ${layer}, after ${placed(p)}: ${text} ${number(share)}` }, make("bdi", {}, text));
        shade(cell, share);
        return cell;
      })));
      box.replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows.reverse())));
    }
    $$("[data-p]", box).forEach((cell) => cell.classList.toggle("chosen", Number(cell.dataset.p) === state.token));
    const chosen = $("th.chosen", box);
    if (chosen) {
      const left = chosen.offsetLeft;
      if (left < box.scrollLeft + 60 || left + chosen.offsetWidth > box.scrollLeft + box.clientWidth) box.scrollLeft = left - box.clientWidth / 2;
    }
    const j = positions.indexOf(state.token);
    if (j < 0) { detail.replaceChildren(make("p", { class: "words" }, "The report does not hold this token's predictions.")); return; }
    const columns = [{ title: "layer" }, ...top[0][j].map((_, k) => ({ title: `prediction ${k + 1}`, left: true }))];
    const rows = layers.map((layer, i) => [layer, ...top[i][j].map((id, k) => `${texts[id]}  ${probabilities[i][j][k].toFixed(2)}`)]);
    detail.replaceChildren(make("h3", {}, `After token ${placed(state.token)}`), make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "predictions of each layer" }, plainTable(columns, rows.reverse())));
  }

  box.addEventListener("click", (event) => {
    const cell = event.target.closest("[data-p]");
    if (cell) choose(Number(cell.dataset.p));
  });
  on("token", draw);
  on("scheme", () => { drawn = ""; draw(); });
  draw();
}

async function drawProfiles(element, block) {
  const colours = SERIES[scheme()];
  const updates = [];
  for (const place of $$("[data-profile]", element)) {
    const i = Number(place.dataset.profile);
    const { title, unit } = block.columns[i];
    const [layers, grid] = [block.layers[i], block.values[i]];
    const bounds = grid.map((row) => extent(row.filter((v) => v !== null)));
    const thin = (row) => row.filter((v) => v !== null);
    const low = grid.map((row) => Math.min(...thin(row)));
    const high = grid.map((row) => Math.max(...thin(row)));
    const [bottom, top] = extent([...low, ...high]);
    const pad = layers.length > 1 ? 0.15 : 0.5;
    const found = figure({ height: 200, x_axis_label: "layer", x_range: shared({ link: "profiles", kind: "lines", row: "" }, "x", range(layers[0] - pad, layers.at(-1) + pad)), y_range: new Bokeh.Range1d({ start: bottom, end: top }) });
    ticks2(found.xaxis, layers);
    found.varea({ x: layers, y1: low, y2: high, fill_color: colours[0], fill_alpha: 0.16 });
    const line = () => grid.map((row) => row[Math.min(state.token, row.length - 1)] ?? NaN);
    const source = new Bokeh.ColumnDataSource({ data: { x: layers, y: line() } });
    found.line({ x: { field: "x" }, y: { field: "y" }, source, color: colours[0], line_width: 2.5 });
    found.scatter({ x: { field: "x" }, y: { field: "y" }, source, color: colours[0], size: 6 });
    updates.push(() => { source.data = { x: layers, y: line() }; });
    const plot = $(".plot", place);
    pointer(found, plot, (x) => {
      const k = nearest(layers, x);
      const words = unit ? `${title} (${unit})` : title;
      return `layer ${layers[k]}, token ${placed(state.token)}\n${words}: ${number(line()[k])}\nall tokens: ${number(low[k])} … ${number(high[k])}`;
    });
    await mount(found, plot, `${title} of the chosen token by layer; the table below holds its numbers`);
  }
  return () => updates.forEach((update) => update());
}

function wireProfiles() {
  for (const button of $$("button[data-profiles]")) {
    const block = page.blocks[button.dataset.profiles];
    const names = ["layer", "position", "token", ...block.columns.map((c) => c.name)];
    button.addEventListener("click", () => {
      const layers = [...new Set(block.layers.flat())].sort((a, b) => a - b);
      const rows = layers.flatMap((layer) => page.tokens.map((token, p) => [layer, p, token, ...block.columns.map((_, i) => {
        const at = block.layers[i].indexOf(layer);
        return at < 0 ? null : block.values[i][at][p];
      })]));
      download("layers", names, rows);
    });
  }
}
