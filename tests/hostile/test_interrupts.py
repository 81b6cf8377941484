"""Ctrl-C at any time of a command, streams that are closed or full, readers that went away."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostile.scale import scaled
from trilens.analysis.comparison.result import Comparison
from trilens.demo import demo_path
from trilens.lens.capture import Capture

TESTS = Path(__file__).resolve().parent.parent
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


def assert_ended(code: int, errors: str) -> None:
    assert "Traceback" not in errors and "KeyboardInterrupt" not in errors, errors
    # At its very end Python gives the signal back to the system; shells count that as 130 too.
    assert code in (130, -signal.SIGINT, 0), errors


@pytest.mark.parametrize(
    ("arguments", "full", "subset"),
    [(("families",), 25, 4), (("inspect", DEMO, "-p", "import os"), 10, 2)],
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
        assert_ended(process.returncode, errors)
        codes.append(process.returncode)
    assert codes.count(0) <= len(codes) // 2, codes


# One process that has everything imported, whose children run the command: what an interrupt of its
# work meets, many times in the time of one start.
FORKS = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from hostile.processes import import_all
from trilens.cli.interrupts import _end
from trilens.cli.main import main
times, folder, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
import trilens.cli.run.inspect, trilens.cli.run.compare
def run(delay):
    begun = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        errors = os.open(folder + "/errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.signal(signal.SIGINT, _end)  # as when the command itself is started
        install = signal.signal
        def told(*given):
            before = install(*given)
            signal.signal = install
            os.write(writer, b"x")
            return before
        signal.signal = told
        code = 70
        try:
            main(arguments)
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException as error:
            os.write(2, ("Traceback: " + repr(error)).encode())
        if delay is None:
            open(folder + "/modules", "w").write("\\n".join(sys.modules))
        os._exit(code)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGINT)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, open(folder + "/errors", errors="replace").read(), time.monotonic() - begun
run(None)
import_all(open(folder + "/modules").read().splitlines())
*whole, length = run(None)
delays = random.Random(0)
found = [run(delays.uniform(0, length))[:2] for _ in range(times)]
print(json.dumps([whole, found]))
"""


@pytest.mark.parametrize("command", ["inspect", "capture", "compare"])
def test_an_interrupt_at_any_time_of_the_work(command: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    small = ("--data", str(text), "--max-tokens", "64", "--seq-length", "32")
    arguments = {
        "inspect": (DEMO, "-p", "import os"),
        "capture": (DEMO, "-p", "import os", "-o", str(tmp_path / "out.tlc")),
        "compare": (DEMO, DEMO, *small, "-o", str(tmp_path / "out")),
    }[command]
    times = scaled(full=25, subset=4)
    search = os.pathsep.join((str(TESTS), *(path for path in sys.path if path)))
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(times), str(tmp_path), command, *arguments],
        capture_output=True, text=True, env={**ENVIRONMENT, "PYTHONPATH": search}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (code, errors), found = json.loads(done.stdout)
    assert code == 0, errors
    codes = [code for code, _ in found]
    for code, errors in found:
        assert_ended(code, errors)
    assert len(codes) == times and codes.count(130) >= times // 5, codes
    if (tmp_path / "out.tlc").exists():
        Capture.load(tmp_path / "out.tlc")
    if (tmp_path / "out" / "comparison.json").exists():
        Comparison.load(tmp_path / "out")


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
