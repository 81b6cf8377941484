"""A transformers that does not know the format stops, and names what to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoint_cases import saved
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.validation import validate
from trilens.errors import CorruptFileError
from trilens.io.weight_files import GUARD_NAME, weight_files

_PLAIN = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
for cls in (AutoModelForCausalLM, AutoModel, LlamaForCausalLM):
    try:
        cls.from_pretrained(sys.argv[1])
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("LOADED")
assert not any(name.startswith("trilens") for name in sys.modules)
"""


def plain_load(folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN, str(folder)], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_a_plain_load_stops_and_says_what_to_import(tmp_path: Path) -> None:
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "out")
    said = plain_load(tmp_path / "out")
    assert len(said) == 3
    assert all("Error" in line and GUARD_NAME in line for line in said), said


def test_a_plain_load_of_a_model_saved_again_stops_too(tmp_path: Path) -> None:
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    said = plain_load(tmp_path / "again")
    assert [line.split()[0] for line in said] == ["RuntimeError"] * 3, said


@pytest.mark.parametrize("name", ["own.safetensors", "own.safetensors.index.json"])
def test_weights_of_another_name_are_found(name: str, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "src")
    if name.endswith(".json"):
        names = load_file(source / "model.safetensors")
        weight_map = dict.fromkeys(names, "model.safetensors")
        (source / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        (source / "model.safetensors").rename(source / name)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    ternarize(source, tmp_path / "out")
    validate(tmp_path / "out")
    assert [f.name for f in weight_files(tmp_path / "out")] == [
        f.name for f in weight_files(source)
    ]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(GUARD_NAME in line for line in plain_load(tmp_path / "out"))


@pytest.mark.parametrize("part", ["codes", "scale"])
@pytest.mark.parametrize("storage", ["two_bit", "compact"])
def test_a_part_that_is_missing_is_no_layer_of_zeros(
    part: str, storage: str, tmp_path: Path
) -> None:
    plan = TernaryPlan(storage=storage)  # type: ignore[arg-type]
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "out", plan=plan)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith(part))
    tensors.pop(lost)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match=f"lacks {lost}".replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_older_checkpoints_load(tmp_path: Path) -> None:
    """Those whose config.json does not name the guard."""
    ternarize(saved("llama", tmp_path / "src"), tmp_path / "out")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["transformers_weights"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(old(ids).logits, new(ids).logits)
