"""Loops over tokens: the same gradients, in less than their square."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tinymodels import build, prompt_ids
from trilens.taps.step_reads import StepReads, reading_steps

pytestmark = pytest.mark.usefixtures("quiet")

LOOPS = [
    *("mamba", "falcon_mamba", "jamba", "rwkv", "xlstm", "zamba", "mamba2", "falcon_h1"),
    *("qwen3_next", "qwen3_5", "kimi_linear", "olmo_hybrid", "bailing_hybrid", "llama"),
]


class Filled(TorchDispatchMode):
    """Counts the entries that gradients of single steps fill, most of them with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.select_backward.default:
            self.entries += made.numel()
        return made


def gradients(model_type: str, length: int, reads: AbstractContextManager[object]) -> list[Tensor]:
    model, ids = build(model_type), prompt_ids(model_type, length)
    with reads:
        logits = model(input_ids=ids, use_cache=False).logits
    wanted = [each for each in model.parameters() if each.requires_grad]
    found = torch.autograd.grad(logits.logsumexp(-1).sum(), wanted, allow_unused=True)
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize("model_type", LOOPS)
def test_gradients_are_those_of_plain_reads(model_type: str) -> None:
    plain = gradients(model_type, 70, nullcontext())
    found = gradients(model_type, 70, StepReads())
    assert len(found) == len(plain) > 0
    for a, b in zip(found, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "jamba", "rwkv"])
def test_what_is_filled_grows_with_the_tokens_not_with_their_square(model_type: str) -> None:
    filled = {}
    for length in (32, 64):
        for name, reads in (("plain", nullcontext()), ("steps", StepReads())):
            with Filled() as counted:
                gradients(model_type, length, reads)
            filled[name, length] = counted.entries
    assert 0 < filled["steps", 64] <= 2.01 * filled["steps", 32]
    assert filled["plain", 64] >= 3.5 * filled["plain", 32]  # the reason
    assert filled["steps", 64] < filled["plain", 64] / 4


def loop(x: Tensor, index: tuple[object, ...]) -> Tensor:
    """Every step of x, with what is put at the place of ... in an index."""
    where = index.index(...)
    total = torch.zeros(())
    for step in range(x.shape[sum(each is not None for each in index[:where])]):
        at = (*index[:where], step, *index[where + 1 :])
        total = (total + x[at].sin() * (step + 1)).tanh()
    return total.sum()


@pytest.mark.parametrize(
    "index",
    [
        (...,),
        (slice(None), ...),
        (slice(None), slice(None), ...),
        (slice(None), ..., None),
        (None, slice(None), ..., slice(None)),
        (slice(None), ..., slice(1, 3)),
        (slice(None), ..., 2),
    ],
)
def test_every_way_to_read_a_step(index: tuple[object, ...]) -> None:
    values = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(0))
    found = []
    for reads in (nullcontext(), StepReads()):
        x = (own := values.clone().requires_grad_()) * 2
        with reads:
            total = loop(x, index)
        found.append((total, *torch.autograd.grad(total, own)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_what_is_written_into_between_two_reads_is_read_as_it_is_then() -> None:
    values = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for reads in (nullcontext(), StepReads()):
        x = (own := values.clone().requires_grad_()) * 1
        with reads:
            for step in range(1, 30):
                x[:, step] += 0.5 * x[:, step - 1].tanh()
            # A loop that only reads, then a write, then what is read of it.
            total = sum(x[:, step].tanh().sum() for step in range(20))
            x[:, 3] = 2
            total = total + sum((x[:, step] * step).sum() for step in range(20))
        found.append((x, *torch.autograd.grad(total + x.square().sum(), own)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def written(x: Tensor) -> Tensor:
    first, second, third = x[:, 0], x[:, 1], x[:, 2]
    third += 1
    return (first * second * third).sum()


def written_later(x: Tensor) -> Tensor:
    first, second, third = x[:, 0], x[:, 1], x[:, 2]
    x[:, 3] = 0
    return (first * second * third).sum() + x.square().sum()


@pytest.mark.parametrize("run", [written, written_later])
def test_steps_may_be_written_into(run: Callable[[Tensor], Tensor]) -> None:
    values = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
    with StepReads(), pytest.raises(RuntimeError, match="of Unbind"):  # the reason
        run(values.clone().requires_grad_() * 1)
    found = []
    for read in (lambda again: again(), reading_steps):
        own = values.clone().requires_grad_()
        total = read(lambda own=own: run(own * 1))
        found.append((total, *torch.autograd.grad(total, own)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_other_errors_are_those_of_the_pass() -> None:
    calls = []

    def run() -> None:
        calls.append(1)
        raise RuntimeError("a view of something else")

    with pytest.raises(RuntimeError, match="something else"):
        reading_steps(run)
    assert calls == [1]


@pytest.mark.parametrize(
    ("steps", "is_loop"),
    [
        ((0, 1, 2, 3), True),
        ((9, 8, 7, 6), True),
        ((-1, -2, -3, -4), True),
        ((0, 0, 1, 1, 2, 2), True),
        ((1, 0, 3, 2, 5, 4), False),
        ((3, 5, 9, 4, 1), False),
        ((0, 1, 2, 8), True),
    ],
)
def test_a_loop_reads_neighbours(steps: tuple[int, ...], is_loop: bool) -> None:
    x = torch.randn(10, 4, requires_grad=True) * 1
    few = torch.randn(6, 4, requires_grad=True) * 1
    with StepReads():
        names = {x[step].grad_fn.name() for step in steps}
        assert ("UnbindBackward0" in names) == is_loop
        assert {few[step].grad_fn.name() for step in range(6)} == {"SelectBackward0"}


def test_a_step_that_is_not_there_is_refused_as_ever() -> None:
    x = torch.randn(2, 12, requires_grad=True) * 1
    with StepReads():
        for step in range(12):
            _ = x[:, step - 12]
        with pytest.raises(IndexError, match="out of bounds"):
            _ = x[:, 12]
        with pytest.raises(IndexError, match="too many indices"):
            _ = x[:, :, :, 1]


def test_nothing_is_held_afterwards() -> None:
    reads = StepReads()
    with pytest.raises(ValueError, match="stop"), reads:
        x = torch.randn(2, 12, requires_grad=True) * 1
        for step in range(12):
            _ = x[:, step]
        raise ValueError("stop")
    assert not reads._seen
    assert torch.overrides._get_current_function_mode_stack() == []
