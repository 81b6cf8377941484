"""The hub path, against a hub of our own on this machine's loopback: no test leaves the machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from loading_cases import refused
from trilens import errors
from trilens.io import hub
from trilens.models.loading import load

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub as a download asks for: the model's page, its tree, its files."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []
        self.refusal: tuple[int, str] | None = None
        self.file_refusal: tuple[int, str] | None = None
        self.silent = False


class Answers(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.server.silent:
            time.sleep(3)
            return
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.page("/".join(parts[2:4]), parts[4:])
        else:
            self.file("/".join(parts[:2]), "/".join(parts[4:]))

    def refuse(self, status, code):
        self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def page(self, repo, rest):
        files = self.server.repos.get(repo)
        if self.server.refusal:
            return self.refuse(*self.server.refusal)
        if files is None:
            return self.refuse(404, "RepoNotFound")
        if rest[:1] == ["tree"]:
            entries = [
                {
                    "type": "file",
                    "path": n,
                    "size": len(c),
                    "oid": hashlib.sha1(c).hexdigest(),
                }
                for n, c in files.items()
            ]
            return self.reply(200, json.dumps(entries).encode())
        if rest[:1] == ["revision"] and rest[1] not in {"main", "v1", COMMIT}:
            return self.refuse(404, "RevisionNotFound")
        page = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
        return self.reply(200, json.dumps(page).encode())

    def file(self, repo, name):
        if self.server.file_refusal:
            return self.refuse(*self.server.file_refusal)
        content = self.server.repos[repo].get(name)
        if content is None:
            return self.refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.server.fetched.append(name)
        etag = hashlib.sha1(content).hexdigest()
        return self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def reply(self, status, content, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub that answers, an empty cache, no token."""
    found = Hub()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{found.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=20, num_hidden_layers=1, num_key_value_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "one")
    LlamaForCausalLM(config).save_pretrained(folder / "many", max_shard_size="1KB")
    transformers_logging.set_verbosity(before)
    if bars:
        transformers_logging.enable_progress_bar()
    return {
        kind: {p.name: p.read_bytes() for p in sorted((folder / kind).iterdir())}
        for kind in ("one", "many")
    }


def test_a_model_is_fetched_once_and_then_read_from_the_cache(server, files, monkeypatch):
    server.repos["some/model"] = files["one"]
    first = load("some/model")
    assert first.source == "some/model"
    assert "model.safetensors" in server.fetched
    server.fetched.clear()
    again = load("some/model")
    assert server.fetched == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = load("some/model")
    for found in (again, offline):
        for a, b in zip(first.model.parameters(), found.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_only_what_a_load_reads_is_fetched(server, files):
    extra = {
        "pytorch_model.bin": b"\0",
        "model.fp16.safetensors": b"\0",
        "consolidated.safetensors": b"\0",
        "onnx/config.json": b"{}",
        "code.py": b"1/0",
        "model.gguf": b"\0",
        "README.md": b"",
    }
    server.repos["some/model"] = files["one"] | extra
    load("some/model")
    assert set(server.fetched) == {"config.json", "generation_config.json", "model.safetensors"}


def test_python_files_come_along_only_when_trusted(server, files):
    code = {"code.py": b"pass\n", "sub/more.py": b"pass  # more\n"}
    server.repos["some/model"] = files["one"] | code
    load("some/model", trust_remote_code=True)
    assert {"code.py", "sub/more.py"} <= set(server.fetched)


def test_all_shards_of_an_index_are_fetched(server, files):
    server.repos["some/model"] = files["many"]
    load("some/model")
    shards = {name for name in files["many"] if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert shards <= set(server.fetched)


def test_an_index_that_names_missing_shards(server, files):
    lost = next(name for name in files["many"] if name.endswith(".safetensors"))
    server.repos["some/model"] = {n: c for n, c in files["many"].items() if n != lost}
    assert lost in refused(errors.CorruptFileError, "some/model")


def test_an_index_that_leads_elsewhere(server, files):
    index = json.dumps({"weight_map": {"a": "../../../escape.safetensors"}}).encode()
    server.repos["some/model"] = {
        "config.json": files["one"]["config.json"],
        "model.safetensors.index.json": index,
    }
    assert "escape.safetensors" in refused(errors.CorruptFileError, "some/model")


def test_weights_by_another_name(server, files):
    config = json.loads(files["one"]["config.json"]) | {"transformers_weights": "x.safetensors"}
    server.repos["some/model"] = {
        "config.json": json.dumps(config).encode(),
        "x.safetensors": files["one"]["model.safetensors"],
    }
    load("some/model")
    assert "x.safetensors" in server.fetched


def test_pickled_weights_are_not_even_fetched(server, files):
    server.repos["some/model"] = {
        "config.json": files["one"]["config.json"],
        "pytorch_model.bin": b"\0",
    }
    message = refused(errors.UnsafeFormatError, "some/model")
    assert "some/model" in message
    assert "pytorch_model.bin" in message
    assert "pytorch_model.bin" not in server.fetched


def test_repositories_without_a_model(server, files):
    server.repos["some/model"] = {"README.md": b""}
    assert "has no config.json" in refused(errors.ConfigError, "some/model")
    server.repos["some/other"] = {"config.json": files["one"]["config.json"]}
    assert "has no weights" in refused(errors.LoadError, "some/other")


def test_a_revision(server, files, monkeypatch):
    server.repos["some/model"] = files["one"]
    load("some/model", revision="v1")
    message = refused(errors.ModelNotFoundError, "some/model", revision="v2")
    assert "some/model" in message
    assert "'v2'" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load("some/model", revision="v1")
    load("some/model", revision=COMMIT)
    assert "'v2'" in refused(errors.OfflineError, "some/model", revision="v2")


def test_an_id_that_the_hub_does_not_have(server):
    message = refused(errors.ModelNotFoundError, "some/absent")
    assert "some/absent" in message
    assert "HF_TOKEN" in message


@pytest.mark.parametrize("which", ["refusal", "file_refusal"])
def test_a_gated_model(server, files, which):
    server.repos["some/model"] = files["one"]
    setattr(server, which, (403, "GatedRepo"))
    message = refused(errors.ModelNotFoundError, "some/model")
    assert "gated" in message
    assert "HF_TOKEN" in message


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused(server, files, status):
    server.repos["some/model"] = files["one"]
    server.refusal = (status, "")
    assert "HF_TOKEN" in refused(errors.ModelNotFoundError, "some/model")


def test_a_hub_in_trouble(server, files, monkeypatch):
    server.repos["some/model"] = files["one"]
    server.refusal = (503, "")
    message = refused(errors.OfflineError, "some/model")
    assert "some/model" in message
    assert "503" in message


def test_a_hub_in_trouble_does_not_keep_a_cached_model_away(server, files):
    server.repos["some/model"] = files["one"]
    load("some/model")
    server.refusal = (503, "")
    assert load("some/model").source == "some/model"


def test_a_hub_that_never_answers_is_given_up_on(server, monkeypatch):
    monkeypatch.setattr(hub, "_PROBE_TIMEOUT_S", 0.2)
    server.silent = True
    assert "some/model" in refused(errors.OfflineError, "some/model")


def test_a_hub_that_is_not_there(server, files, monkeypatch):
    server.repos["some/model"] = files["one"]
    load("some/model")
    # Port 9 of the loopback: nothing listens, the connection is refused at once.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refused(errors.OfflineError, "some/other")
    assert "some/other" in message
    assert "local directory" in message
    assert load("some/model").source == "some/model"


def lay_out_cache(cache, files):
    """The hub's cache as its documentation describes it: refs/main → snapshots/<commit>/…"""
    repo = Path(cache) / "models--some--model"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


def test_a_cache_from_elsewhere(server, files, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = lay_out_cache(constants.HF_HUB_CACHE, files["many"])
    assert load("some/model").source == "some/model"
    lost = next(snapshot.glob("*.safetensors"))
    lost.unlink()
    message = refused(errors.OfflineError, "some/model")
    assert "incomplete" in message
    assert lost.name in message


@pytest.mark.parametrize("kept", ["nothing", "config.json", "tokenizer.json"])
def test_a_cache_without_weights(server, files, monkeypatch, kept):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = lay_out_cache(constants.HF_HUB_CACHE, files["one"])
    for path in snapshot.iterdir():
        if path.name != kept:
            path.unlink()
    message = refused(errors.OfflineError, "some/model")
    assert "HF_HUB_OFFLINE" in message
    assert "some/model" in message


def test_a_cache_of_pickles(server, files, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = files["one"]["config.json"]
    lay_out_cache(constants.HF_HUB_CACHE, {"config.json": config, "pytorch_model.bin": b""})
    assert "pytorch_model.bin" in refused(errors.UnsafeFormatError, "some/model")


def test_offline_asks_nobody(server, files, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.repos["some/model"] = files["one"]
    refused(errors.OfflineError, "some/model")
    assert server.fetched == []


@pytest.mark.parametrize("name", ["a--b", "owner/na..me", "owner/name.git", "-x", "a b", "é/x"])
def test_what_can_be_no_hub_id(server, name):
    assert "does not exist" in refused(errors.ModelNotFoundError, name)


def test_the_environment_is_honoured(tmp_path, files):
    """HF_HOME and HF_HUB_OFFLINE are read when the client is imported, so in a process of its
    own."""
    lay_out_cache(tmp_path / "home" / "hub", files["one"])
    script = (
        "from trilens.models.loading import load\n"
        "from trilens.errors import OfflineError\n"
        "print(load('some/model').source)\n"
        "try:\n    load('some/other')\nexcept OfflineError as error:\n    print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    found, refusal = done.stdout.splitlines()
    assert found == "some/model"
    assert "HF_HUB_OFFLINE is set" in refusal
    assert "some/other" in refusal


def test_a_directory_comes_before_a_hub_id(server, files, tmp_path, monkeypatch):
    folder = tmp_path / "some" / "model"
    folder.mkdir(parents=True)
    for name, content in files["one"].items():
        (folder / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert load("some/model").source == str(folder.resolve())
    shutil.rmtree(folder)
    refused(errors.ModelNotFoundError, "some/model")
