// All heads in one picture; the pattern of one; the weights from or to the chosen token.
const TILE = 64; // cells of a tile's side in the overview
const GAP = 3;

function headData(block, codes) {
  const { side, causal, signed, steps, scales, heads, layers } = block;
  const size = causal ? (side * (side + 1)) / 2 : side * side;
  const starts = [];
  heads.reduce((sum, count, i) => { starts[i] = sum; return sum + count; }, 0);
  const squared = new Float32Array(256);
  for (let i = 0; i < 256; i++) {
    const part = signed ? i - 128 : i;
    squared[i] = Math.sign(part) * (Math.abs(part) / steps) ** 2;
  }
  const index = (layer, head) => starts[layer] + head;
  return {
    ...block, index,
    code: (h, q, k) => (causal && k > q ? (signed ? 128 : 0) : codes[h * size + (causal ? (q * (q + 1)) / 2 + k : q * side + k)]),
    weight(h, q, k) { return squared[this.code(h, q, k)] * scales[h]; },
    share(code) { const part = signed ? code - 128 : code; return part / steps; },
    most: Math.max(...heads), count: layers.length,
  };
}

// Tokens of a cell.
const cellWords = (data, i) => {
  const first = i * data.pool;
  const last = Math.min(first + data.pool, page.tokens.length) - 1;
  return last > first ? `${first}–${last} ${tokenText(first)}…` : placed(first);
};

// The head that is shown first: the last token's heaviest weight on a word or number that is neither
// the first token nor near by, where a head says least.
function telling(data) {
  let [best, found] = [-1, { layer: 0, head: 0 }];
  const q = data.side - 1;
  data.heads.forEach((count, layer) => {
    for (let head = 0; head < count; head++) {
      const h = data.index(layer, head);
      for (let k = 1; k <= q - Math.max(3, Math.ceil(data.side / 6)); k++) {
        if (!/[\p{L}\p{N}]/u.test(tokenText(k * data.pool))) continue;
        const size = Math.abs(data.signed ? data.share(data.code(h, q, k)) : data.weight(h, q, k));
        if (size > best) [best, found] = [size, { layer, head }];
      }
    }
  });
  return found;
}

// The head that was asked for, where this block has it.
function asked(data) {
  const layer = state.head ? data.layers.indexOf(state.head.layer) : -1;
  return layer >= 0 && state.head.head < data.heads[layer] ? { layer, head: state.head.head } : null;
}

async function buildHeads(element, block, codes) {
  const data = headData(block, codes);
  const pick = { ...(asked(data) ?? telling(data)), way: "from" };
  state.head ??= { layer: data.layers[pick.layer], head: pick.head };
  const [layerBox, headBox] = [$("select.layer", element), $("select.head", element)];
  layerBox.replaceChildren(...data.layers.map((layer, i) => make("option", { value: i }, String(layer))));
  const cell = () => Math.min(Math.floor(state.token / data.pool), data.side - 1);
  let redraw = { frame() {}, pattern: async () => {}, row() {} };

  function fillHeads() {
    headBox.replaceChildren(...[...Array(data.heads[pick.layer]).keys()].map((i) => make("option", { value: i }, String(i))));
  }

  async function select(layer, head) {
    pick.layer = layer;
    fillHeads();
    pick.head = Math.min(head, data.heads[layer] - 1);
    layerBox.value = layer; headBox.value = pick.head;
    element.dataset.layer = data.layers[layer]; element.dataset.head = pick.head;
    redraw.frame(); await redraw.pattern(); redraw.row();
  }

  async function pickOut(layer, head) {
    await select(layer, head);
    state.head = { layer: data.layers[pick.layer], head: pick.head };
    tell("head");
  }

  const name = () => `layer ${data.layers[pick.layer]}, head ${pick.head}`;
  const own = () => { tint.owner = element; }; // the chips show what was asked last
  element.addEventListener("pointerdown", own, true);
  element.addEventListener("change", own, true);
  layerBox.addEventListener("change", () => pickOut(Number(layerBox.value), pick.head));
  headBox.addEventListener("change", () => pickOut(pick.layer, Number(headBox.value)));
  for (const radio of $$("input[type=radio]", element)) {
    radio.addEventListener("change", () => { pick.way = radio.value; redraw.row(); });
  }

  function weights() {
    const h = data.index(pick.layer, pick.head);
    const at = cell();
    return [...Array(data.side).keys()].map((i) => (pick.way === "from" ? data.weight(h, at, i) : data.weight(h, i, at)));
  }

  async function draw() {
    rampKey(element, data.signed ? "−" : "0", data.signed ? "+" : "largest of the head", data.signed);
    redraw.frame = await mosaic();
    redraw.pattern = pattern;
    redraw.row = await rows();
    await select(pick.layer, pick.head);
  }

  async function mosaic() {
    const pool = Math.max(1, Math.ceil(data.side / TILE));
    const tile = Math.ceil(data.side / pool);
    const gap = Math.max(1, Math.round((tile * GAP) / TILE));
    const step = tile + gap;
    const [width, height] = [data.most * step + gap, data.count * step + gap];
    const paint = painter();
    const pixels = new Uint32Array(width * height);
    const background = parseInt(css("--line").slice(1), 16);
    pixels.fill((0xff000000 | ((background & 255) << 16) | (background & 0xff00) | (background >> 16)) >>> 0);
    for (let layer = 0; layer < data.count; layer++) {
      for (let head = 0; head < data.heads[layer]; head++) {
        const h = data.index(layer, head);
        for (let q = 0; q < tile; q++) {
          const y = height - 1 - (layer * step + gap + q); // rows of a picture count upwards
          for (let k = 0; k < tile; k++) {
            pixels[y * width + head * step + gap + k] = paint(largest(h, q * pool, k * pool, pool));
          }
        }
      }
    }
    function largest(h, q0, k0, n) {
      let best = 0;
      for (let q = q0; q < Math.min(q0 + n, data.side); q++) {
        for (let k = k0; k < Math.min(k0 + n, data.side); k++) {
          const share = data.share(data.code(h, q, k));
          if (Math.abs(share) > Math.abs(best)) best = share;
        }
      }
      return best;
    }
    const plot = $(".mosaic", element);
    // Square tiles, as large as there is room for.
    const room = Math.min((plot.clientWidth - 70) / width, (110 * data.most) / width, 640 / height);
    const found = figure({
      width: Math.round(width * room) + 70, height: Math.round(height * room) + 80, sizing_mode: "fixed",
      x_range: range(0, width), y_range: range(0, height), x_axis_label: "head", y_axis_label: "layer",
    });
    image(found, pixels, width, height, 0, 0);
    const centres = (n, flip) => [...Array(n).keys()].map((i) => (flip ? height - (i * step + gap + tile / 2) : i * step + gap + tile / 2));
    label(found.xaxis, centres(data.most, false), [...Array(data.most).keys()]);
    label(found.yaxis, centres(data.count, true), data.layers);
    const source = new Bokeh.ColumnDataSource({ data: { left: [0], right: [0], top: [0], bottom: [0] } });
    found.quad({ left: { field: "left" }, right: { field: "right" }, top: { field: "top" }, bottom: { field: "bottom" }, source, fill_color: null, line_color: css("--chosen"), line_width: 3 });
    const place = (x, y) => {
      const [head, layer] = [Math.floor((x - gap / 2) / step), Math.floor((height - y - gap / 2) / step)];
      if (layer < 0 || layer >= data.count || head < 0 || head >= data.heads[layer]) return null;
      const k = Math.min(Math.max(Math.floor(x - head * step - gap), 0), tile - 1) * pool;
      const q = Math.min(Math.max(Math.floor(height - y - layer * step - gap), 0), tile - 1) * pool;
      return { layer, head, q, k };
    };
    pointer(found, plot, (x, y) => {
      const at = place(x, y);
      if (!at) return "";
      const h = data.index(at.layer, at.head);
      let [best, q, k] = [0, at.q, at.k];
      for (let i = at.q; i < Math.min(at.q + pool, data.side); i++) {
        for (let j = at.k; j < Math.min(at.k + pool, data.side); j++) {
          const weight = data.weight(h, i, j);
          if (Math.abs(weight) > Math.abs(best)) [best, q, k] = [weight, i, j];
        }
      }
      return `layer ${data.layers[at.layer]}, head ${at.head}\nquery ${cellWords(data, q)}\nkey ${cellWords(data, k)}\nweight ${number(best)}`;
    }, (x, y) => {
      const at = place(x, y);
      if (at) pickOut(at.layer, at.head);
    });
    await mount(found, plot, `${data.scales.length} attention patterns, one tile per head; choose one with the lists above`);
    return () => {
      const [x, y] = [pick.head * step + gap, height - (pick.layer * step + gap)];
      source.data = { left: [x - gap / 2], right: [x + tile + gap / 2], top: [y + gap / 2], bottom: [y - tile - gap / 2] };
    };
  }

  function label(axis, at, words) {
    const every = Math.max(1, Math.ceil(at.length / 24));
    const shown = at.map((x, i) => [x, String(words[i])]).filter((_, i) => i % every === 0);
    axis.ticker = new Bokeh.FixedTicker({ ticks: shown.map(([x]) => x), minor_ticks: [] });
    axis.major_label_overrides = new Map(shown);
    axis.major_tick_line_color = null;
  }

  let patternPaint = null;
  async function pattern() {
    const h = data.index(pick.layer, pick.head);
    const n = data.side;
    $(".pattern-title", element).textContent = `Pattern of ${name()}`;
    const paint = painter();
    const pixels = new Uint32Array(n * n);
    for (let q = 0; q < n; q++) for (let k = 0; k < n; k++) pixels[(n - 1 - q) * n + k] = paint(data.share(data.code(h, q, k)));
    if (patternPaint) { patternPaint(pixels); return; }
    const plot = $(".pattern", element);
    const size = Math.min(560, Math.max(320, plot.clientWidth - 40));
    const found = figure({ height: size, x_range: range(0, n), y_range: range(0, n), x_axis_label: "key", y_axis_label: "query" });
    patternPaint = image(found, pixels, n, n, 0, 0);
    const every = Math.max(1, Math.ceil(n / Math.min(28, (size - 160) / 13))); // a line of text each
    const shown = [...Array(n).keys()].filter((i) => i % every === 0);
    const words = (i) => (data.pool > 1 ? String(i * data.pool) : n <= 64 ? short(placed(i), 12) : String(i));
    found.xaxis.ticker = new Bokeh.FixedTicker({ ticks: shown.map((i) => i + 0.5), minor_ticks: [] });
    found.xaxis.major_label_overrides = new Map(shown.map((i) => [i + 0.5, words(i)]));
    found.xaxis.major_label_orientation = n <= 64 ? Math.PI / 2 : 0;
    found.yaxis.ticker = new Bokeh.FixedTicker({ ticks: shown.map((i) => n - i - 0.5), minor_ticks: [] });
    found.yaxis.major_label_overrides = new Map(shown.map((i) => [n - i - 0.5, words(i)]));
    const source = new Bokeh.ColumnDataSource({ data: { left: [0], right: [0], top: [0], bottom: [0] } });
    found.quad({ left: { field: "left" }, right: { field: "right" }, top: { field: "top" }, bottom: { field: "bottom" }, source, fill_color: null, line_color: css("--chosen"), line_width: 2 });
    redraw.mark = () => {
      const at = cell();
      source.data = pick.way === "from" ? { left: [0], right: [n], top: [n - at], bottom: [n - at - 1] } : { left: [at], right: [at + 1], top: [n], bottom: [0] };
    };
    const place = (x, y) => {
      const [q, k] = [Math.floor(n - y), Math.floor(x)];
      return q < 0 || k < 0 || q >= n || k >= n ? null : [q, k];
    };
    pointer(found, plot, (x, y) => {
      const at = place(x, y);
      return at ? `query ${cellWords(data, at[0])}\nkey ${cellWords(data, at[1])}\nweight ${number(data.weight(data.index(pick.layer, pick.head), ...at))}` : "";
    }, (x, y) => {
      const at = place(x, y);
      if (at) choose((pick.way === "from" ? at[0] : at[1]) * data.pool);
    });
    await mount(found, plot, "pattern of the chosen head; the table below holds the weights of the chosen token");
  }

  async function rows() {
    const n = data.side;
    const plot = $(".row-plot", element);
    const y = new Bokeh.Range1d({ start: 0, end: 1 });
    const found = figure({ height: 230, x_range: range(-0.5, n - 0.5), y_range: y, x_axis_label: "", y_axis_label: "weight" });
    const [plus, minus] = SERIES[scheme()];
    const source = new Bokeh.ColumnDataSource({ data: { x: [], top: [], color: [] } });
    found.vbar({ x: { field: "x" }, top: { field: "top" }, bottom: 0, width: 0.8, color: { field: "color" }, source });
    const every = Math.max(1, Math.ceil(n / 40));
    const shown = [...Array(n).keys()].filter((i) => i % every === 0);
    found.xaxis.ticker = new Bokeh.FixedTicker({ ticks: shown, minor_ticks: [] });
    found.xaxis.major_label_overrides = new Map(shown.map((i) => [i, n <= 64 && data.pool === 1 ? short(placed(i), 12) : String(i * data.pool)]));
    found.xaxis.major_label_orientation = n <= 64 ? Math.PI / 2.6 : 0;
    let current = [];
    pointer(found, plot, (x) => (current[Math.round(x)] === undefined ? "" : `${pick.way === "from" ? "key" : "query"} ${cellWords(data, Math.round(x))}\nweight ${number(current[Math.round(x)])}`),
      (x) => { if (current[Math.round(x)] !== undefined) choose(Math.round(x) * data.pool); });
    await mount(found, plot, "weights of the chosen token; the table below holds them");
    return () => {
      current = weights();
      const spread = [Math.min(0, ...current), Math.max(0, ...current)];
      const pad = (spread[1] - spread[0] || 1) * 0.06;
      y.start = spread[0] < 0 ? spread[0] - pad : 0; y.end = spread[1] + pad;
      source.data = { x: current.map((_, i) => i), top: current, color: current.map((w) => (w < 0 ? minus : plus)) };
      const words = `${pick.way === "from" ? "what token" : "what attends to token"} ${placed(state.token)}${pick.way === "from" ? " attends to" : ""}, ${name()}`;
      $(".row-title", element).textContent = words[0].toUpperCase() + words.slice(1);
      redraw.mark?.();
      const spreadOut = data.pool === 1 ? current : page.tokens.map((_, i) => current[Math.floor(i / data.pool)]);
      tint.owner ??= element;
      if (tint.owner === element) tintChips(spreadOut, words);
      const box = $(".row-table", element);
      if (box.closest("details").open) box.replaceChildren(rowTable());
    };
    function rowTable() {
      const order = current.map((weight, i) => [i * data.pool, cellWords(data, i), weight]).sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
      return plainTable([{ title: "position" }, { title: "token", left: true }, { title: "weight" }], order);
    }
  }

  $(".row-table", element).closest("details").addEventListener("toggle", () => redraw.row());
  $(".row-csv", element).addEventListener("click", () =>
    download(`weights ${pick.way} token ${state.token} ${name()}`, ["position", "token", "weight"], weights().map((w, i) => [i * data.pool, tokenText(i * data.pool), w])));
  $(".pattern-csv", element).addEventListener("click", () => {
    const h = data.index(pick.layer, pick.head);
    const all = [];
    for (let q = 0; q < data.side; q++) for (let k = 0; k < (data.causal ? q + 1 : data.side); k++) all.push([q * data.pool, k * data.pool, data.weight(h, q, k)]);
    download(`pattern ${name()}`, ["query", "key", "weight"], all);
  });
  on("token", () => redraw.row());
  await draw();
  return async () => { patternPaint = null; await draw(); };
}
