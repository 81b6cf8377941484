"""What starting the command line imports: declarations, never the library's weight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import trilens.cli

SRC = Path(trilens.cli.__file__).parents[1]
HEAVY = {"torch", "transformers", "numpy", "pandas", "pyarrow", "safetensors", "rich", "numba"}
COMMANDS = [file.stem for file in sorted((SRC / "cli" / "commands").glob("[a-z]*.py"))]

# The root package's own imports are another test's: a bare one stands in its place.
_START = f"""
import json, sys, types
root = types.ModuleType("trilens")
root.__path__ = [{str(SRC)!r}]
sys.modules["trilens"] = root
from trilens.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def loaded(*arguments: str, **environment: str) -> set[str]:
    command = [sys.executable, "-c", _START, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment or None
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments", [("--version",), ("--help",), *((name, "--help") for name in COMMANDS)], ids=str
)
def test_help_and_version_load_declarations_alone(arguments: tuple[str, ...]) -> None:
    modules = loaded(*arguments)
    assert not HEAVY & {name.partition(".")[0] for name in modules}
    assert not [name for name in modules if name.startswith("trilens.cli.run")]


def test_completion_loads_no_more() -> None:
    asked = {"_TRILENS_COMPLETE": "complete_bash", "COMP_WORDS": "trilens sens", "COMP_CWORD": "1"}
    assert not HEAVY & {name.partition(".")[0] for name in loaded(**asked)}


def test_a_command_does_load_its_work() -> None:
    assert "trilens.cli.run.families" in loaded("families", "--type", "llama")
