"""Edits in a running model: identity edits, hand-written hooks, batches, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinymodels import build, prompt_ids
from trilens.edits import Ablate, Custom, Knockout, Patch, PerPrompt, Replace, Scale, Steer
from trilens.errors import EditError, SiteError, UntouchedEditError, UsageError
from trilens.lens.lens import Lens

pytestmark = pytest.mark.usefixtures("quiet")

# Sequential, parallel, post-norm, sandwich norms, a multiplier, shared blocks, tokens in one axis,
# in-place sums, experts, recurrent and hybrid, sequence first.
FAMILIES = (
    "llama",
    "gpt2",
    "gpt_neox",
    "gemma2",
    "olmo2",
    "granite",
    "bert",
    "opt",
    "falcon",
    "llama4_text",
    "mixtral",
    "mamba",
    "rwkv",
    "falcon_h1",
    "zamba2",
    "qwen3_next",
)


def lens_of(model_type: str) -> tuple[Lens, Tensor]:
    return Lens(build(model_type)), prompt_ids(model_type, 17)


def logits(lens: Lens, ids: Any, edits: Any = ()) -> Tensor:
    found = lens.capture(ids, residual=None, edits=edits).logits
    assert found is not None
    return found


def editable(lens: Lens) -> list[str]:
    fixed = {name for (name, _), site in lens.sites.sites.items() if site.fixed}
    return [name for name in lens.site_layers if name not in fixed]


def hooks_left(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def close(a: Tensor, b: Tensor) -> bool:
    # Both ways compute the same terms in another order: rounding of the largest value.
    return float((a - b).abs().max()) <= 1e-6 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_identity_edit_leaves_every_bit(model_type: str) -> None:
    lens, ids = lens_of(model_type)
    plain = logits(lens, ids)
    for name in editable(lens):
        found = lens.capture(ids, residual=None, sites=[name], edits=Scale(name, 1.0))
        assert torch.equal(found.logits, plain), name
    assert hooks_left(lens.model) == 0


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_edit_reaches_the_logits(model_type: str) -> None:
    lens, ids = lens_of(model_type)
    plain = logits(lens, ids)
    for name in editable(lens):
        assert not torch.equal(logits(lens, ids, Scale(name, 1.5)), plain), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_kept_is_what_the_edit_gave(model_type: str) -> None:
    lens, ids = lens_of(model_type)
    for name in ("resid_pre", "resid_mid", "attn.z", "mlp.out", "mixer.out", "resid_post"):
        layers = lens.site_layers.get(name)
        if not layers:
            continue
        plain = lens.capture(ids, sites=[name], layers=layers[-1:]).sites[name, layers[-1]]
        edit = Scale(name, 2.0, layers=layers[-1], positions=[3])
        found = lens.capture(ids, sites=[name], layers=layers[-1:], edits=edit)
        value = found.sites[name, layers[-1]]
        # What is read after a sum of two parts was rounded once more.
        assert close(value[3], 2 * plain[3]), name
        assert torch.equal(value[:3], plain[:3]), name


def test_steering_is_what_a_hook_does() -> None:
    lens, ids = lens_of("llama")
    vector = torch.randn(lens.d_model, generator=torch.Generator().manual_seed(0))

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = first.clone()
        new[:, 5:] += 3.0 * vector
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = lens.anatomy.blocks[1].module.register_forward_hook(hook)
    with torch.no_grad():
        wanted = lens.model(input_ids=ids, use_cache=False).logits[0]
    handle.remove()
    edit = Steer("resid_post", layers=1, vector=vector, scale=3.0, positions=slice(5, None))
    assert close(logits(lens, ids, edit), wanted)


def test_a_head_is_ablated_as_a_hook_does_it() -> None:
    lens, ids = lens_of("gpt2")
    module = lens.model.get_submodule(lens.anatomy.attention[1]).c_proj
    width = lens.d_model // lens.model.config.n_head

    def before(_module: nn.Module, args: Any) -> Any:
        new = args[0].clone()
        new[..., width : 2 * width] = 0
        return (new,)

    handle = module.register_forward_pre_hook(before)
    with torch.no_grad():
        wanted = lens.model(input_ids=ids, use_cache=False).logits[0]
    handle.remove()
    for name in ("attn.z", "attn.head_out"):
        assert close(logits(lens, ids, Ablate(name, layers=1, heads=1)), wanted), name


def test_a_residual_between_two_parts_is_replaced_for_all_that_read_it() -> None:
    """resid_mid is read by the second norm and by the sum: both see the new value."""
    lens, ids = lens_of("llama")
    given = lens.capture(ids, sites=["resid_mid", "mlp.add"], layers=[0]).sites
    value = given["resid_mid", 0] + 0.5
    found = lens.capture(
        ids,
        sites=["resid_mid", "mlp.add", "resid_post"],
        layers=[0],
        edits=Replace("resid_mid", value, layers=0),
    ).sites
    assert torch.equal(found["resid_mid", 0], value)
    assert not torch.equal(found["mlp.add", 0], given["mlp.add", 0])
    assert close(found["resid_post", 0], value + found["mlp.add", 0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_knockout_hides_an_edge_and_no_more(implementation: str) -> None:
    model = build("llama")
    model.set_attn_implementation(implementation)
    lens, ids = Lens(model), prompt_ids("llama", 17)
    edit = Knockout(layer=1, heads=[2], queries=-1, keys=[3, 4])
    before = lens.capture(ids, attention=True).attention
    after = lens.capture(ids, attention=True, edits=edit)
    row = after.attention.attention_from_position(1, -1, head=2)
    wanted = before.attention_from_position(1, -1, head=2).astype("float64")
    wanted[[3, 4]] = 0
    wanted /= wanted.sum()
    assert abs(row - wanted).max() <= 1e-6
    assert (row[[3, 4]] == 0).all()
    # Earlier queries and other heads are as they were.
    for head in (0, 1, 3):
        same = after.attention.attention_from_position(1, -1, head=head)
        assert (same == before.attention_from_position(1, -1, head=head)).all()
    assert (
        after.attention.attention_from_position(1, 8, head=2)
        == before.attention_from_position(1, 8, head=2)
    ).all()


def test_padded_rows_are_edited_as_single_prompts() -> None:
    lens, ids = lens_of("llama")
    prompts = [ids[0, :n] for n in (17, 9, 12)]
    source = lens.capture(prompts[0], sites=["resid_pre"])
    edits = [
        Scale("attn.z", 0.5, heads=[1], positions=[-1]),
        Knockout(layers=[0], queries=-1, keys=[1]),
        Patch(
            "resid_pre",
            layers=1,
            source=source,
            source_positions=[2],
            positions=PerPrompt([[3], [], [4]]),
        ),
    ]
    together = list(lens.capture_many(prompts, batch_size=3, residual=None, edits=edits))
    for number, prompt in enumerate(prompts):
        place = {0: 3, 2: 4}.get(number)
        mine = edits[:2]
        if place is not None:
            mine = [
                *mine,
                Patch("resid_pre", layers=1, source=source, source_positions=[2], positions=place),
            ]
        wanted, found = logits(lens, prompt, mine), together[number].logits
        assert found is not None
        # The bound by which padded rows count as single prompts (`Lens.batches_safely`).
        assert float((found - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))


def test_nothing_is_left_after_an_exception() -> None:
    lens, ids = lens_of("llama")
    plain = logits(lens, ids)

    def fails(_value: Tensor) -> Tensor:
        raise RuntimeError("mine")

    for name in ("resid_mid", "attn.q_rot", "mlp.post", "resid_post"):
        with pytest.raises((EditError, RuntimeError), match="mine"):
            logits(lens, ids, Custom(name, fails, layers=1))
    assert hooks_left(lens.model) == 0
    assert torch.equal(logits(lens, ids), plain)
    assert all(parameter.requires_grad for parameter in lens.model.parameters())


def test_what_cannot_be_edited_is_refused_before_the_run() -> None:
    lens, ids = lens_of("gpt_neox")
    ran: list[int] = []
    handle = lens.model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(SiteError, match="is not there"):
            lens.capture(ids, sites=["resid_mid"])
        with pytest.raises(EditError, match="resid_mid"):
            logits(lens, ids, Scale("resid_mid", 2.0))
        with pytest.raises(UsageError, match="resid_post"):
            lens.capture(ids, sites=["resid_pots"])
        with pytest.raises(EditError, match="head"):
            logits(lens, ids, Ablate("attn.z", heads=[99]))
        with pytest.raises(EditError, match="position"):
            logits(lens, ids, Scale("resid_post", 2.0, positions=[17]))
        with pytest.raises(EditError, match="generated"):
            logits(lens, ids, Scale("resid_post", 2.0, positions="generated"))
    finally:
        handle.remove()
    assert not ran


def test_an_edit_that_touches_nothing_is_an_error() -> None:
    lens, ids = lens_of("llama")
    edit = Scale("resid_post", 2.0, positions=PerPrompt([[2], []]))
    with pytest.raises((UntouchedEditError, EditError)):
        logits(lens, ids, edit)


def test_sites_of_other_tools_are_understood() -> None:
    lens, ids = lens_of("llama")
    found = lens.capture(ids, sites=["blocks.1.hook_resid_mid", "attn.hook_z"]).sites
    assert found["resid_mid", 1].shape == (17, lens.d_model)
    assert found.layers("attn.z") == tuple(range(lens.n_layers))
    assert found["blocks.1.attn.hook_z"].shape[0] == 17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "afmoe", "hunyuan_v1_moe"])
def test_an_expert_is_ablated_inside_a_router_that_hands_its_logits_out(
    model_type: str, dtype: torch.dtype
) -> None:
    """The logits are a by-product: the choice of experts is made of them in the router."""
    lens, ids = Lens(build(model_type, dtype=dtype)), prompt_ids(model_type, 17)
    layer = lens.site_layers["router"][-1]
    plain = lens.capture(ids, gates=True)
    assert torch.equal(logits(lens, ids, Scale("router", 1.0)), plain.logits)
    best = int(plain.gates.get("router", layer).mean(0).argmax())
    edit = Ablate("router", layer=layer, units=[best])
    without = lens.capture(ids, gates=True, edits=edit)
    assert float(without.gates.get("router", layer)[:, best].max()) == 0
    assert not torch.equal(without.logits, plain.logits)
    assert torch.equal(logits(lens, ids), plain.logits)


def test_an_ablated_expert_is_what_a_router_of_our_own_would_leave_out() -> None:
    lens, ids = lens_of("mixtral")
    router = lens.model.model.layers[1].mlp.gate
    edited = logits(lens, ids, Ablate("router", layer=1, units=[2]))
    forward = router.forward

    def masked(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
        rows[:, 2] = -torch.inf
        values, chosen = rows.softmax(-1).topk(router.top_k, dim=-1)
        return rows, values / values.sum(-1, keepdim=True), chosen

    router.forward = masked
    try:
        torch.testing.assert_close(logits(lens, ids), edited, rtol=1e-5, atol=1e-5)
    finally:
        router.forward = forward


def test_logits_that_a_router_only_hands_out_are_not_edited() -> None:
    """They are read, but the choice of experts was made of them before."""
    lens, ids = lens_of("llama4_text")
    layer = lens.site_layers["router"][0]
    assert lens.capture(ids, sites=["router"]).sites["router", layer].shape[0] == 17
    with pytest.raises(EditError, match="beside what it has made of them"):
        logits(lens, ids, Ablate("router", layer=layer, units=[0]))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
def test_a_pattern_scaled_to_nothing_and_renormalised_is_a_knockout(model_type: str) -> None:
    """But for sinks, whose share a knockout gives the other keys as well."""
    lens, ids = lens_of(model_type)
    edge = {"layer": 1, "heads": [1]}
    scaled = Scale("attn.pattern", 0.0, positions=[-1, 7], keys=[3, 5], renormalise=True, **edge)
    cut = Knockout(queries=[-1, 7], keys=[3, 5], **edge)
    if model_type == "gpt_oss":
        pattern = lens.capture(ids, sites=["attn.pattern"]).sites["attn.pattern", 1]
        changed = lens.capture(ids, sites=["attn.pattern"], edits=scaled).sites["attn.pattern", 1]
        torch.testing.assert_close(changed.sum(-1), pattern.sum(-1))
        assert float(changed[1, 7, [3, 5]].abs().max()) == 0
        return
    torch.testing.assert_close(logits(lens, ids, scaled), logits(lens, ids, cut))
    alone = logits(
        lens, ids.flatten()[:11], Scale("attn.pattern", 0.5, keys=-2, positions=-1, **edge)
    )
    some = Scale("attn.pattern", 0.5, keys=PerPrompt([[], [9]]), positions=-1, **edge)
    found = list(lens.capture_many([ids.flatten(), ids.flatten()[:11]], edits=some))
    torch.testing.assert_close(found[1].logits, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Scale("attn.z", 0.5, keys=[1]), "keys are named of attn.scores and attn.pattern"),
        (Scale("attn.z", 0.5, renormalise=True), "attn.z has none: leave it out"),
        (Scale("attn.pattern", -1.0, renormalise=True), "factor -1 is out of range"),
        (
            Scale("attn.pattern", 0.0, positions=0, keys=0, renormalise=True),
            "nothing is left of a query's attention weights",
        ),
    ],
)
def test_what_cannot_be_renormalised_is_refused(edit: Scale, words: str) -> None:
    lens, ids = lens_of("llama")
    with pytest.raises(EditError, match=words):
        logits(lens, ids, edit)
