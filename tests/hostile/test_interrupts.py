"""Ctrl-C at any time of a command, streams that are closed or full, readers that went away."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostile.scale import scaled
from trilens.demo import demo_path

DEMO = str(demo_path("transformer"))
# What pip writes as the `trilens` command, and a byte once Ctrl-C is ours: what comes before is
# the start of Python itself.
SCRIPT = """
import os, signal, sys
install = signal.signal
def told(*arguments):
    before = install(*arguments)
    signal.signal = install
    os.write(int(os.environ["MARK"]), b"x")
    return before
signal.signal = told
from trilens.cli.main import main
sys.exit(main())
"""
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "trilens"
    path.write_text(SCRIPT)
    return path


def started(script: Path, *arguments: str) -> subprocess.Popen[str]:
    """A command whose Ctrl-C is its own by now."""
    mark, end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=(end,),
        env={**ENVIRONMENT, "MARK": str(end)},
    )
    os.close(end)
    assert os.read(mark, 1) == b"x"
    os.close(mark)
    return process


@pytest.mark.parametrize(
    ("arguments", "full", "subset"),
    [(("families",), 300, 8), (("inspect", DEMO, "-p", "import os"), 60, 3)],
    ids=["families", "inspect"],
)
def test_an_interrupt_at_any_time_ends_the_command_without_a_traceback(
    script: Path, arguments: tuple[str, ...], full: int, subset: int
) -> None:
    whole = started(script, *arguments)
    begun = time.monotonic()
    whole.communicate()
    length = time.monotonic() - begun
    assert whole.returncode == 0
    delays, codes = random.Random(0), []
    for _ in range(scaled(full=full, subset=subset)):
        process = started(script, *arguments)
        time.sleep(delays.uniform(0, length))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors and "KeyboardInterrupt" not in errors, errors
        # At its very end Python gives the signal back to the system; shells count that as 130 too.
        assert process.returncode in (130, -signal.SIGINT, 0)
        codes.append(process.returncode)
    assert codes.count(0) <= len(codes) // 2, codes


def test_the_module_is_the_command_too() -> None:
    code = "import signal, trilens; print(signal.getsignal(signal.SIGINT).__name__)"
    library = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert library.stdout == "default_int_handler\n", "an import changes no handler of others"
    code = (
        "import sys, signal; sys.argv[0] = '-m'; sys.orig_argv = ['python', '-m', 'trilens'];"
        "import trilens; print(signal.getsignal(signal.SIGINT).__name__)"
    )
    command = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert command.stdout == "_end\n"


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which `trilens` is the command."""
    command = f'set -o pipefail; trilens() {{ "{sys.executable}" -m trilens "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("trilens families >&-", 1, "output failed: Bad file descriptor"),
        ("trilens --version >&-", 1, "output failed: Bad file descriptor"),
        ("trilens --help >/dev/full", 1, "output failed: No space left on device"),
        ("trilens families --format json >/dev/full", 1, "output failed: No space left on device"),
        ("trilens families --type zzz 2>&-", 2, ""),
        ("trilens families --type zzz 2>/dev/full", 2, ""),
        ("trilens nothing 2>/dev/full", 2, ""),
        (f"trilens inspect '{DEMO}' -p - <&-", 2, "standard input cannot be read"),
        ("trilens families | true", 0, ""),
        ("trilens families | head -1 >/dev/null", 0, ""),
        ("trilens --help | true", 0, ""),
        ("trilens --version | true", 0, ""),
        ("trilens families | (sleep 3; true)", 0, ""),
    ],
)
def test_streams_that_cannot_be_used(line: str, code: int, words: str) -> None:
    done = shell(line)
    assert done.returncode == code, done.stderr
    assert done.stderr == "" if not words else words in done.stderr
    assert done.stderr.count("\n") <= 1


def test_nothing_is_printed_into_a_file_that_took_a_closed_stream(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = shell(f"trilens inspect '{DEMO}' -p 'import os' --format json -o '{out}' >&- 2>&-")
    assert done.returncode == 0
    assert out.read_text().startswith("{") and out.read_text().rstrip().endswith("}")
