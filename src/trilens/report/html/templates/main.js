// Everything in order; the page says when it is whole, for whoever waits for it.
const redraws = [];

async function drawAll() {
  for (const key of Object.keys(linked)) delete linked[key];
  for (const element of $$("[data-block]")) {
    const block = page.blocks[element.dataset.block];
    if (block.is === "chart") await drawChart(element, block);
    if (block.is === "profiles") redraws.push(await drawProfiles(element, block));
  }
}

let drawing = Promise.resolve();
function recolour() {
  drawing = drawing.then(async () => {
    redraws.length = 0;
    tell("scheme");
    await drawAll();
    for (const again of heads) await again();
  });
  return drawing;
}

const heads = [];

function wireSchemes() {
  const buttons = $$(".schemes button");
  for (const button of buttons) {
    button.addEventListener("click", () => {
      buttons.forEach((each) => each.setAttribute("aria-pressed", String(each === button)));
      if (button.dataset.scheme) document.documentElement.dataset.scheme = button.dataset.scheme;
      else delete document.documentElement.dataset.scheme;
      recolour();
    });
  }
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", recolour);
  $("#copy")?.addEventListener("click", async () => {
    const text = $("#command").textContent;
    try { await navigator.clipboard.writeText(text); } catch { getSelection().selectAllChildren($("#command")); }
  });
}

async function start() {
  const text = new TextDecoder().decode(await inflate($("#trilens-data")));
  Object.assign(page, JSON.parse(text));
  page.codes = await Promise.all($$(".trilens-codes").map(inflate));
  buildStrip();
  wireTables();
  wireProfiles();
  for (const element of $$("[data-block]")) {
    const block = page.blocks[element.dataset.block];
    if (block.is === "lens") buildLens(element, block);
  }
  wireSchemes();
  const library = $("#trilens-library");
  if (library.textContent.trim()) {
    // Its hash is in the page's policy: no other text would run.
    const script = make("script");
    script.textContent = new TextDecoder().decode(await inflate(library));
    document.head.append(script);
    Bokeh.set_log_level("error");
    let next = 0;
    for (const element of $$("[data-block]")) {
      const block = page.blocks[element.dataset.block];
      if (block.is === "heads") heads.push(await buildHeads(element, block, page.codes[next++]));
    }
    await drawAll();
    on("token", () => redraws.forEach((update) => update()));
  }
  tell("ready");
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  document.documentElement.dataset.ready = "failed";
  $("main").prepend(make("p", { class: "warning" }, `The charts could not be drawn (${error.message}). Every table can still be read; a browser from 2023 or later draws them.`));
  console.error(error);
});
