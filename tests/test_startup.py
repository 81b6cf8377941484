"""What an import loads, and that transformers learns of trilens whoever is imported first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint_cases import saved
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.pipeline import ternarize
from trilens.demo import demo_path

_LOADED = """
import json, sys
outside = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(json.dumps(sorted(outside)))
"""


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(code: str) -> set[str]:
    """Packages outside the standard library that are there after `code`, beyond a bare start."""
    before = json.loads(run(_LOADED))
    return set(json.loads(run(code + _LOADED))) - set(before)


def test_trilens_loads_nothing_but_its_hooks() -> None:
    assert loaded("import trilens, trilens.errors") == {"trilens", "lazy_loader", "wrapt"}
    assert run("import trilens; print(len(dir(trilens)) > 50)") == "True\n"


@pytest.mark.parametrize(
    "package", ["analysis", "caches", "checkpoint", "corpus", "edits", "planning", "ternary"]
)
def test_a_package_loads_when_its_names_are_used(package: str) -> None:
    assert "torch" not in loaded(f"import trilens.{package}")


def test_caches_load_torch_alone() -> None:
    torch = loaded("import torch, numpy, numpy.typing")
    assert loaded("from trilens.caches import *") - torch == {"trilens", "lazy_loader", "wrapt"}


TRILENS_FIRST = "import trilens; from transformers import AutoModelForCausalLM; "
TRILENS_LAST = "from transformers import AutoModelForCausalLM; import trilens; "
IN_A_THREAD = """
import threading, time
from importlib import import_module
other = threading.Thread(target=import_module, args=("transformers.modeling_utils",))
other.start()
while "transformers" not in __import__("sys").modules: time.sleep(0.001)
time.sleep({delay})
import trilens
other.join()
from transformers import AutoModelForCausalLM
"""
ORDERS = {
    "first": TRILENS_FIRST,
    "last": TRILENS_LAST,
    "half way": IN_A_THREAD.format(delay=0.0),
    "later": IN_A_THREAD.format(delay=1.0),
}
_OPEN = """
import sys
for folder in sys.argv[1:]:
    print(type(AutoModelForCausalLM.from_pretrained(folder)).__name__)
print("trilens.lens.lens" in sys.modules)
"""


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ternary")
    ternarize(saved("llama", folder / "src"), folder / "out", plan=TernaryPlan())
    return folder / "out"


@pytest.mark.parametrize("order", ORDERS)
def test_transformers_opens_what_it_did_not_know(order: str, ternary: Path) -> None:
    names = run(ORDERS[order] + _OPEN, ternary, demo_path("rwkv7")).split()
    assert names == ["LlamaForCausalLM", "RWKV7ForCausalLM", "False"]
