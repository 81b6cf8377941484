// Data, state and words that every part of the page shares.
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children); // text nodes: no markup of a token is ever read
  return element;
}

async function inflate(element) {
  const binary = atob(element.textContent.trim());
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const page = { tokens: [], blocks: [], codes: [] };
const state = { token: 0, head: null }; // head: { layer, head }, the one that was chosen last
const listeners = { token: [], head: [], scheme: [], ready: [] };
const on = (what, call) => listeners[what].push(call);
const tell = (what) => listeners[what].forEach((call) => call());

function choose(token) {
  const last = page.tokens.length - 1;
  const at = Math.min(Math.max(token, 0), Math.max(last, 0));
  if (at === state.token) return;
  state.token = at;
  tell("token");
}

function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  if (value === 0 || Number.isInteger(value)) return String(value).replace("-", "−");
  const size = Math.abs(value);
  const text = size >= 1e-3 && size < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(1);
  return text.replace("-", "−");
}

const tokenText = (i) => page.tokens[i] ?? "";
const placed = (i) => (page.tokens.length ? `${i} ${tokenText(i)}` : String(i));

// Colours. Blue and orange part for every kind of colour vision; ramps are even in lightness.
const RAMPS = {
  light: { plus: ["#ffffff", "#cfe3f5", "#8fbfe3", "#4a90c8", "#1c5fa5", "#08306b"],
    minus: ["#ffffff", "#fde0c8", "#fbb77f", "#ee8234", "#c4530a", "#7f2704"] },
  dark: { plus: ["#1b1f26", "#173a5e", "#1f6099", "#3f8fd0", "#8cc4f5", "#e6f3ff"],
    minus: ["#1b1f26", "#5a2d10", "#984a14", "#d9742b", "#ffb078", "#fff0e2"] },
};
const SERIES = {
  light: ["#0b5cad", "#c2410c", "#00795b", "#a3468a", "#9a6700", "#3a8fc4"],
  dark: ["#6db3ff", "#ff9d5c", "#3fd0a3", "#e69acb", "#f2c14e", "#9ad8ff"],
};

function scheme() {
  if (matchMedia("print").matches) return "light"; // paper is white
  const asked = document.documentElement.dataset.scheme;
  if (asked) return asked;
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

// Whether words on a tint of this share need the other ink.
const strong = (share) => share > (scheme() === "dark" ? 0.66 : 0.85);

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function stops(colours) {
  const parts = colours.map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
  const table = new Uint32Array(256);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (parts.length - 1);
    const low = Math.min(Math.floor(at), parts.length - 2);
    const [r, g, b] = parts[low].map((x, j) => Math.round(x + (parts[low + 1][j] - x) * (at - low)));
    table[i] = ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  }
  return table;
}

// share in [−1, 1] → a pixel
function painter() {
  const ramp = RAMPS[scheme()];
  const [plus, minus] = [stops(ramp.plus), stops(ramp.minus)];
  return (share) => {
    const i = Math.min(255, Math.round(Math.abs(share) * 255));
    return share < 0 ? minus[i] : plus[i];
  };
}

function gradient(diverging) {
  const { plus, minus } = RAMPS[scheme()];
  const colours = diverging ? [...minus.slice(1).reverse(), ...plus] : plus;
  return `linear-gradient(to right, ${colours.join(",")})`;
}

// One tooltip for all charts; it follows the pointer.
function tip(text, event) {
  const box = $("#tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  const { innerWidth: width, innerHeight: height } = window;
  const { offsetWidth: w, offsetHeight: h } = box;
  const x = event.clientX + 14 + w > width ? event.clientX - w - 10 : event.clientX + 14;
  const y = event.clientY + 14 + h > height ? event.clientY - h - 10 : event.clientY + 14;
  box.style.left = `${Math.max(4, x)}px`;
  box.style.top = `${Math.max(4, y)}px`;
}
