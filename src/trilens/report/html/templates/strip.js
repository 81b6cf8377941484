// The prompt as chips: one tab stop, arrows move the choice.
const tint = { weights: null, words: "", owner: null };

function buildStrip() {
  const box = $("#chips");
  if (!box) return;
  state.token = page.tokens.length - 1;
  const chips = page.tokens.map((text, i) => {
    const chip = make("span", { class: "chip", role: "option", tabindex: -1, "aria-selected": "false", "aria-label": `token ${i}: ${text}`, id: `chip-${i}` }, text || "∅");
    chip.dataset.i = i;
    return chip;
  });
  box.replaceChildren(...chips);
  let chosen = null;

  function show(focus) {
    if (chosen) { chosen.tabIndex = -1; chosen.setAttribute("aria-selected", "false"); }
    chosen = chips[state.token];
    chosen.tabIndex = 0;
    chosen.setAttribute("aria-selected", "true");
    const { offsetTop: top, offsetHeight: height } = chosen;
    if (top < box.scrollTop || top + height > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 2;
    if (focus) chosen.focus({ preventScroll: true });
    $("#strip-words").textContent = `token ${state.token} of ${page.tokens.length} is chosen${tint.words ? `; ${tint.words}` : ""}`;
  }

  box.addEventListener("click", (event) => {
    const chip = event.target.closest(".chip");
    if (chip) { choose(Number(chip.dataset.i)); show(true); }
  });
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
  box.addEventListener("keydown", (event) => {
    if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const to = state.token + steps[event.key];
    choose(to === Infinity ? page.tokens.length - 1 : to === -Infinity ? 0 : to);
    show(true);
  });
  box.addEventListener("pointerover", (event) => {
    const chip = event.target.closest(".chip");
    if (!chip) return;
    const weight = tint.weights?.[Number(chip.dataset.i)];
    tip(`${chip.getAttribute("aria-label")}${weight === undefined ? "" : `\nweight ${number(weight)}`}`, event);
  });
  box.addEventListener("pointerleave", () => tip(""));
  on("token", () => show(false));
  show(false);
}

// Colours the chips by weights of each token; `words` says what they are.
function tintChips(weights, words) {
  tint.weights = weights; tint.words = words;
  const high = Math.max(...weights.map(Math.abs), 1e-12);
  $$(".chip").forEach((chip, i) => {
    const share = Math.sqrt(Math.abs(weights[i] ?? 0) / high);
    shade(chip, share, weights[i] < 0);
    chip.classList.toggle("negative", weights[i] < 0);
  });
  const line = $("#strip-words");
  if (line) line.textContent = `token ${state.token} of ${page.tokens.length} is chosen; ${words}`;
}
