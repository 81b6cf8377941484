"""What cannot be edited is refused before the run, by the edit's number and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edit_cases import D_MODEL, HEADS, compiled, source
from trilens.edits import (
    Ablate,
    Custom,
    Edit,
    Knockout,
    Patch,
    PerPrompt,
    Project,
    Replace,
    Scale,
    SiteEdit,
    Steer,
    TensorFile,
)
from trilens.errors import (
    CorruptFileError,
    EditConflictError,
    EditError,
    EditRangeError,
    ModelNotFoundError,
    OutOfRangeError,
)

V = torch.ones(D_MODEL)
NAN = torch.tensor([1.0] * 7 + [float("nan")])
INF = torch.tensor([[float("inf")] + [1.0] * 7] * 2)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Scale("resid_pots", 2), "site 'resid_pots' is unknown: did you mean resid_post"),
        (lambda: Scale("z", 2), "did you mean mixer.z, attn.z?"),
        (lambda: Scale(3, 2), "site 3 is no name"),
        (lambda: Scale("embed[2]", 2), "names layer 2: the model has embed once"),
        (lambda: Scale("resid_post", 2, layer=1, layers=[1]), "layer=1 and layers="),
        (lambda: Scale("blocks.5.hook_resid_post", 2, layers=4), "name different layers"),
        (lambda: Scale("resid_post", 2, layers=[]), "layers are empty"),
        (lambda: Scale("resid_post", 2, layers="5"), "layers '5' cannot be read"),
        (lambda: Scale("resid_post", 2, layers=1.5), "layer 1.5 is not a whole number"),
        (lambda: Scale("resid_post", 2, layers=-1), "layer -1 is out of range: layers count from"),
        (lambda: Scale("attn.z", 2, heads=[1, 1]), "heads [1, 1] are not distinct"),
        (lambda: Scale("attn.z", 2, heads=True), "head True is not a whole number"),
        (lambda: Scale("attn.z", 2, units=torch.tensor([0.5])), "is not a whole number"),
        (lambda: Scale("resid_post", float("nan")), "factor nan is not a finite number"),
        (lambda: Scale("resid_post", "2"), "factor '2' is not a finite number"),
        (lambda: Scale("resid_post", True), "factor True is not a finite number"),
        (lambda: Scale("resid_post", torch.ones(2)), "is not a finite number"),
        (lambda: Steer("resid_post", vector="x"), "vector 'x' is no tensor"),
        (lambda: Steer("resid_post", vector=[[1], [1, 2]]), "is no tensor"),
        (lambda: Steer("resid_post", vector=[]), "vector of shape [0] and dtype torch.float32"),
        (lambda: Steer("resid_post", vector=V.bool()), "dtype torch.bool cannot be read"),
        (lambda: Steer("resid_post", vector=V + 1j), "dtype torch.complex64 cannot be read"),
        (lambda: Steer("resid_post", vector=V, scale=float("inf")), "scale inf is not a finite"),
        (lambda: Steer("resid_post", vector=V, renormalise=1), "renormalise 1 is neither True nor"),
        (lambda: Steer("resid_post", vector=TensorFile("v.pt")), "file 'v.pt' holds no tensor"),
        (lambda: Ablate("resid_post", method="median"), "method 'median' is unknown: it is 'zero'"),
        (lambda: Ablate("resid_post", method="mean"), "method 'mean' needs a reference"),
        (lambda: Ablate("resid_post", reference=V), "method 'zero' takes no reference"),
        (lambda: Ablate("resid_post", method="mean", reference=object()), "is no tensor"),
        (lambda: Patch("resid_post", source=[source(3)]), "source is a list: a patch has one"),
        (lambda: Patch("resid_post", source=V, positions="generated"), "is not defined"),
        (lambda: Patch("resid_post", source=V, source_positions="generated"), "name tokens of the"),
        (lambda: Project("resid_post", directions=V, onto="yes"), "onto 'yes' is neither"),
        (lambda: Custom("resid_post", 3), "function 3 cannot be called"),
        (lambda: Knockout(layer=0), "a knockout needs queries or keys"),
    ],
)
def test_what_is_refused_when_it_is_written(make: Any, problem: str) -> None:
    with pytest.raises(EditError) as error:
        make()
    assert problem in str(error.value)


def patch(**options: Any) -> Patch:
    return Patch("resid_post", layer=0, **options)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (
            Scale("resid_post", 2, layers=[0, 40]),
            "layer 40 is out of range: this model has layers 0–2",
        ),
        (
            Scale("attn.z", 2, layers=[1]),
            "layer 1 has no attn.z: the layer is recurrent; layers that have it",
        ),
        (Scale("mlp.gate", 2), "no layer of this model has mlp.gate: the MLP has no gate"),
        (
            Scale("mlp.up", 2, layer=0),
            "no layer of this model has mlp.up: the probe did not show it",
        ),
        (Scale("final_norm", 2), "this model has no final_norm: the probe did not show it"),
        (
            Scale("embed", 2, layers=0),
            "embed is not in a layer: the model has it once; leave layers out",
        ),
        (Scale("attn.z", 2, heads=4), "head 4 is out of range: attn.z of layer 0 has heads 0–3"),
        (
            Scale("resid_post", 2, heads=0),
            "heads cannot be named: resid_post of layer 0 has no heads",
        ),
        (
            Scale("mlp.post", 2, units=[0, 6]),
            "unit 6 is out of range: mlp.post of layer 0 has units 0–5",
        ),
        (Scale("attn.pattern", 2, units=0), "the last axis of attn.pattern of layer 0 is the keys"),
        (
            Scale("resid_post", 2, positions=7),
            "position 7 is out of range: the prompt of 7 tokens has",
        ),
        (Scale("resid_post", 2, positions="generated"), "no token is generated here"),
        (
            Scale("resid_post", 2, positions=PerPrompt([0, 1])),
            "PerPrompt has 2 entries: the run has 1",
        ),
        (
            Steer("resid_post", vector=[1.0]),
            "vector of shape [1] does not fit: the values named have [8]",
        ),
        (Steer("resid_post", vector=V[None]), "vector of shape [1, 8] does not fit"),
        (Steer("resid_post", vector=1.0), "vector of shape [] does not fit"),
        (Steer("attn.z", vector=torch.ones(3, 2)), "the values named have [2] or [4, 2]"),
        (Steer("resid_post", vector=V, units=[0, 1]), "the values named have [2]"),
        (Steer("resid_post", vector=NAN), "vector of shape [8] has 1 entries of NaN or Inf"),
        (Project("resid_post", directions=INF), "directions of shape [2, 8] has 2 entries of NaN"),
        (Project("resid_post", directions=torch.ones(8, 2)), "they are [k, 8]"),
        (Project("resid_post", directions=torch.zeros(2, 8)), "directions are all zero"),
        (Replace("resid_post", NAN), "value of shape [8] has 1 entries of NaN or Inf"),
        (Replace("resid_post", torch.ones(3)), "value of shape [3] does not fit"),
        (
            Replace("resid_post", torch.ones(3, 8)),
            "value gives 3 tokens for 7 positions of the prompt",
        ),
        (Ablate("router"), "router cannot be ablated whole: name experts as units, at most 4 of 5"),
        (Ablate("router", units=range(5)), "router cannot be ablated whole"),
        (Ablate("attn.z", method="mean", reference=torch.ones(3, 2)), "attn.z has [tokens, 4, 2]"),
        (
            Ablate("attn.z", method="mean", reference=[source(3), source(3, n_layers=9)]),
            "reference is of another model: its n_layers is 9, this model's 3",
        ),
        (patch(source=source(7, name="other")), "source is of another model: its name is 'other'"),
        (patch(source=source(7, model_class="B")), "its model_class is 'B', this model's 'MadeUp'"),
        (patch(source=source(7, d_model=4)), "its d_model is 4, this model's 8"),
        (
            patch(source=source(6)),
            "source has 6 tokens, the prompt of 7 tokens another number: name source_positions",
        ),
        (patch(source=source(6), positions=0), "source has 6 tokens"),
        (
            patch(source=source(6), positions=[0, 1], source_positions=[6, 0]),
            "the source has tokens 0–5",
        ),
        (patch(source=source(6), positions=0, source_positions=-7), "the source has tokens 0–5"),
        (
            patch(source=source(6), positions=[0, 1, 2], source_positions=[0, 1]),
            "source gives 2 tokens for 3 positions",
        ),
        (patch(source=torch.ones(6, 8)), "source gives 6 tokens for 7 positions"),
        (
            patch(source=torch.ones(7, 4)),
            "source of shape [7, 4] does not fit: resid_post has [tokens, 8]",
        ),
        (Patch("mlp.gate", source=source(7)), "no layer of this model has mlp.gate"),
        (Knockout(layer=5, keys=0), "layer 5 is out of range"),
        (
            Knockout(layer=1, keys=0, queries=1),
            "layer 1 is recurrent and has no edges: name keys alone",
        ),
        (Knockout(layer=1, keys=0, heads=1), "layer 1 is recurrent and has no edges"),
        (Knockout(layer=0, heads=HEADS, keys=0), "head 4 is out of range: layer 0 has heads 0–3"),
        (Knockout(layer=0, keys=7), "position 7 is out of range"),
        (
            Knockout(layer=0, keys=slice(0, 4), queries=[5, 3]),
            "position 3 of the prompt of 7 tokens would see no key at all",
        ),
        (Edit(), "it is no edit: use Steer, Ablate"),
        (SiteEdit("resid_post"), "an edit of class SiteEdit is not known"),
        ("steer", "it is no edit"),
    ],
)
def test_what_is_refused_before_the_run(edit: Any, problem: str) -> None:
    with pytest.raises(EditError) as error:
        compiled([Scale("mlp.out", 1.0), edit])
    assert problem in str(error.value)
    assert str(error.value).startswith("edit 1 (")


def test_what_a_source_does_not_hold() -> None:
    empty = source(7)
    empty.sites.clear()
    with pytest.raises(EditError, match=r"capture it with sites=\['attn.z'\], layers=\[2\]"):
        compiled(Patch("attn.z", source=empty, layers=2))
    with pytest.raises(EditError, match=r"reference does not hold embed: .*sites=\['embed'\] "):
        compiled(Ablate("embed", method="mean", reference=empty))
    other = source(7)
    other.sites["attn.z", 2] = torch.ones(7, 2, 2)
    with pytest.raises(EditError, match=r"this model has \[seq, 4, 2\]"):
        compiled(Patch("attn.z", source=other, layers=2))


def test_ranges_are_errors_of_ranges() -> None:
    for edit in (Scale("attn.z", 2, heads=9), Scale("attn.z", 2, positions=9)):
        with pytest.raises(EditRangeError) as error:
            compiled(edit)
        assert isinstance(error.value, OutOfRangeError)


def test_generated_tokens_have_no_rows_in_a_source() -> None:
    with pytest.raises(EditError, match="position 8 is beyond the source's 7 tokens"):
        compiled(patch(source=source(7), positions=8), new_tokens=3)
    with pytest.raises(EditRangeError, match="name no token of a prompt"):
        compiled(patch(source=source(7), positions=slice(7, None)), new_tokens=3)
    with pytest.raises(EditError, match="value has 7 tokens, but positions have generated ones"):
        compiled(Replace("resid_post", torch.ones(7, D_MODEL)), new_tokens=3)
    assert compiled(patch(source=source(7), positions=slice(2, None)), new_tokens=3).actions


def test_prompts_of_a_batch_are_named() -> None:
    with pytest.raises(EditError, match="prompt 1 of 3 tokens has positions 0–2"):
        compiled(Scale("resid_post", 2, positions=5), [7, 3])
    with pytest.raises(EditError, match="source has 7 tokens, prompt 1 of 3 tokens another"):
        compiled(patch(source=source(7)), [7, 3])
    assert compiled(patch(source=source(7), positions=PerPrompt([None, []])), [7, 3]).actions


def test_a_damaged_file_is_named_with_its_edit(tmp_path: Path) -> None:
    steer = Steer("resid_post", vector=TensorFile(tmp_path / "v.npy"))
    with pytest.raises(ModelNotFoundError, match=r"edit 0 \(steer:resid_post .* does not exist"):
        compiled(steer)
    (tmp_path / "v.npy").write_text("text")
    with pytest.raises(CorruptFileError, match=r"edit 0 \(steer:resid_post .* no .npy file"):
        compiled(steer)


STEER = Steer("attn.z", vector=[1.0, 1.0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (STEER, Ablate("attn.z")),
        (STEER, Replace("attn.z", 1.0, layers=2)),
        (STEER, Scale("attn.z", 0)),
        (STEER, Patch("attn.z", source=source(7), layers=0, positions=3)),
        (STEER, Ablate("attn.z", heads=2)),
        (STEER, Ablate("attn.z", units=1, positions=-1)),
        (
            Scale("attn.z", 2, heads=[0, 1], positions=[1, 2]),
            Ablate("attn.z", heads=[1, 2], positions=-5),
        ),
        (Ablate("attn.z"), Ablate("attn.z")),
        (Steer("resid_post", vector=V, layers=0), Ablate("resid_pre", layers=1, units=3)),
        (STEER, Ablate("attn.out")),
        (Scale("attn.z", 2, positions=3), Replace("attn.out", 0.5, positions=slice(2, 4))),
        (Scale("mlp.post", 2, units=1), Ablate("mlp.out")),
        (Scale("attn.v", 2, positions=3), Ablate("attn.z")),
    ],
)
def test_conflicts_name_both(first: Any, second: Any) -> None:
    with pytest.raises(EditConflictError) as error:
        compiled([Scale("router", 1.0), first, second])
    assert f"edit 1 ({first}) would be overwritten by edit 2 ({second})" in str(error.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Ablate("attn.z"), STEER),
        (STEER, Scale("attn.z", 2)),
        (STEER, Project("attn.z", directions=[1.0, 0.0])),
        (STEER, Custom("attn.z", torch.tanh)),
        (Scale("attn.z", 2, heads=[0, 1]), Ablate("attn.z", heads=[2])),
        (Scale("attn.z", 2, units=0), Ablate("attn.z", units=1)),
        (Scale("attn.z", 2, positions=[0, 2]), Ablate("attn.z", positions=[1, -1])),
        (Scale("attn.z", 2, layers=0), Ablate("attn.z", layers=2)),
        (Steer("resid_post", vector=V, layers=0), Ablate("resid_post", layers=1)),
        (STEER, Ablate("attn.out", positions=slice(1, None))),
        (STEER, Ablate("attn.out", units=3)),
        (Scale("attn.v", 2, positions=3), Ablate("attn.z", positions=slice(1, None))),
        (Ablate("mlp.out"), Ablate("attn.out")),
        (Scale("attn.z", 2, positions=PerPrompt([0])), Ablate("attn.z", positions=PerPrompt([1]))),
    ],
)
def test_what_is_no_conflict(first: Any, second: Any) -> None:
    assert compiled([first, second]).actions


def test_what_is_listed_first_is_lost_too_where_the_model_passes_it_first() -> None:
    with pytest.raises(EditConflictError, match=r"edit 1 \(scale:attn.z.* overwritten by edit 0"):
        compiled([Ablate("attn.out"), Scale("attn.z", 2)])


def test_conflicts_are_found_prompt_by_prompt() -> None:
    edits = [
        Ablate("mlp.out", positions=PerPrompt([1, []])),
        Ablate("mlp.out", positions=PerPrompt([0, 1])),
    ]
    assert compiled(edits, [7, 3]).actions
    edits[1] = Ablate("mlp.out", positions=PerPrompt([-6, 1]))
    with pytest.raises(EditConflictError):
        compiled(edits, [7, 3])
