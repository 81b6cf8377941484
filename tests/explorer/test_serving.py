"""The port and its address, and the command that serves: loaded once, printed once."""

from __future__ import annotations

import socket

import pytest
import uvicorn
from typer.testing import CliRunner

import trilens
from trilens.cli.main import app
from trilens.cli.run import serve as serve_run
from trilens.errors import PortInUseError, ServeError
from trilens.explorer.serving import bind
from trilens.models import loading


def test_this_machine_alone_and_without_a_token() -> None:
    bound = bind(None, 0)
    with bound.socket:
        host, port = bound.socket.getsockname()
        assert host == "127.0.0.1" and bound.address == f"http://127.0.0.1:{port}/"
        assert bound.rules.token is None


def test_a_host_that_is_named_needs_a_token() -> None:
    with bind("127.0.0.1", 0).socket as one, bind("127.0.0.1", 0).socket as other:
        assert one.getsockname() != other.getsockname()
    first, second = bind("localhost", 0), bind("localhost", 0)
    with first.socket, second.socket:
        assert first.rules.token and len(first.rules.token) >= 40
        assert first.rules.token != second.rules.token
        assert first.address.endswith(f"/?access={first.rules.token}")
        assert first.rules.knows("localhost:1") and not first.rules.knows("evil.example")
    bound = bind("0.0.0.0", 0)
    with bound.socket:
        assert "0.0.0.0" not in bound.address


def test_a_port_in_use_and_no_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUseError, match=f"port {port} of 127.0.0.1 is in use.*--port 0"):
            bind(None, port)
    for host in ("203.0.113.9", "no such host", "x" * 300, "\udcff", ""):
        with pytest.raises(ServeError):
            bind(host, 0).socket.close()


@pytest.fixture
def served(monkeypatch) -> list[uvicorn.Server]:
    """Servers that the command would have run."""
    found: list[uvicorn.Server] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: found.append(self))
    return found


def run(*arguments: str):
    return CliRunner().invoke(app, ["serve", *arguments])


def test_the_command_loads_the_model_once_and_prints_its_address(served, monkeypatch) -> None:
    loads = []
    real = serve_run.open_lens
    monkeypatch.setattr(serve_run, "open_lens", lambda *a: loads.append(a) or real(*a))
    result = run(str(trilens.demo_path("transformer")), "--port", "0", "--host", "localhost")
    assert result.exit_code == 0, result.output
    assert len(loads) == len(served) == 1
    assert result.stdout == ""
    assert result.stderr.count("?access=") == 1
    config = served[0].config
    assert config.limit_concurrency and config.h11_max_incomplete_event_size == 65_536
    assert not config.access_log and not config.proxy_headers


def test_a_model_that_does_not_fit_is_one_line_and_nothing_is_served(served, monkeypatch) -> None:
    monkeypatch.setattr(loading, "_free_bytes", lambda: 1000)
    result = run(str(trilens.demo_path("transformer")), "--port", "0", "--dtype", "float32")
    assert result.exit_code == 2 and not served
    assert "MiB" in result.stderr or "bytes" in result.stderr
    assert "1000 bytes are free: load it in a smaller dtype" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr


def test_a_saved_capture_needs_no_model_and_takes_no_option_of_one(served, tmp_path) -> None:
    lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"))
    file = lens.capture("x = 1", residual="all").save(tmp_path / "a.safetensors")
    assert run(str(file), "--port", "0").exit_code == 0 and len(served) == 1
    result = run(str(file), "--port", "0", "--dtype", "float32")
    assert result.exit_code == 2 and "--dtype is for a model" in result.stderr


def test_what_is_wrong_is_one_line(served, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run(str(trilens.demo_path("transformer")), "--port", port)
    assert result.exit_code == 2 and "is in use" in result.stderr
    assert run("/nothing/there", "--port", "0").exit_code == 2
    for seconds in ("nan", "0", "-1"):
        result = run(str(trilens.demo_path("transformer")), "--time-limit", seconds)
        assert result.exit_code == 2 and "--time-limit" in result.stderr
    assert not served
    monkeypatch.setattr(serve_run, "find_spec", lambda name: None)
    result = run(str(trilens.demo_path("transformer")))
    assert result.exit_code == 2 and "pip install 'trilens[app]'" in result.stderr
