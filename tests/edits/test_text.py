"""The text form of an edit: read as it is written, and refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilens.edits import (
    Ablate,
    Custom,
    Knockout,
    Patch,
    PerPrompt,
    Project,
    Replace,
    Scale,
    Steer,
    TensorFile,
    parse_edit,
)
from trilens.errors import CorruptFileError, EditError, ModelNotFoundError, UsageError
from trilens.io.tensors import write_safetensors

FILE = TensorFile("directions.safetensors", "happy")

FORMS = {
    "steer:resid_post@6[generated] vector=directions.safetensors:happy scale=4.0": Steer(
        "resid_post", layer=6, vector=FILE, scale=4.0, positions="generated"
    ),
    "ablate:attn.z@5#1,3[-1]": Ablate("attn.z", layer=5, heads=[1, 3], positions=-1),
    "ablate:mlp.post@4%17,90 method=mean reference=rows.npy": Ablate(
        "mlp.post", layers=[4], units=[17, 90], method="mean", reference=TensorFile("rows.npy")
    ),
    "ablate:mlp.out method=resample reference='my rows.npy' seed=3": Ablate(
        "mlp.out", method="resample", reference=TensorFile("my rows.npy"), seed=3
    ),
    "knockout@5#1 queries=-1 keys=2:5": Knockout(layer=5, heads=1, queries=-1, keys=slice(2, 5)),
    "patch:resid_post@2[3,0] source=a.safetensors:x source_positions=1,-1": Patch(
        "resid_post",
        layer=2,
        positions=[3, 0],
        source=TensorFile("a.safetensors", "x"),
        source_positions=[1, -1],
    ),
    "patch:embed source=a.safetensors": Patch("embed", source=TensorFile("a.safetensors")),
    "scale:mlp.out@0,1 factor=-0.5": Scale("mlp.out", -0.5, layers=[0, 1]),
    "project:resid_pre[|0||*|:3] directions=d.npy onto": Project(
        "resid_pre",
        directions=TensorFile("d.npy"),
        onto=True,
        positions=PerPrompt([0, [], None, slice(None, 3)]),
    ),
    "replace:router%3[::2] value=0.1": Replace(
        "router", 0.1, units=3, positions=slice(None, None, 2)
    ),
    "replace:mlp.up value=v.npy": Replace("mlp.up", TensorFile("v.npy")),
    "steer:resid_mid[prompt] vector=v.npy renormalise": Steer(
        "resid_mid", vector=TensorFile("v.npy"), renormalise=True, positions="prompt"
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", FORMS)
def test_forms_are_written_and_read(text: str) -> None:
    edit, read = FORMS[text], parse_edit(text)
    assert str(edit) == text
    assert str(read) == text
    assert type(read) is type(edit)
    for name in ("site", "layers", "heads", "units", "positions", "queries", "keys"):
        assert getattr(read, name, None) == getattr(edit, name, None)


NUMBERS = st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True)
ENDS = st.none() | st.integers(-99, 99)
PLACES = (
    st.none()
    | st.sampled_from(["last", "prompt", "generated"])
    | st.lists(st.integers(-99, 99), min_size=1, max_size=4, unique=True)
    | st.builds(slice, ENDS, ENDS, st.none() | st.integers(1, 9))
)
PATHS = st.builds(
    TensorFile,
    st.text("ab c'\"\\é/$", min_size=1).map(lambda text: f"x{text}.safetensors"),
    st.none() | st.text("ab c.:'\"", min_size=1),
)


@given(
    PATHS,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    PLACES | st.lists(PLACES, min_size=1).map(PerPrompt),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
def test_every_edit_of_files_comes_back(
    vector: TensorFile,
    layers: Any,
    heads: Any,
    units: Any,
    positions: Any,
    scale: float,
    renormalise: bool,
) -> None:
    edit = Steer(
        "attn.z",
        layers=layers,
        heads=heads,
        units=units,
        positions=positions,
        vector=vector,
        scale=scale,
        renormalise=renormalise,
    )
    read = parse_edit(str(edit))
    assert isinstance(read, Steer)
    assert (read.layers, read.heads, read.units) == (edit.layers, edit.heads, edit.units)
    assert read.positions == edit.positions
    assert (read.vector, read.scale, read.renormalise) == (vector, scale, renormalise)
    assert str(read) == str(edit)


def test_ranges_signs_and_other_names() -> None:
    assert parse_edit("scale:blocks.3.attn.hook_z#0-2,5[−1] factor=2").layers == (3,)
    assert parse_edit("scale:attn.hook_z@1#0-2,5[−1] factor=2").heads == (0, 1, 2, 5)
    assert str(parse_edit("scale:hook_resid_mid[−1] factor=2")) == (
        "scale:resid_mid[-1] factor=2.0"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it is empty; the form is KIND:SITE@LAYERS"),
        ("steer:'", "no closing quotation"),
        ("steeer:resid_post", "kind 'steeer' is unknown: did you mean steer?"),
        ("custom:resid_post", "kind 'custom' is unknown: the kinds are steer, ablate, "),
        ("ablate", "the site is missing: write ablate:SITE"),
        ("ablate:resid_pots", "site 'resid_pots' is unknown: did you mean resid_post"),
        ("ablate:attn.z@5 #1", "option '#1' is unknown: ablate takes method, reference, seed"),
        ("ablate:attn.z@5@6", "layers (@) stand twice"),
        ("ablate:attn.z@4-2", "layers '4-2' are no range"),
        ("ablate:attn.z@x", "layers 'x' cannot be read: write 5, 1,3 or 0-4"),
        ("ablate:attn.z@", "layers '' cannot be read"),
        ("ablate:attn.z#-1", "heads '-1' cannot be read"),
        ("ablate:attn.z[1", "'ablate:attn.z[1' cannot be read"),
        ("ablate:attn.z[first]", "positions 'first' cannot be read: write -1, 0,3, 2:8"),
        ("ablate:attn.z[1:2:3:4]", "positions '1:2:3:4' cannot be read"),
        ("ablate:attn.z[]", "positions '' cannot be read"),
        ("ablate:attn.z[" + "9" * 30 + "]", "cannot be read"),
        ("ablate:attn.z[|]", "PerPrompt names no position of any prompt"),
        ("ablate:attn.z method=median", "method 'median' is unknown"),
        ("ablate:attn.z method=mean", "method 'mean' needs a reference"),
        ("ablate:attn.z seed=x", "option seed is 'x': give a whole number"),
        ("ablate:attn.z seed=1 seed=2", "option seed stands twice"),
        ("steer:resid_post", "option vector is missing: write vector="),
        ("steer:resid_post vector", "option vector needs a value: vector="),
        ("steer:resid_post vector=", "option vector is empty"),
        ("steer:resid_post vector=v.pt", "file 'v.pt' holds no tensor that an edit reads"),
        ("steer:resid_post vector=v.npy:x", "holds one array, which has no name"),
        ("steer:resid_post vector=v.npy renormalise=1", "option renormalise takes no value"),
        ("scale:mlp.out factor=big", "option factor is 'big': give a number"),
        ("scale:mlp.out factor=nan", "factor nan is not a finite number"),
        ("replace:mlp.out value=x", "option value is 'x': give a number"),
        ("knockout:attn.z keys=1", "a knockout has no site"),
        ("knockout@1%3 keys=1", "a knockout has no units"),
        ("knockout@1[3] keys=1", "a knockout has no [positions]"),
        ("knockout@1", "a knockout needs queries or keys"),
    ],
)
def test_what_cannot_be_read(text: str, problem: str) -> None:
    with pytest.raises(EditError) as error:
        parse_edit(text)
    assert problem in str(error.value)
    assert str(error.value).startswith("edit ")


def test_what_has_no_text_form_is_described() -> None:
    assert str(Steer("resid_post", vector=[1, 2])) == "steer:resid_post vector=<float32 [2]>"
    assert str(Custom("resid_post", torch.tanh)) == "custom:resid_post function=<tanh>"
    assert repr(Scale("mlp.out", 2)) == "Scale(scale:mlp.out factor=2.0)"
    with pytest.raises(EditError):
        parse_edit(str(Steer("resid_post", vector=[1, 2])))


def test_files_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    write_safetensors(tmp_path / "two.safetensors", tensors, {})
    write_safetensors(tmp_path / "one.safetensors", {"a": tensors["a"]}, {})
    np.save(tmp_path / "rows.npy", np.eye(3, dtype=np.float16))
    assert TensorFile(tmp_path / "two.safetensors", "b").load().equal(tensors["b"])
    assert TensorFile(tmp_path / "one.safetensors").load().equal(tensors["a"])
    assert TensorFile(tmp_path / "rows.npy").load().equal(torch.eye(3, dtype=torch.float16))
    with pytest.raises(UsageError, match=r"holds 2 tensors: name one of a, b"):
        TensorFile(tmp_path / "two.safetensors").load()
    with pytest.raises(UsageError, match=r"holds no tensor 'c': it has a, b"):
        TensorFile(tmp_path / "two.safetensors", "c").load()
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        TensorFile(tmp_path / "none.npy").load()


def test_files_that_are_damaged(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "words.npy", np.array(["a"]))
    np.save(tmp_path / "cut.npy", np.zeros(1000))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:500])
    (tmp_path / "text.npy").write_text("text")
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("objects.npy", "words.npy", "cut.npy", "text.npy", "text.safetensors"):
        with pytest.raises(CorruptFileError):
            TensorFile(tmp_path / name).load()
