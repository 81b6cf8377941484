// The explorer: runs the prompt of the form, keeps the state in the URL, offers edits of what is chosen.
const told = JSON.parse($("#explorer").dataset.told);
const wanted = { ...told.state, edits: [...told.state.edits] };
const plainLines = (text) => text.replace(/\r\n?/g, "\n"); // as a text box gives them back

function query(asked) {
  const parts = new URLSearchParams();
  if (asked.prompt) parts.append("prompt", asked.prompt);
  for (const edit of asked.edits) parts.append("edit", edit);
  for (const name of ["new", "layer", "head", "token"]) if (asked[name] !== null) parts.append(name, asked[name]);
  return `?${parts}`;
}

function readForm() {
  const typed = $("#prompt").value;
  if (typed !== plainLines(told.state.prompt)) wanted.prompt = typed;
  else wanted.prompt = told.state.prompt;
  wanted.new = Number($("#new").value || 0);
}

function showEdits() {
  $("#edits").replaceChildren(...wanted.edits.map((text, i) => {
    const remove = make("button", { type: "button", "aria-label": `Remove edit ${text}` }, "×");
    remove.addEventListener("click", () => { wanted.edits.splice(i, 1); showEdits(); $("#edit").focus(); });
    return make("li", {}, make("code", {}, text), remove);
  }));
}

function addEdit(text) {
  if (text && !wanted.edits.includes(text)) wanted.edits.push(text);
  showEdits();
}

function problem(text) {
  $("#problem").textContent = text;
  $("#problem").hidden = !text;
}

// Text of a model as it can be read: what turns the reading direction as its escape.
const legible = (text) => text.replace(/[^\P{C}\n\t]/gu, (char) => (/\p{Cn}|\p{Co}/u.test(char) ? char : `\\u${char.codePointAt(0).toString(16).padStart(4, "0")}`));

const writing = {};
function showPiece({ text: name, piece }) {
  const box = $("#writing");
  if ($("#written")) $("#written").hidden = true;
  box.hidden = false;
  if (!writing[name]) {
    writing[name] = make("pre", { "aria-label": name });
    box.append(make("div", {}, make("h3", {}, name), writing[name]));
  }
  writing[name].append(legible(piece));
}

let running = null;

function idle() {
  running = null;
  $("#go").disabled = false;
  $("#cancel").hidden = $("#progress").hidden = true;
}

async function runWanted() {
  if (running) return;
  readForm();
  problem("");
  running = new AbortController();
  $("#go").disabled = true;
  $("#cancel").hidden = $("#progress").hidden = false;
  $("#step").textContent = "starting";
  $("#progress progress").removeAttribute("value");
  $("#writing").replaceChildren();
  for (const name of Object.keys(writing)) delete writing[name];
  try {
    const asked = { ...wanted, layer: null, head: null, token: null };
    const answer = await fetch("/run", {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(asked), signal: running.signal, redirect: "error",
    });
    if (!answer.ok) { const { error, message } = await answer.json(); throw new Error(`${error}: ${message}`); }
    await follow(answer.body.pipeThrough(new TextDecoderStream()).getReader());
  } catch (error) {
    problem(error.name === "AbortError" ? "RunCancelledError: the run was cancelled" : error.name === "TypeError" ? "The server does not answer: start it again." : error.message);
    $("#writing").hidden = true;
    if ($("#written")) $("#written").hidden = false;
    idle();
  }
}

async function follow(reader) {
  let rest = "";
  let found = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done && found) { location.assign(query(wanted)); return; }
    if (done) throw new Error("The run ended without a result: run it again.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.error) throw new Error(`${event.error}: ${event.message}`);
      if (event.query !== undefined) found = true;
      if (event.piece !== undefined) showPiece(event);
      if (event.waiting) $("#step").textContent = `waiting: ${event.waiting} before this one`;
      if (event.what) {
        $("#step").textContent = event.what;
        $("#progress progress").value = event.done / event.total;
      }
    }
  }
}

function showChosen() {
  const box = $("#chosen");
  box.hidden = !told.run || !state.head;
  if (box.hidden) return;
  const { layer, head } = state.head;
  $("#chosen-words").textContent = `layer ${layer}, head ${head}; token ${placed(state.token)}`;
  $("#offered").replaceChildren(...(told.offered[layer] ?? []).map(({ words, edit }) => {
    const button = make("button", { type: "button" }, words);
    const text = edit.replace("{head}", head).replace("{token}", state.token);
    button.title = text;
    button.addEventListener("click", () => { addEdit(text); runWanted(); });
    return button;
  }));
}

function noteView() {
  wanted.token = state.token;
  wanted.layer = state.head?.layer ?? null;
  wanted.head = state.head?.head ?? null;
  history.replaceState(null, "", query({ ...told.state, token: wanted.token, layer: wanted.layer, head: wanted.head }));
  showChosen();
}

$("#prompt").value = told.state.prompt;
showEdits();
$("#explorer-form").addEventListener("submit", (event) => { event.preventDefault(); runWanted(); });
$("#prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("#explorer-form").requestSubmit(); } });
$("#cancel").addEventListener("click", () => running?.abort());
$("#add").addEventListener("click", () => { addEdit($("#edit").value.trim()); $("#edit").value = ""; });
$("#edit").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); $("#add").click(); } });
if (told.state.layer !== null && told.state.head !== null) state.head = { layer: told.state.layer, head: told.state.head };
on("ready", () => {
  if (told.run && told.state.token !== null) choose(told.state.token);
  showChosen();
  if (told.run) { on("head", noteView); on("token", noteView); }
  if (told.auto) runWanted();
});
