"""The explorer's answers: a run and its page, errors by name, texts that would like to be more."""

from __future__ import annotations

import asyncio
import gc
import html
import json
import threading

import pytest
import torch
from starlette.testclient import TestClient

import trilens
from page_cases import HOSTILE, Parsed, data_of
from trilens.edits import parse_edit
from trilens.errors import RunCancelledError
from trilens.explorer.app import model_app
from trilens.explorer.exploring import MAX_PROMPT_TOKENS, Explorer
from trilens.explorer.guard import MAX_BODY_BYTES, Rules
from trilens.explorer.page import knockouts
from trilens.explorer.state import State
from trilens.models.token_strings import token_strings

HOME = "http://127.0.0.1:8765"
PROMPT = "def area(r):\n    return r"
EDIT = "ablate:attn.z@2#5"
HEADERS = {"origin": HOME}


@pytest.fixture(scope="module")
def lens():
    return trilens.Lens.from_pretrained(trilens.demo_path("transformer"))


@pytest.fixture
def explorer(lens):
    return Explorer(lens, "<b>transformer</b>")


@pytest.fixture
def client(explorer):
    with TestClient(model_app(explorer, Rules(), seconds=60), base_url=HOME) as found:
        yield found


def events(answer) -> list[dict]:
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def post(client, **state):
    given = {"prompt": PROMPT, "edits": [], "new": 6, **state}
    return client.post("/run", json=given, headers=HEADERS)


def told(text: str) -> dict:
    tag = next(dict(each) for _, each in Parsed(text).tags if each.get("id") == "explorer")
    return json.loads(tag["data-told"])


def written(text: str) -> dict[str, str]:
    """The texts of a page by name, prompt and all."""
    found = {}
    for part in text.split("data-written=")[1:]:
        name, _, rest = part.partition(">")
        inner = rest.partition("</pre>")[0]
        for tag in ('<span class="given">', "</span>", "<mark>", "</mark>"):
            inner = inner.replace(tag, "")
        found[name.strip('"')] = html.unescape(inner)
    return found


def test_a_run_gives_a_page_with_the_texts_before_and_after(client, lens) -> None:
    found = events(post(client, edits=[EDIT]))
    assert [each for each in found if "what" in each]
    plain = lens.generate(PROMPT, max_new_tokens=6)
    edited = lens.generate(PROMPT, max_new_tokens=6, edits=[parse_edit(EDIT)])
    for name, text in (("without edits", plain.text), ("with edits", edited.text)):
        pieces = [each["piece"] for each in found if each.get("text") == name]
        assert "".join(pieces) == text
    page = client.get(f"/?{found[-1]['query']}")
    assert written(page.text) == {
        "without edits": PROMPT + plain.text,
        "with edits": PROMPT + edited.text,
    }
    # The report's own views, of the run with the edit.
    data = data_of(page.text)
    cap = lens.capture(PROMPT, edits=[parse_edit(EDIT)])
    tops = cap.logits[-1].float().softmax(-1).topk(1)
    tables = {each["table"]["title"]: each["table"] for each in data["blocks"]}
    bars = next(each for each in data["blocks"] if each["is"] == "chart" and each["x"] == "token"
                and each["y"] == ["probability"])  # fmt: skip
    assert bars["table"]["rows"][0][-1] == pytest.approx(float(tops.values[0]), rel=1e-3)
    moved = tables["next tokens whose probability changes most"]["rows"]
    effect = trilens.edit_effect(lens, PROMPT, parse_edit(EDIT))
    assert [row[1:3] for row in moved] == [[m.before, m.after] for m in effect.moved]
    assert {"is": "heads"}.items() <= next(b for b in data["blocks"] if b["is"] == "heads").items()


def test_what_is_looked_at_is_in_the_url_and_needs_no_run_of_its_own(client) -> None:
    state = State(prompt=PROMPT, new=6, layer=2, head=5, token=3)
    before = client.get(f"/?{state.query}", headers={"sec-fetch-site": "none"})
    assert told(before.text)["auto"] and not told(before.text)["run"]
    events(post(client))
    after = client.get(f"/?{state.query}", headers={"sec-fetch-site": "none"})
    found = told(after.text)
    assert found["run"] and not found["auto"]
    assert found["state"] == {**state.to_dict(), "edits": []}
    assert 'data-written="without edits"' in after.text


@pytest.mark.parametrize(
    ("site", "auto"), [("none", True), ("same-origin", True), ("cross-site", False), (None, False)]
)
def test_a_link_of_another_site_runs_nothing(client, site: str | None, auto: bool) -> None:
    headers = {} if site is None else {"sec-fetch-site": site}
    page = client.get(f"/?{State(prompt=PROMPT).query}", headers=headers)
    assert told(page.text)["auto"] is auto


def test_the_plain_run_of_a_prompt_is_made_once(client, lens, monkeypatch) -> None:
    made = []
    generate = lens.generate
    monkeypatch.setattr(
        lens, "generate", lambda *a, **k: made.append(k["edits"]) or generate(*a, **k)
    )
    for edits in ([], [EDIT], ["ablate:attn.z@1#0"]):
        events(post(client, edits=edits))
    assert [len(each) for each in made] == [0, 1, 1]


def test_there_is_one_copy_of_the_model_however_much_is_run(client, lens, monkeypatch) -> None:
    """Nothing loads a model, no weight is copied, and no run holds one when it has ended."""
    monkeypatch.setattr(trilens.Lens, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    weights = [each.data_ptr() for each in lens.model.parameters()]
    largest = max(lens.model.parameters(), key=lambda each: each.numel()).shape

    def copies() -> set[int]:
        gc.collect()
        alive = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
        return {each.untyped_storage().data_ptr() for each in alive if each.shape == largest}

    before = copies()
    assert lens.model.get_input_embeddings().weight.untyped_storage().data_ptr() in before
    for edits in ([], [EDIT], ["scale:resid_post@1 factor=0.5"]):
        events(post(client, edits=edits))
        assert copies() == before
    assert [each.data_ptr() for each in lens.model.parameters()] == weights


@pytest.mark.parametrize(
    ("state", "status", "error"),
    [
        ({"edits": ["ablate:attn.z@9"]}, 200, "EditRangeError"),
        ({"prompt": ""}, 200, "EmptyPromptError"),
        ({"prompt": "x " * (MAX_PROMPT_TOKENS + 10)}, 200, "PromptTooLongError"),
        ({"edits": ["nonsense"]}, 400, "EditError"),
        ({"edits": ["steer:resid_post@1 vector=v.npy"]}, 400, "EditError"),
        ({"new": 10_000}, 400, "OutOfRangeError"),
        ({"what": "x"}, 400, "UsageError"),
    ],
)
def test_errors_have_their_names_and_the_server_goes_on(client, state, status, error) -> None:
    answer = post(client, **state)
    assert answer.status_code == status
    last = json.loads(answer.text.splitlines()[-1])
    assert last["error"] == error and last["message"]
    assert "query" in events(post(client, new=1))[-1]


def test_a_crash_inside_the_model_is_named_and_nothing_stays_behind(client, lens) -> None:
    block = lens.anatomy.blocks[1].module

    def crash(*_: object) -> None:
        raise RuntimeError("out of memory: \x1b[31mred")

    hook = block.register_forward_pre_hook(crash)
    try:
        last = events(post(client))[-1]
    finally:
        hook.remove()
    assert last["error"] == "RuntimeError" and last["message"].startswith("out of memory: \\x1b")
    assert not block._forward_pre_hooks and not block._forward_hooks
    assert "query" in events(post(client))[-1]


def test_json_that_is_none_and_bodies_without_a_length(client) -> None:
    json_type = {"content-type": "application/json"}
    for body in (b"{", b"\xff\xfe", b"[" * 50_000, b""):
        answer = client.post("/run", content=body, headers=HEADERS | json_type)
        assert answer.status_code == 400, body[:9]
        assert answer.json()["error"] in ("RequestError", "UsageError")
    parts = (b"x" * 1000 for _ in range(MAX_BODY_BYTES // 1000 + 2))
    answer = client.post("/run", content=parts, headers=HEADERS | json_type)
    assert answer.status_code == 413 and answer.json()["error"] == "RequestError"


@pytest.mark.parametrize("token", HOSTILE)
def test_a_text_is_text_whatever_it_says(client, token: str) -> None:
    edit = f"ablate:attn.z@2#5 {token[:200]}"
    state = State(prompt=token[:3000], edits=(edit,))
    text = client.get("/", params=list(parts(state))).text
    parsed = Parsed(text)
    scripts = [each.get("type") for each, _ in parsed.scripts]
    assert scripts == ["application/octet-stream"] * 2 + [None]
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "b")]
    expected = state.prompt.encode("utf-8", "replace").decode()
    assert told(text)["state"]["prompt"] == expected
    assert "\x1b" not in text and "\u202e" not in text


def parts(state: State):
    yield "prompt", state.prompt.encode("utf-8", "replace").decode()
    for edit in state.edits:
        yield "edit", edit.encode("utf-8", "replace").decode()


def test_a_url_that_is_no_state_says_why(client) -> None:
    for query, words in (("layer=x", "layer 'x'"), ("<script>=1", "parameter '<script>'")):
        page = client.get(f"/?{query}")
        assert page.status_code == 400
        assert words in html.unescape(page.text) and "<script>'" not in page.text
    assert client.get("/etc/passwd").status_code == 404


def test_the_policy_of_the_page_is_the_reports_with_this_server_alone(client) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]
    meta = next(
        dict(each)["content"]
        for tag, each in Parsed(page.text).tags
        if dict(each).get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == f"{meta}; frame-ancestors 'none'"


@pytest.mark.parametrize("model", ["transformer", "rwkv7", "mamba"])
def test_every_edit_that_is_offered_can_be_made(model: str, quiet) -> None:
    lens = trilens.Lens.from_pretrained(trilens.demo_path(model))
    offered = knockouts(lens)
    assert sorted(offered) == list(range(lens.n_layers))
    for text in {each["edit"] for each in offered[lens.n_layers - 1]}:
        edit = parse_edit(text.replace("{head}", "0").replace("{token}", "1"))
        assert lens.capture("a = b + c", edits=[edit]).tokens


def test_tokens_that_are_written_are_the_models(client, lens) -> None:
    events(post(client))
    (text,) = written(client.get(f"/?{State(prompt=PROMPT, new=6).query}").text).values()
    ids = lens.generate(PROMPT, max_new_tokens=6).token_ids.tolist()
    assert text.removeprefix(PROMPT) == "".join(token_strings(ids, lens.tokenizer))


@pytest.mark.parametrize("stage", ["capturing", "writing"])
def test_a_run_that_is_cancelled_anywhere_leaves_the_model_as_it_was(stage: str) -> None:
    """Also while the model's steps are measured: that it does not generate is not remembered."""
    lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"))
    explorer = Explorer(lens, "transformer")
    state = State(prompt=PROMPT, new=3)

    def cancel(step) -> None:
        if step.what.startswith(f"{stage}") and "layer 2" in step.what:
            raise RunCancelledError("the run was cancelled")

    with pytest.raises(RunCancelledError):
        explorer.explore(state, cancel, lambda *_: None)
    (found,) = explorer.explore(state, lambda _: None, lambda *_: None).written
    assert found.text == lens.generate(PROMPT, max_new_tokens=3).text


def test_a_client_that_goes_away_cancels_its_run(explorer, lens) -> None:
    """Spoken to as a server speaks: the connection closes while the model writes."""
    app = model_app(explorer, Rules(), seconds=60)
    seen: list[bytes] = []
    before = threading.active_count()

    async def main() -> None:
        body = json.dumps({"prompt": PROMPT, "edits": [], "new": 200}).encode()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]
        away = asyncio.Event()

        async def receive():
            if incoming:
                return incoming.pop()
            await away.wait()
            return {"type": "http.disconnect"}

        async def send(message) -> None:
            if b"piece" in message.get("body", b""):
                seen.append(message["body"])
                away.set()

        scope = {
            "type": "http", "method": "POST", "path": "/run", "raw_path": b"/run", "headers": [
                (b"host", b"localhost"), (b"origin", b"http://localhost"),
                (b"content-type", b"application/json"),
            ], "query_string": b"", "scheme": "http", "http_version": "1.1",
            "server": ("localhost", 80), "client": ("127.0.0.1", 1), "root_path": "",
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 30)

    asyncio.run(main())
    assert 0 < len(seen) < 200
    # The thread that works has let go of the model: it can be captured and generates as before.
    assert lens.generate(PROMPT, max_new_tokens=2).tokens
    assert not [b.module for b in lens.anatomy.blocks if b.module._forward_pre_hooks]
    assert threading.active_count() <= before + 1
