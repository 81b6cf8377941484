"""What is shown without a model: captures, comparisons, stores and reports; newer ones are not."""

from __future__ import annotations

import base64
import json
import re
import zlib

import pytest
from starlette.testclient import TestClient

import trilens
from page_cases import data_of
from trilens.errors import CorruptFileError, LoadError, UnsafeFormatError
from trilens.explorer.app import saved_app
from trilens.explorer.guard import Rules
from trilens.explorer.saved import is_saved, open_saved
from trilens.io.sealed import sealed
from trilens.io.tensors import read_tensors, write_tensors
from trilens.lens.saved_capture import FORMAT, VERSION

PROMPT = "def area(r): return r"
OPTIONS = trilens.StoreOptions(sites=("resid_post",), layers=(1, 2))


@pytest.fixture(scope="module")
def lens():
    return trilens.Lens.from_pretrained(trilens.demo_path("transformer"))


def served(saved) -> str:
    app = saved_app(saved, Rules())
    answer = TestClient(app, base_url="http://127.0.0.1:8765").get("/")
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == saved.policy
    assert "frame-ancestors 'none'" in saved.policy and "default-src 'none'" in saved.policy
    return answer.text


def test_a_capture(lens, tmp_path) -> None:
    file = lens.capture(PROMPT, residual="all", attention=True).save(tmp_path / "a.safetensors")
    assert is_saved(file)
    kinds = [each["is"] for each in data_of(served(open_saved(file)))["blocks"]]
    assert "heads" in kinds and "profiles" in kinds


def test_a_comparison(lens, tmp_path) -> None:
    folder = trilens.compare(lens, lens, [PROMPT]).save(tmp_path / "comparison")
    assert is_saved(folder)
    assert "KL" in served(open_saved(folder))


def test_a_store(lens, tmp_path) -> None:
    folder = tmp_path / "store"
    trilens.capture_corpus(lens, [PROMPT, "x = 1"], folder, options=OPTIONS)
    assert is_saved(folder)
    table = data_of(served(open_saved(folder)))["blocks"][0]["table"]
    store = trilens.open_store(folder)
    shape = "×".join(map(str, [store.n_tokens, lens.d_model]))
    assert [row[:2] + row[3:4] for row in table["rows"]] == [
        ["resid_post", 1, shape],
        ["resid_post", 2, shape],
    ]
    manifest = folder / "store.json"
    found = json.loads(manifest.read_text())
    found.pop("sha256", None)
    manifest.write_bytes(sealed({**found, "version": 99}))
    with pytest.raises(CorruptFileError, match=r"version 99: .*install a newer trilens"):
        open_saved(folder)


def test_a_capture_or_comparison_of_a_newer_version_is_refused(lens, tmp_path) -> None:
    file = lens.capture(PROMPT, residual="all").save(tmp_path / "a.safetensors")
    tensors, manifest = read_tensors(file, FORMAT, VERSION)
    write_tensors(file, tensors, {**manifest, "version": VERSION + 1})
    with pytest.raises(CorruptFileError, match=f"version {VERSION + 1}: .*install a newer trilens"):
        open_saved(file)
    folder = trilens.compare(lens, lens, [PROMPT]).save(tmp_path / "comparison")
    manifest = folder / "comparison.json"
    found = json.loads(manifest.read_text())
    found.pop("sha256", None)
    manifest.write_bytes(sealed({**found, "version": found["version"] + 1}))
    with pytest.raises(CorruptFileError, match=r"version 2: .*install a newer trilens"):
        open_saved(folder)


def test_a_report(lens, tmp_path) -> None:
    file = tmp_path / "a.html"
    trilens.make_report(lens.capture(PROMPT, residual="all"), lens=lens).save(file)
    saved = open_saved(file)
    assert served(saved) == file.read_text()
    # A file that somebody sent has an origin of its own, and asks nothing of this server.
    assert saved.policy.startswith("sandbox allow-scripts")
    assert "allow-same-origin" not in saved.policy and "connect-src" not in saved.policy


def with_data(text: str, data: bytes) -> str:
    packed = base64.b64encode(data).decode()
    return re.sub(r'(id="trilens-data">)[^<]*', rf"\g<1>{packed}", text)


def test_a_report_of_a_newer_version_or_a_damaged_one_is_refused(lens, tmp_path) -> None:
    file = tmp_path / "a.html"
    text = trilens.make_report(lens.capture(PROMPT, residual="all"), lens=lens).html
    newer = zlib.compress(json.dumps({**data_of(text), "version": 2}).encode())
    for changed, words in (
        (with_data(text, newer), "version 2: this trilens reads version 1"),
        (with_data(text, zlib.compress(b"[]")), "not a whole report"),
        (with_data(text, zlib.compress(b'{"version": "1"}')), "version '1'"),
        (with_data(text, b"x"), "not a whole report"),
        ("<html><script>alert(1)</script>", "no report of trilens"),
        ("", "no report of trilens"),
    ):
        file.write_text(changed)
        with pytest.raises(CorruptFileError, match=words):
            open_saved(file)


def test_what_is_none_of_these(tmp_path) -> None:
    for name, error in (("a.safetensors", CorruptFileError), ("a.pt", UnsafeFormatError)):
        file = tmp_path / name
        file.write_bytes(b"x" * 100)
        assert is_saved(file)
        with pytest.raises((error, LoadError)):
            open_saved(file)
    assert not is_saved(tmp_path) and not is_saved(tmp_path / "nothing")
    assert not is_saved(trilens.demo_path("transformer"))
