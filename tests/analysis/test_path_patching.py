"""Path patching against hand-written hooks, and what it refuses."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import trilens
from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens.analysis.path_patching import path_patch
from trilens.errors import MetricError, OutOfRangeError, SiteError, UsageError
from trilens.lens.lens import Lens

TOLERANCE = 1e-6


def metric(logits: Tensor) -> Tensor:
    return logits[-1, 20] - logits[-1, 30]


def swap(module: Any, value: Tensor, *, at: Any = ..., output: bool = True) -> Any:
    """A hook that puts a value into a module's output, or its first input."""

    def put(old: Tensor) -> Tensor:
        new = old.clone()
        new[..., at] = value[..., at]
        return new

    if output:
        return module.register_forward_hook(
            lambda _m, _a, out: (put(out[0]), *out[1:]) if isinstance(out, tuple) else put(out)
        )
    return module.register_forward_pre_hook(lambda _m, args: (put(args[0]), *args[1:]))


def kept(modules: dict[str, tuple[Any, bool]], run: Any) -> dict[str, Tensor]:
    """What modules give, or take, in one run."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, (module, output) in modules.items():

            def keep(_m: Any, args: Any, out: Any = None, name: str = name) -> None:
                value = args[0] if out is None else out
                found[name] = (value[0] if isinstance(value, tuple) else value).clone()

            add = module.register_forward_hook if output else module.register_forward_pre_hook
            stack.callback(add(keep).remove)
        run()
    return found


@pytest.mark.parametrize("freeze_mlps", [True, False])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_path_between_heads_is_what_hooks_give(freeze_mlps: bool, direction: Any) -> None:
    """Head 2 of layer 0 to the queries of head 1 in layer 2 of the demo transformer."""
    lens = Lens.from_pretrained(trilens.demo_path("transformer"), dtype="float32")
    model: Any = lens.model
    clean, corrupted = (
        lens.tokenizer("The cat sat on the mat"),
        lens.tokenizer("The dog sat on a mat"),
    )
    a, b = (torch.tensor(each["input_ids"]) for each in (clean, corrupted))
    b = torch.cat([b, a])[: len(a)]
    found = path_patch(
        lens, a, b, ("attn.z", 0, 2), [("attn.q", 2, 1)],
        metric=metric, freeze_mlps=freeze_mlps, direction=direction,
    )  # fmt: skip
    run_ids, from_ids = (b, a) if direction == "denoise" else (a, b)
    blocks = model.model.layers
    size = blocks[0].self_attn.head_dim
    sites = {f"z{i}": (block.self_attn.o_proj, False) for i, block in enumerate(blocks)}
    sites |= {f"mlp{i}": (block.mlp, True) for i, block in enumerate(blocks)}
    query = blocks[2].self_attn.q_proj

    def run(ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
        return logits

    own = kept(sites, lambda: run(run_ids))
    sent = kept(sites, lambda: run(from_ids))
    head = slice(2 * size, 3 * size)
    with ExitStack() as stack:
        stack.callback(swap(blocks[0].self_attn.o_proj, sent["z0"], at=head, output=False).remove)
        stack.callback(swap(blocks[1].self_attn.o_proj, own["z1"], output=False).remove)
        for i in (0, 1) if freeze_mlps else ():
            stack.callback(swap(blocks[i].mlp, own[f"mlp{i}"]).remove)
        got = kept({"q": (query, True)}, lambda: run(run_ids))["q"]
    with ExitStack() as stack:
        stack.callback(swap(query, got, at=slice(size, 2 * size)).remove)
        wanted = metric(run(run_ids))
    scale = float(run(run_ids).abs().max())
    assert abs(found.value - float(wanted)) <= TOLERANCE * scale
    assert_near(
        [found.base, found.target], [float(metric(run(x))) for x in (run_ids, from_ids)], 1e-6
    )
    assert found.moved[0] > 0
    assert found.to_dict()["receivers"] == found.table()


@pytest.mark.parametrize("name", ["mamba", "rwkv7"])
def test_a_path_of_a_mixer_is_the_stream_alone(name: str) -> None:
    """All between is frozen, so that the stream at the end moves by what the mixer adds."""
    lens = Lens.from_pretrained(trilens.demo_path(name), dtype="float32")
    a, b = torch.arange(5, 12), torch.arange(5, 12)
    b[2] = 40
    last = lens.n_layers - 1
    found = path_patch(lens, a, b, ("mixer.add", 0), [("resid_post", last)], metric=metric)
    asked: dict[str, Any] = {"residual": None, "sites": ["mixer.add", "resid_post"]}
    clean, corrupted = (lens.capture(each, **asked).sites for each in (a, b))
    stream = corrupted["resid_post", last]
    stream = stream + clean["mixer.add", 0] - corrupted["mixer.add", 0]
    wanted = metric(lens.unembed(stream))
    scale = float(lens.unembed(stream).abs().max())
    assert abs(found.value - float(wanted)) <= 1e-5 * scale
    assert found.effect != 0


def test_a_path_from_the_embedding_through_all_is_the_whole_effect() -> None:
    """From the embedding to the first block's input there is nothing between."""
    lens, ids = Lens(build("llama")), prompt_ids("llama", 9)[0]
    other = ids.clone()
    other[3] = 41
    found = path_patch(lens, ids, other, ("embed", None), [("resid_pre", 0)], metric=metric)
    assert found.effect == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("sender", "receivers", "error", "words"),
    [
        (("attn.zz", 0), [("resid_post", 1)], UsageError, "attn.z"),
        (("attn.z", 9), [("resid_post", 1)], OutOfRangeError, "layer 9"),
        (("attn.z", 0, 99), [("resid_post", 1)], OutOfRangeError, "head 99"),
        (("mlp.out", 0, 1), [("resid_post", 1)], SiteError, "no heads"),
        (("attn.pattern", 0), [("resid_post", 1)], SiteError, "attn.q"),
        (("mixer.out", 0), [("resid_post", 1)], SiteError, "no recurrent mixer"),
        ("attn.z", [("resid_post", 1)], UsageError, "cannot be read"),
        (("attn.z", 0), [], UsageError, "empty"),
        (("attn.z", 1), [("attn.q", 1, 0)], UsageError, "not behind"),
        (("attn.z", 0), [("attn.q", 1, 0), ("attn.q", 1, 0)], UsageError, "twice"),
    ],
)
def test_what_is_no_path_is_refused(sender: Any, receivers: Any, error: Any, words: str) -> None:
    lens, ids = Lens(build("llama")), prompt_ids("llama", 9)[0]
    other = ids.clone()
    other[3] = 41
    with pytest.raises(error, match=words):
        path_patch(lens, ids, other, sender, receivers, metric=metric)


def test_equal_prompts_and_unknown_directions_are_refused() -> None:
    lens, ids = Lens(build("llama")), prompt_ids("llama", 9)[0]
    path: Any = (lens, ids, ids, ("attn.z", 0), [("resid_post", 1)])
    with pytest.raises(MetricError, match="both runs"):
        path_patch(*path, metric=metric)
    with pytest.raises(UsageError, match="sideways"):
        path_patch(*path, metric=metric, direction="sideways")
