// Pictures of tables, drawn by BokehJS. What a pointer says is ours, so that no text is read as markup.
const linked = {};

function figure(options) {
  const found = Bokeh.Plotting.figure({
    tools: "pan,wheel_zoom,box_zoom,reset,save", active_drag: null, active_scroll: null,
    sizing_mode: "stretch_width", toolbar_location: "above", min_border: 4, ...options,
  });
  found.toolbar.logo = null;
  found.toolbar.autohide = true;
  return found;
}

const range = (start, end) => new Bokeh.Range1d({ start, end, bounds: [Math.min(start, end), Math.max(start, end)] });

// As many labels as do not touch: words side by side take their length, under one another a line.
function ticks(axis, labels, room) {
  const longest = Math.max(...labels.map((label) => short(label).length), 1);
  const every = Math.max(1, Math.ceil(labels.length / (room ? Math.max(2, room / (longest * 6.5 + 10)) : 64)));
  const shown = labels.map((label, i) => [i, label]).filter(([i]) => i % every === 0);
  axis.ticker = new Bokeh.FixedTicker({ ticks: shown.map(([i]) => i), minor_ticks: [] });
  axis.major_label_overrides = new Map(shown.map(([i, label]) => [i, short(label)]));
  axis.minor_tick_line_color = null;
}

// The end of a long name says more than its middle.
function short(label, most = 26) {
  const text = String(label);
  return text.length <= most ? text : `${text.slice(0, 8)}…${text.slice(9 - most)}`;
}

async function mount(found, element, words) {
  element.replaceChildren();
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", words);
  await Bokeh.Plotting.show(found, element);
  return found;
}

// `words(x, y)` is what stands under the pointer, "" for nothing; `act` is what a click does.
function pointer(found, element, words, act) {
  let last = null;
  element.onpointermove = (event) => { last = event; };
  found.on_event("mousemove", (event) => last && tip(words(event.x, event.y), last));
  found.on_event("mouseleave", () => tip(""));
  element.onpointerleave = () => tip("");
  if (act) found.on_event("tap", (event) => act(event.x, event.y));
}

function legend(element, names, colours) {
  const key = $(".key", element);
  if (!key) return;
  key.replaceChildren(...names.map((name, i) => {
    const mark = make("i");
    mark.style.background = colours[i % colours.length];
    return make("span", {}, mark, name);
  }));
}

function rampKey(element, low, high, diverging) {
  const key = $(".key, .ramp", element);
  if (!key) return;
  const mark = make("i", { class: "swatch" });
  mark.style.background = gradient(diverging);
  key.replaceChildren(make("span", {}, number(low)), mark, make("span", {}, number(high)));
}

const column = (table, name) => table.columns.findIndex((each) => each.name === name);
const values = (table, name) => table.rows.map((row) => row[column(table, name)]);
const heading = (table, name) => {
  const { title, unit } = table.columns[column(table, name)];
  return unit ? `${title} (${unit})` : title;
};

// Ranges of one name move together; each chart is a document of its own, so they tell each other.
function shared(block, axis, made) {
  if (!block.link) return made;
  const key = `${block.link} ${block.kind} ${axis} ${block.row} ${made.start} ${made.end}`;
  const group = (linked[key] ??= []);
  group.push(made);
  const follow = () => {
    for (const each of group) if (each.start !== made.start || each.end !== made.end) each.setv({ start: made.start, end: made.end });
  };
  made.properties.start.change.connect(follow);
  made.properties.end.change.connect(follow);
  return made;
}

function extent(all, log) {
  const there = all.filter((v) => v !== null && Number.isFinite(v) && (!log || v > 0));
  if (!there.length) return [0, 1];
  let [low, high] = [Math.min(...there), Math.max(...there)];
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.3, high * 1.3];
  const pad = (high - low || Math.abs(high) || 1) * 0.07;
  return [low - pad, high + pad];
}

const DRAW = {
  lines(block, element) {
    const { table } = block;
    const xs = values(table, block.x);
    const colours = SERIES[scheme()];
    const all = block.y.map((name) => values(table, name));
    const [low, high] = extent(all.flat(), block.log);
    const pad = xs.length > 1 ? (Math.max(...xs) - Math.min(...xs)) * 0.03 : 0.5;
    const found = figure({
      height: 230, x_axis_label: heading(table, block.x), y_axis_label: block.y.length > 1 ? "" : heading(table, block.y[0]),
      x_range: shared(block, "x", range(Math.min(...xs) - pad, Math.max(...xs) + pad)), y_range: new Bokeh.Range1d({ start: low, end: high }),
      y_axis_type: block.log ? "log" : "linear",
    });
    if (xs.every(Number.isInteger)) ticks2(found.xaxis, xs);
    block.y.forEach((name, i) => {
      const source = new Bokeh.ColumnDataSource({ data: { x: xs, y: all[i].map((v) => v ?? NaN) } });
      const color = colours[i % colours.length];
      found.line({ x: { field: "x" }, y: { field: "y" }, source, color, line_width: 2.5, line_dash: i % 2 ? "dashed" : "solid" });
      found.scatter({ x: { field: "x" }, y: { field: "y" }, source, color, size: 6, marker: ["circle", "square", "triangle", "diamond"][i % 4] });
    });
    if (block.y.length > 1) legend(element, block.y.map((name) => heading(table, name)), colours);
    const words = (x) => {
      const i = nearest(xs, x);
      return [`${heading(table, block.x)} ${xs[i]}`, ...block.y.map((name, j) => `${heading(table, name)}: ${number(all[j][i])}`)].join("\n");
    };
    return [found, words];
  },

  bars(block, element) {
    const { table } = block;
    const names = values(table, block.x).map(String);
    const n = names.length;
    const found = figure({
      height: Math.min(1400, 70 + 20 * n), y_range: range(n - 0.5, -0.5), x_axis_label: heading(table, block.y[0]),
    });
    ticks(found.yaxis, names);
    const [plus, minus] = SERIES[scheme()];
    const found_values = values(table, block.y[0]).map((v) => v ?? 0);
    const data = { y: names.map((_, i) => i), right: found_values, color: found_values.map((v) => (v < 0 ? minus : plus)) };
    found.hbar({ y: { field: "y" }, right: { field: "right" }, left: 0, height: 0.7, color: { field: "color" }, source: new Bokeh.ColumnDataSource({ data }) });
    return [found, (x, y) => names[Math.round(y)] === undefined ? "" : `${names[Math.round(y)]}\n${heading(table, block.y[0])}: ${number(found_values[Math.round(y)])}`];
  },

  scatter(block, element) {
    const { table } = block;
    const [xs, ys] = [values(table, block.x), values(table, block.y[0])];
    const names = block.label ? values(table, block.label) : xs.map(() => "");
    const [left, right] = extent(xs);
    const [low, high] = extent(ys);
    const found = figure({ height: 300, x_axis_label: heading(table, block.x), y_axis_label: heading(table, block.y[0]),
      x_range: new Bokeh.Range1d({ start: left, end: right }), y_range: new Bokeh.Range1d({ start: low, end: high }) });
    const data = { x: xs.map((v) => v ?? NaN), y: ys.map((v) => v ?? NaN) };
    found.scatter({ x: { field: "x" }, y: { field: "y" }, size: 9, fill_alpha: 0.55, color: SERIES[scheme()][0], source: new Bokeh.ColumnDataSource({ data }) });
    return [found, (x, y) => {
      const far = xs.map((v, i) => ((v - x) / (right - left)) ** 2 + ((ys[i] - y) / (high - low)) ** 2);
      const i = far.indexOf(Math.min(...far.map((d) => (Number.isNaN(d) ? Infinity : d))));
      return i < 0 || far[i] > 0.004 ? "" : `${names[i]}\n${heading(table, block.x)}: ${number(xs[i])}\n${heading(table, block.y[0])}: ${number(ys[i])}`;
    }];
  },

  histogram(block, element) {
    const { table } = block;
    const [left, right] = [values(table, block.x), values(table, block.until)];
    const all = block.y.map((name) => values(table, name));
    const sums = left.map((_, i) => all.reduce((sum, each) => sum + each[i], 0));
    const top = Math.max(...sums) * 1.08 || 1;
    const found = figure({ height: 230, x_axis_label: table.columns[column(table, block.x)].unit || block.title, y_axis_label: block.y.length > 1 ? "" : heading(table, block.y[0]),
      x_range: new Bokeh.Range1d({ start: left[0], end: right.at(-1) }), y_range: new Bokeh.Range1d({ start: 0, end: top }) });
    if (all.flat().every(Number.isInteger)) found.yaxis.ticker = new Bokeh.BasicTicker({ min_interval: 1, num_minor_ticks: 0 });
    const colours = SERIES[scheme()];
    const floor = left.map(() => 0);
    all.forEach((each, i) => {
      const bottom = [...floor];
      each.forEach((v, j) => { floor[j] += v; });
      found.quad({ left: { field: "left" }, right: { field: "right" }, top: { field: "top" }, bottom: { field: "bottom" }, color: colours[i % colours.length], line_color: css("--card"),
        source: new Bokeh.ColumnDataSource({ data: { left, right, bottom, top: [...floor] } }) });
    });
    for (const x of block.marks) {
      found.line({ x: [x, x], y: [0, top], color: css("--ink"), line_width: 1.5, line_dash: "dashed" });
    }
    if (all.length > 1) legend(element, block.y.map((name) => heading(table, name)), colours);
    return [found, (x) => {
      const i = left.findIndex((low, j) => x >= low && x < right[j]);
      return i < 0 ? "" : [`${number(left[i])} … ${number(right[i])}`, ...block.y.map((name, j) => `${heading(table, name)}: ${number(all[j][i])}`)].join("\n");
    }];
  },

  heatmap(block, element) {
    const { table } = block;
    const unique = (list) => [...new Set(list)].sort((a, b) => (typeof a === "number" ? a - b : 0));
    const [xs, rows] = [unique(values(table, block.x)), unique(values(table, block.row))];
    const grid = rows.map(() => xs.map(() => null));
    for (const row of table.rows) grid[rows.indexOf(row[column(table, block.row)])][xs.indexOf(row[column(table, block.x)])] = row;
    const at = column(table, block.y[0]);
    const all = table.rows.map((row) => row[at]).filter((v) => v !== null);
    const high = Math.max(...all.map(Math.abs), 1e-300);
    const [low, top] = block.scale ?? (block.diverging ? [-high, high] : spread(all));
    const named = (x) => `${x} ${table.rows.find((row) => row[column(table, block.x)] === x)[column(table, block.label)]}`;
    const paint = painter();
    const pixels = new Uint32Array(rows.length * xs.length);
    grid.forEach((line, i) => line.forEach((row, j) => {
      if (row && row[at] !== null) pixels[i * xs.length + j] = paint(block.diverging ? row[at] / top : (row[at] - low) / (top - low));
    }));
    const found = figure({
      height: Math.min(900, Math.max(150, 96 + rows.length * 20)), x_axis_label: heading(table, block.x), y_axis_label: heading(table, block.row),
      x_range: shared(block, "x", range(-0.5, xs.length - 0.5)), y_range: shared(block, "y", range(-0.5, rows.length - 0.5)),
    });
    ticks(found.xaxis, block.label ? xs.map(named) : xs, element.clientWidth - 90); ticks(found.yaxis, rows);
    image(found, pixels, xs.length, rows.length, -0.5, -0.5);
    if (all.length && all.every((v) => v === all[0])) $(".key", element)?.replaceChildren(make("span", {}, `${number(all[0])} everywhere`));
    else rampKey(element, low, top, block.diverging);
    return [found, (x, y) => {
      const row = grid[Math.round(y)]?.[Math.round(x)];
      return row ? row.map((value, i) => `${heading(table, table.columns[i].name)}: ${number(value)}`).join("\n") : "";
    }];
  },
};

// From 0, unless all values lie far from it and close together: their differences would not show.
function spread(all) {
  const [low, high] = [Math.min(...all), Math.max(...all)];
  if (low > 0.5 * high && high > low) return [low, high];
  return low === high ? [low - 1, high + 1] : [Math.min(0, low), Math.max(0, high)];
}

function ticks2(axis, xs) {
  const every = Math.max(1, Math.ceil(xs.length / 16));
  axis.ticker = new Bokeh.FixedTicker({ ticks: xs.filter((_, i) => i % every === 0), minor_ticks: [] });
}

function nearest(xs, x) {
  let best = 0;
  xs.forEach((each, i) => { if (Math.abs(each - x) < Math.abs(xs[best] - x)) best = i; });
  return best;
}

function image(found, pixels, width, height, x, y) {
  const { ndarray } = Bokeh.require("core/util/ndarray");
  const array = ndarray(pixels, { dtype: "uint32", shape: [height, width] });
  const source = new Bokeh.ColumnDataSource({ data: { image: [array], x: [x], y: [y], dw: [width], dh: [height] } });
  found.xgrid.visible = false; found.ygrid.visible = false;
  found.image_rgba({ image: { field: "image" }, x: { field: "x" }, y: { field: "y" }, dw: { field: "dw" }, dh: { field: "dh" }, source });
  return (fresh) => {
    source.data = { image: [ndarray(fresh, { dtype: "uint32", shape: [height, width] })], x: [x], y: [y], dw: [width], dh: [height] };
  };
}

async function drawChart(element, block) {
  const [found, words] = DRAW[block.kind](block, element);
  const plot = $(".plot", element);
  pointer(found, plot, words);
  await mount(found, plot, `${block.title}: a ${block.kind} chart; the table below holds its numbers`);
}
