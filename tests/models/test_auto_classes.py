"""A model's task by transformers' tables, of which only its own entry is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import trilens
from tinymodels import build
from tinymodels.mappings import build_as
from trilens.models.auto_classes import is_built_for

LOADED = """
import json, sys
import trilens

trilens.ternarize(trilens.demo_path("transformer"), sys.argv[1])
print(json.dumps([m for m in sys.modules if m.startswith("transformers.") and ".modeling_" in m]))
"""


def test_what_a_class_is_for() -> None:
    tasks = {name: [] for name in ("llama", "bert masked", "bert", "bart", "rwkv7")}
    models = [
        build("llama"), build_as("masked", "bert"), build("bert"), build_as("seq2seq", "bart"),
        trilens.Lens.from_pretrained(trilens.demo_path("rwkv7")).model,
    ]  # fmt: skip
    for found, model in zip(tasks.values(), models, strict=True):
        found += [task for task in ("causal", "masked") if is_built_for(task, model)]
    assert tasks == {
        "llama": ["causal"], "bert masked": ["masked"], "bert": ["causal"],
        "bart": ["masked"], "rwkv7": ["causal"],
    }  # fmt: skip


def test_a_class_of_the_same_name_elsewhere_is_none_of_them() -> None:
    model = build("llama")
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "elsewhere"})
    assert not is_built_for("causal", model)


def test_no_other_model_is_imported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADED, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    families = {name.split(".")[2] for name in loaded if name.startswith("transformers.models.")}
    assert families - {"auto"} == {"llama"}, "seconds for every command"


def test_no_table_is_read_whole() -> None:
    texts = [path.read_text("utf-8") for path in Path(trilens.__file__).parent.rglob("*.py")]
    for whole in ("values", "items", "keys"):
        assert not [text for text in texts if f"_MAPPING.{whole}()" in text]
