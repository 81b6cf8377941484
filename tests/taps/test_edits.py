"""Each kind of edit does what it says, to the tokens, heads and units that it names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edit_cases import D_MODEL, UNITS, compiled, edited, prefill, source, value_of
from tolerances import assert_near
from trilens.edits import (
    Ablate,
    Custom,
    Patch,
    PerPrompt,
    Project,
    Replace,
    Scale,
    Steer,
)
from trilens.errors import EditError, SilentSiteError, UntouchedEditError
from trilens.taps.span import Span

SPAN = prefill(7)
VECTOR = torch.linspace(-1, 1, D_MODEL)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def test_steer() -> None:
    value = value_of("resid_post", SPAN)
    before = value.clone()
    new = edited(Steer("resid_post", vector=VECTOR, scale=4.0, layers=0), "resid_post", value, SPAN)
    assert same_bits(new, before + 4.0 * VECTOR)
    assert same_bits(value, before)  # nothing was written into
    kept = edited(
        Steer("resid_post", vector=VECTOR, scale=4.0, renormalise=True, positions=2),
        "resid_post",
        value,
        SPAN,
    )
    turned = before[0, 2] + 4.0 * VECTOR
    assert_near(kept[0, 2], turned / turned.norm() * before[0, 2].norm(), 1e-6)


def test_steer_heads_and_units() -> None:
    value = value_of("attn.z", SPAN)
    per_head = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    new = edited(Steer("attn.z", vector=per_head, heads=[2, 0]), "attn.z", value, SPAN)
    assert same_bits(new[:, :, [2, 0]], value[:, :, [2, 0]] + per_head)
    assert same_bits(new[:, :, [1, 3]], value[:, :, [1, 3]])
    new = edited(Steer("attn.z", vector=[5.0], heads=3, units=1), "attn.z", value, SPAN)
    wanted = value.clone()
    wanted[:, :, 3, 1] += 5.0
    assert same_bits(new, wanted)


def test_ablate_by_zero() -> None:
    value = value_of("attn.z", SPAN)
    new = edited(Ablate("attn.z", layers=0, heads=[1, 3], positions=-1), "attn.z", value, SPAN)
    wanted = value.clone()
    wanted[0, 6, [1, 3]] = 0
    assert same_bits(new, wanted)
    units = value_of("mlp.post", SPAN)
    assert not edited(Ablate("mlp.post", units=[4]), "mlp.post", units, SPAN)[..., 4].any()


def test_ablated_experts_are_never_chosen() -> None:
    value = value_of("router", SPAN)
    new = edited(Ablate("router", units=[1, 2]), "router", value, SPAN)
    assert (new.softmax(-1)[..., [1, 2]] == 0).all()
    assert same_bits(new[..., [0, 3, 4]], value[..., [0, 3, 4]])


@pytest.mark.parametrize("form", ["capture", "captures", "tensor"])
def test_ablate_by_the_mean(form: str) -> None:
    a, b = source(4, 1), source(9, 2)
    rows = torch.cat([each.sites["attn.z", 0] for each in (a, b)])
    reference: Any = {"capture": a, "captures": [a, b], "tensor": rows}[form]
    rows = a.sites["attn.z", 0] if form == "capture" else rows
    value = value_of("attn.z", SPAN)
    edit = Ablate("attn.z", layers=0, method="mean", reference=reference, heads=1)
    new = edited(edit, "attn.z", value, SPAN)
    wanted = value.clone()
    wanted[:, :, 1] = rows.double().mean(0)[1].float()
    assert_near(new, wanted, 1e-6)
    assert same_bits(new[:, :, [0, 2, 3]], value[:, :, [0, 2, 3]])


def test_ablate_by_resampling_draws_by_position() -> None:
    reference = source(50, 3)
    rows = reference.sites["mlp.post", 0]
    edit = Ablate("mlp.post", method="resample", reference=reference, seed=4)
    value = value_of("mlp.post", SPAN)
    new = edited(edit, "mlp.post", value, SPAN)
    drawn = [int((rows == token).all(1).nonzero()[0]) for token in new[0]]
    assert len(set(drawn)) > 1
    # The same tokens at another layer and another site, in a batch, and step by step.
    made = compiled(edit, [3, 7])
    span = prefill(3, 7)
    other = made.apply(("mlp.post", 2), value_of("mlp.post", span), span)
    assert other is not None
    assert same_bits(other[1], reference.sites["mlp.post", 2][drawn])
    assert same_bits(other[0, :3], reference.sites["mlp.post", 2][drawn[:3]])
    step = Span(6, 1, (1,), (7,))
    last = compiled(edit).apply(("mlp.post", 0), value[:, 6:], step)
    assert last is not None
    assert same_bits(last[0], rows[drawn[6:]])
    seeded = Ablate("mlp.post", method="resample", reference=reference, seed=5)
    assert not same_bits(edited(seeded, "mlp.post", value, SPAN), new)


def test_patch_from_a_capture() -> None:
    clean = source(7)
    theirs = clean.sites["attn.z", 2][None]
    value = value_of("attn.z", SPAN)
    new = edited(Patch("attn.z", source=clean, layers=2), "attn.z", value, SPAN, 2)
    assert same_bits(new, theirs)
    edit = Patch("attn.z", source=clean, layers=2, positions=[5, 1], source_positions=[0, -1])
    new = edited(edit, "attn.z", value, SPAN, 2)
    wanted = value.clone()
    wanted[0, 5], wanted[0, 1] = theirs[0, 0], theirs[0, 6]
    assert same_bits(new, wanted)
    edit = Patch("attn.z", source=clean, layers=2, positions=slice(2, 5), source_positions=3)
    new = edited(edit, "attn.z", value, SPAN, 2)
    assert same_bits(new[0, 2:5], theirs[0, [3, 3, 3]])
    new = edited(Patch("attn.z", source=clean, layers=2, heads=1), "attn.z", value, SPAN, 2)
    assert same_bits(new[:, :, 1], theirs[:, :, 1])
    assert same_bits(new[:, :, 2:], value[:, :, 2:])


def test_patch_from_a_tensor() -> None:
    value = value_of("resid_post", SPAN)
    rows = torch.randn(2, D_MODEL)
    edit = Patch("resid_post", source=rows, layer=0, positions=[4, 2])
    new = edited(edit, "resid_post", value, SPAN)
    assert same_bits(new[0, [4, 2]], rows)
    new = edited(
        Patch("resid_post", source=rows[0], layer=0, positions="last"), "resid_post", value, SPAN
    )
    assert same_bits(new[0, 6], rows[0])
    assert same_bits(new[0, :6], value[0, :6])


def test_scale_project_replace_custom() -> None:
    value = value_of("resid_post", SPAN)

    def made(edit: Any) -> Tensor:
        return edited(edit, "resid_post", value, SPAN)

    assert same_bits(made(Scale("resid_post", 0.5)), value * 0.5)
    directions = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(2))
    inside = made(Project("resid_post", directions=[*directions.tolist()], onto=True))
    outside = made(Project("resid_post", directions=torch.cat([directions, directions])))
    assert_near(inside + outside, value, 1e-6)
    assert_near(outside @ directions.T, torch.zeros(1, 7, 2), 1e-5, least=float(value.norm()))
    assert_near(made(Project("resid_post", directions=directions[0]))[0] @ directions[0],
                torch.zeros(7), 1e-5, least=float(value.norm()))  # fmt: skip
    assert same_bits(made(Replace("resid_post", 0.25)), torch.full_like(value, 0.25))
    rows = torch.randn(7, D_MODEL)
    assert same_bits(made(Replace("resid_post", rows)), rows[None])
    assert same_bits(made(Replace("resid_post", rows[:2], positions=[3, 0]))[0, [3, 0]], rows[:2])
    assert same_bits(made(Replace("resid_post", [9.0], units=2))[..., 2], torch.full((1, 7), 9.0))
    new = made(Custom("resid_post", lambda tokens: tokens.flip(0), positions=slice(1, 4)))
    assert same_bits(new[0, 1:4], value[0, [3, 2, 1]])


def test_a_custom_function_sees_one_prompt_and_a_copy() -> None:
    span = prefill(3, 7, 5)
    value = value_of("mlp.post", span)
    before = value.clone()
    seen = []

    def function(tokens: Tensor) -> Tensor:
        seen.append(tuple(tokens.shape))
        return tokens.zero_()

    new = edited(Custom("mlp.post", function, positions=PerPrompt([None, [], -1])), "mlp.post",
                 value, span)  # fmt: skip
    assert seen == [(3, UNITS), (1, UNITS)]
    assert same_bits(value, before)
    assert not new[0, :3].any()
    assert not new[2, 4].any()
    assert same_bits(new[1], value[1])
    for result in (None, torch.zeros(1)):
        with pytest.raises(EditError, match="function returned"):
            edited(Custom("mlp.post", lambda _, r=result: r), "mlp.post", value, span)


def test_patterns_are_edited_by_query() -> None:
    pattern = torch.randn(1, 4, 7, 7)
    new = compiled(Scale("attn.pattern", 2.0, heads=1, positions=3)).apply(
        ("attn.pattern", 0), pattern, SPAN
    )
    wanted = pattern.clone()
    wanted[0, 1, 3] *= 2
    assert new is not None
    assert same_bits(new, wanted)


IDENTITIES = [
    Steer("resid_post", vector=VECTOR, scale=0.0),
    Steer("resid_post", vector=torch.zeros(D_MODEL)),
    Steer("resid_post", vector=VECTOR, scale=0.0, renormalise=True),
    Scale("resid_post", 1.0),
    Scale("resid_post", 1),
    Custom("resid_post", lambda tokens: tokens),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("edit", IDENTITIES, ids=str)
def test_identities_keep_every_bit(edit: Any, dtype: torch.dtype) -> None:
    value = value_of("resid_post", SPAN).to(dtype)
    value[0, 0, 0], value[0, 1, 1] = -0.0, float("inf")
    made = compiled(edit)
    new = made.apply(("resid_post", 1), value, SPAN)
    new = value if new is None else new
    assert same_bits(new.view(torch.uint8), value.view(torch.uint8))
    assert made.touched.counts[0, 1] == 7


def test_replacing_by_the_same_value_keeps_every_bit() -> None:
    value = value_of("resid_post", SPAN)
    value[0, 0, 0] = -0.0
    assert same_bits(edited(Replace("resid_post", value[0]), "resid_post", value, SPAN), value)


@settings(deadline=None)
@given(st.data())
def test_what_is_not_named_keeps_its_bits(data: st.DataObject) -> None:
    prompts = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    span = prefill(*prompts)
    value = value_of("attn.z", span, data.draw(st.integers(0, 99)))
    entries = [data.draw(st.sets(st.integers(0, n - 1))) for n in prompts]
    heads = data.draw(st.none() | st.sets(st.integers(0, 3), min_size=1))
    units = data.draw(st.none() | st.integers(0, 1))
    if not any(entries):
        entries[0] = {0}
    edit = Custom(
        "attn.z",
        lambda tokens: tokens + 100,
        positions=PerPrompt([sorted(each) for each in entries]),
        heads=None if heads is None else sorted(heads),
        units=units,
    )
    new = edited(edit, "attn.z", value, span)
    named = torch.zeros(value.shape, dtype=torch.bool)
    for row, each in enumerate(entries):
        for position in each:
            for head in heads or ([] if heads is not None else range(4)):
                named[row, position, head, slice(None) if units is None else units] = True
    assert same_bits(new[~named], value[~named])
    assert same_bits(new[named], value[named] + 100)


@settings(deadline=None)
@given(st.permutations(range(4)), st.integers(0, 9))
def test_edits_of_a_site_are_applied_in_the_order_given(order: list[int], seed: int) -> None:
    value = value_of("resid_post", SPAN, seed)
    edits = [
        Scale("resid_post", 3.0),
        Steer("resid_post", vector=VECTOR),
        Custom("resid_post", torch.tanh),
        Custom("resid_post", lambda tokens: tokens.cumsum(-1)),
    ]
    functions = [
        lambda x: x * 3.0,
        lambda x: x + VECTOR,
        torch.tanh,
        lambda x: x.cumsum(-1),
    ]
    wanted = value
    for i in order:
        wanted = functions[i](wanted)
    new = edited([edits[i] for i in order], "resid_post", value, SPAN)
    assert same_bits(new, wanted)


def test_positions_of_steps() -> None:
    made = compiled(Steer("resid_post", vector=VECTOR, positions="generated", layer=0), [7], 3)
    key = ("resid_post", 0)
    assert made.apply(key, torch.zeros(1, 7, D_MODEL), SPAN) is None
    with pytest.raises(
        UntouchedEditError, match=r"edit 0 .steer:resid_post@0.generated. .* layers 0"
    ):
        made.check_touched()
    new = made.apply(key, torch.zeros(1, 1, D_MODEL), Span(7, 1, (1,), (7,)))
    assert new is not None
    assert same_bits(new[0, 0], VECTOR)
    made.check_touched()
    made = compiled(Scale("resid_post", 2.0, positions=[-1, 8], layer=0), [7], 3)
    for start, touched in ((0, 1), (7, 1), (8, 2), (9, 2)):
        made.apply(key, torch.ones(1, 7 if start == 0 else 1, D_MODEL),
                   SPAN if start == 0 else Span(start, 1, (1,), (7,)))  # fmt: skip
        assert made.touched.counts[0, 0] == touched


def test_batches_of_some_prompts() -> None:
    made = compiled(Scale("resid_post", 2.0, layer=0, positions=PerPrompt([0, [], 1])), [3, 4, 5])
    value = torch.ones(2, 5, D_MODEL)
    new = made.apply(("resid_post", 0), value, Span(0, 5, (5, 3), (5, 3), (2, 0)))
    assert new is not None
    assert (new != 1).nonzero()[:, :2].unique(dim=0).tolist() == [[0, 1], [1, 0]]
    assert made.apply(("resid_post", 0), value[:1], Span(0, 5, (4,), (4,), (1,))) is None


def test_an_edit_that_the_model_did_not_reach_is_refused() -> None:
    made = compiled([Scale("resid_post", 2.0, layers=[0, 2]), Scale("embed", 2.0)])
    made.apply(("resid_post", 0), value_of("resid_post", SPAN), SPAN)
    with pytest.raises(UntouchedEditError, match=r"edit 0 .*touched nothing at layers 2:"):
        made.check_touched()
    made.apply(("resid_post", 2), value_of("resid_post", SPAN), SPAN)
    with pytest.raises(UntouchedEditError, match=r"edit 1 \(scale:embed factor=2.0\) touched noth"):
        made.check_touched()


def test_a_value_of_other_axes_is_not_edited() -> None:
    with pytest.raises(SilentSiteError, match="1 × 6 tokens in a pass of 1 × 7"):
        compiled(Scale("resid_post", 2.0)).apply(("resid_post", 0), torch.ones(1, 6, 8), SPAN)


def test_gradients_pass_through_edits() -> None:
    vector = torch.ones(D_MODEL, requires_grad=True)
    value = value_of("resid_post", SPAN).requires_grad_()
    new = edited(Steer("resid_post", vector=vector, scale=2.0, positions=1), "resid_post", value,
                 SPAN)  # fmt: skip
    new.sum().backward()
    assert vector.grad is not None
    assert vector.grad.tolist() == [2.0] * D_MODEL
    assert value.grad is not None
    assert value.grad.eq(1).all()
