"""A checkpoint whose residual stream is rotated, and whose outputs are the same.

Where every block reads the residual stream x through an RMS norm, and adds to it through linear
layers, a rotation Q of the stream can be folded into the weights: a norm's factors g move into the
layers that read it (RMS(x)·g·Wᵀ = RMS(x)·(W·g)ᵀ, and RMS commutes with Q), which become W·g·Qᵀ;
layers that add to the stream become Q·W, the embedding E·Qᵀ, the head like a reader. Nothing is
left to compute when the model runs, so that any engine runs it, and weights have no outliers left.

The values of attention heads are rotated too, head by head (`folded_heads`), where that leaves the
logits as they are.

Which layers read and add is seen on a probe, never told by names; the folded model must give the
logits of the model, or it is refused.

Source: QuaRot, arXiv 2404.00456 (its first rotation); SpinQuant, arXiv 2405.16406 (R1 and R2).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from trilens.checkpoint.folded_heads import find_value_heads, fold_heads
from trilens.checkpoint.source import Checkpoint
from trilens.errors import UsageError
from trilens.io.atomic import atomic_folder
from trilens.io.paths import as_path
from trilens.lens.lens import Lens
from trilens.models.forward_call import probe_ids
from trilens.ternary.rotation import rotate

__all__ = ["FoldReport", "fold_rotation"]

_TOLERANCE = 1e-4  # of the largest logit: what folding may change, in float32
_TOKENS = 24


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What was folded.

    Attributes:
        readers: Layers that read the residual stream, behind a norm.
        writers: Layers that add to it.
        norms: Norms whose factors moved into the readers.
        untied: The head was the embedding, and is a matrix of its own now.
        logit_difference: The largest change of a logit on the probe in float32, over the largest.
        values: Layers that make the values of attention, whose heads were rotated too.
    """

    readers: tuple[str, ...]
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    untied: bool
    logit_difference: float
    values: tuple[str, ...] = ()


@dataclass(slots=True)
class _Seen:
    """Calls of one probe: which layer got what a norm gave."""

    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    linears: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # so that no memory is used twice


def fold_rotation(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> FoldReport:
    """Write a copy of a checkpoint with a Hadamard rotation folded into its weights.

    It is an ordinary checkpoint of the same architecture (a tied head becomes one of its own),
    which `ternarize` takes like any other, also for GGUF files.

    Args:
        src: directory or hub id of a causal language model.
        dst: a new directory, written whole or not at all.

    Raises:
        UsageError: `dst` exists; a model that does more with its stream than RMS norms, linear
            layers and sums.
        LoadError: the source cannot be read.

    Memory: the model in float32, three times.
    """
    out = as_path(dst, "output")
    if out.exists():
        raise UsageError(f"output {out} exists: give a new directory")
    lens = Lens.from_pretrained(src, dtype="float32")
    model = lens.model
    stored = getattr(torch, str(_stored_dtype(src)).removeprefix("torch."))
    ids = probe_ids(model, lens.anatomy.vocab or model.config.vocab_size, _TOKENS)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits.double()
        for with_heads in (True, False):
            folded, report = _folded(lens, ids, with_heads=with_heads)
            after = folded(ids, use_cache=False).logits.double()
            difference = float((after - before).abs().max() / before.abs().max())
            if difference <= _TOLERANCE or not report.values:
                break
    if not difference <= _TOLERANCE:
        raise UsageError(
            f"{src} changes its logits by {difference:.1e} of the largest when its residual stream "
            f"is rotated (at most {_TOLERANCE:.0e}): it does more with it than RMS norms, linear "
            "layers and sums; ternarize it without a folded rotation"
        )
    with atomic_folder(out) as folder:
        folded.to(stored).save_pretrained(folder)
        if lens.tokenizer is not None:
            lens.tokenizer.save_pretrained(folder)
    return replace(report, logit_difference=difference)


def _stored_dtype(src: str | os.PathLike[str]) -> Any:
    config = Checkpoint.open(src).config
    return getattr(config, "dtype", None) or torch.float32


def _folded(lens: Lens, ids: Tensor, *, with_heads: bool) -> tuple[Any, FoldReport]:
    """A model with the rotation in its weights, and what was changed."""
    model, width = lens.model, lens.d_model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    untied = head.weight is embedding.weight
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    new = type(model)(config).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new.load_state_dict(state)
    paths = [block.path for block in lens.anatomy.blocks]
    with _watched(new, width) as seen:
        new(ids, use_cache=False)
    readers, writers, norms = _roles(new, seen, paths, width)
    for norm, users in norms.items():
        factors, neutral = _factors(norm, new.get_submodule(norm), seen)
        for path in users:
            layer = new.get_submodule(path)
            layer.weight.copy_(rotate(layer.weight.double() * factors).float())
        new.get_submodule(norm).weight.fill_(neutral)
    for path in writers:
        layer = new.get_submodule(path)
        layer.weight.copy_(rotate(layer.weight.double().T).T.float())
        if layer.bias is not None:
            layer.bias.copy_(rotate(layer.bias.double()[None])[0].float())
    table = new.get_input_embeddings()
    table.weight.copy_(rotate(table.weight.double()).float())
    n_heads = getattr(config, "num_attention_heads", None)
    attentions = (
        find_value_heads(seen.linears, readers, writers, paths, n_heads)
        if with_heads and isinstance(n_heads, int)
        else ()
    )
    for heads in attentions:
        fold_heads(new, heads)
    makers = tuple(heads.maker for heads in attentions)
    return new, FoldReport(tuple(readers), tuple(writers), tuple(norms), untied, 0.0, makers)


@contextmanager
def _watched(model: nn.Module, width: int) -> Iterator[_Seen]:
    """What norms and linear layers got and gave while the model runs."""
    seen, handles = _Seen(), []

    def watch(path: str, into: dict[str, tuple[Tensor, Tensor]]) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            into[path] = (inputs[0], output)
            seen.kept += [inputs[0], output]

        return hook

    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(watch(path, seen.linears)))
        elif isinstance(weight, Tensor) and tuple(weight.shape) == (width,):
            handles.append(module.register_forward_hook(watch(path, seen.norms)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _roles(
    model: nn.Module, seen: _Seen, blocks: list[str], width: int
) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Readers, writers, and the readers of each norm."""
    layers: dict[str, Any] = dict(model.named_modules())
    by_output = {_place(output): path for path, (_, output) in seen.norms.items()}
    norms: dict[str, list[str]] = {path: [] for path in seen.norms}
    readers, writers = [], []
    for path, (given, _) in seen.linears.items():
        norm = by_output.get(_place(given))
        if norm is not None:
            norms[norm].append(path)
            readers.append(path)
        elif layers[path].weight.shape[0] == width and any(
            path.startswith(f"{block}.") for block in blocks
        ):
            writers.append(path)
    idle = [path for path, users in norms.items() if not users]
    if idle or not writers:
        raise UsageError(
            f"{idle[0] if idle else 'the model'} is no norm that linear layers read: a rotation of "
            "the residual stream cannot be folded into this model; ternarize it without one"
        )
    return readers, writers, norms


def _place(values: Tensor) -> tuple[int, int]:
    """Where numbers lie; a head may be given a view of them."""
    return values.data_ptr(), values.numel()


def _factors(path: str, norm: Any, seen: _Seen) -> tuple[Tensor, float]:
    """What an RMS norm multiplies channels by, and the weight of a norm that multiplies by 1.

    Raises:
        UsageError: it is no RMS norm.
    """
    given, gave = (tensor.detach().double() for tensor in seen.norms[path])
    if getattr(norm, "bias", None) is None:
        for offset in (0.0, 1.0):  # some models add 1 to the weight when they run
            factors = norm.weight.detach().double() + offset
            plain = gave / factors
            root = given.square().mean(-1, keepdim=True).sqrt()
            share = (plain * root / given)[given.abs() > 1e-3 * root]
            if bool((share - 1).abs().max() < 1e-2) and bool(torch.isfinite(share).all()):
                return factors, 1.0 - offset
    raise UsageError(
        f"{path} is no RMS norm of the residual stream, with which a rotation commutes: it cannot "
        "be folded into this model; ternarize it without one"
    )
