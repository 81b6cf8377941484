"""Which tensors of a checkpoint are linear layers inside blocks, read off the model's skeleton.

The model is built from its configuration on the meta device, where it takes no memory, and each
stored tensor is followed through transformers' own renamings to the parameter that it fills. The
rules look at modules and shapes, never at a family's name:

- a block is an element of a `ModuleList`; what holds the weight must lie inside one;
- what holds it must compute as `Linear` does, or be transformers' transposed `Conv1D`, or experts
  that keep one matrix for each in a tensor of rank 3;
- a linear layer beside n experts that gives n numbers is their router.
"""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import ContextManagers

from trilens.checkpoint.format.names import part_name
from trilens.errors import ConfigError
from trilens.io.messages import reason
from trilens.io.safetensors_header import TensorHeader
from trilens.models.build import candidate_classes
from trilens.ternary.packed.linear import PARTS

__all__ = ["HOMELESS", "Choice", "Names", "build_skeleton", "choose", "module_at"]

Placement: TypeAlias = Literal["layer", "merged", "experts", "kept"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
HOMELESS = "it has no place in the model"
"""The reason of a tensor that fills no parameter."""
_FLOATS = {"F16", "BF16", "F32", "F64"}


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to become of one stored tensor.

    Attributes:
        name: Its name in the source.
        packed_as: The name from which those of its packed parts are made.
        storage: "layer": packed, and a `TernaryLinear` in memory; "merged": packed, and
            merged or split by transformers on the way; "experts": packed, a matrix for each of
            many experts; "kept": as it is.
        target: The parameter that it fills, or "" where there is none, or where a kept tensor is
            merged or split on the way.
        transposed: It is stored as [in, out].
        reason: Why it is kept; "" where it is not.
        is_matrix: It is a linear layer's weight inside a block.
    """

    name: str
    packed_as: str
    storage: Placement
    target: str = ""
    transposed: bool = False
    reason: str = ""
    is_matrix: bool = False


def build_skeleton(config: Any, stored: Iterable[str]) -> Any:
    """The model of a configuration on the meta device: all shapes, no memory.

    Args:
        config: a transformers configuration.
        stored: the checkpoint's tensors; of several classes the one that knows most is taken.

    Raises:
        ConfigError: no class, or none that can be built.
    """
    stored = list(stored)
    best, most, failure = None, -1, None
    for cls in candidate_classes(config):
        model_class: Any = cls
        own = copy.deepcopy(config)
        try:
            contexts = model_class.get_init_context(torch.float32, False, False, None)
            with ContextManagers(contexts):
                model = model_class(own)
            names = Names(model)
            known = sum(names.place(name).target is not None for name in stored)
        except Exception as cause:  # noqa: BLE001
            failure = failure or cause
            continue
        if known > most:
            best, most = model, known
    if best is None:
        why = reason(failure) if failure is not None else "it has no class"
        raise ConfigError(f"config.json of type {config.model_type!r} gives no model: {why}")
    return best


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a stored tensor goes: a parameter, and what merges or splits it, by which pattern."""

    target: str | None
    converter: Any
    pattern: str = ""


class Names:
    """transformers' own way from a stored name to a parameter of a model."""

    def __init__(self, model: Any) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.state = dict.fromkeys(model.state_dict(), True)

    def place(self, name: str) -> _Place:
        """Where a stored tensor goes."""
        target, pattern = self.rename(name, self.state)
        if target not in self.state and name in self.state:
            target, pattern = name, None
        by = [c for c in self._converters if pattern in c.source_patterns]
        filled = target if target in self.state else None
        return _Place(filled, by[0] if by else None, pattern or "")

    def arrive(self, packed_as: str, target: str) -> bool:
        """Whether all packed parts are led to where the layer has them."""
        # A chain, because copying the names for each tensor takes minutes where there are 50,000.
        state = ChainMap({part_name(target, part): True for part in PARTS}, self.state)
        return all(
            self.rename(part_name(packed_as, part), state) == (part_name(target, part), None)
            for part in PARTS
        )

    def rename(self, name: str, state: Mapping[str, bool]) -> tuple[str, str | None]:
        """A stored name in the model, and the pattern of a converter that it matched."""
        found: tuple[str, str | None] = rename_source_key(
            name, self._renamings, self._converters, self._prefix, state
        )
        return found


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, or None."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def choose(model: Any, headers: Mapping[str, TensorHeader]) -> tuple[Choice, ...]:
    """What can be ternarized, in the order of the headers; the plan's own requests come later.

    Args:
        model: the skeleton.
        headers: the checkpoint's tensors.
    """
    rules = _Rules(model)
    return tuple(rules.choice(header) for header in headers.values())


class _Rules:
    """What the rules have to know about a skeleton, gathered once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.names = Names(model)
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self.tied = set(tied) | set(tied.values())
        self.head = model.get_output_embeddings() if _has_head(model) else None
        self.uses: dict[int, int] = {}
        for _, module in model.named_modules(remove_duplicate=False):
            self.uses[id(module)] = self.uses.get(id(module), 0) + 1
        self.experts = dict(self._expert_holders())

    def choice(self, header: TensorHeader) -> Choice:
        """Apply the rules to one tensor."""
        name, place = header.name, self.names.place(header.name)
        target = place.target
        why = self._unfit(header, target)
        if why or target is None:
            # A vector's parameter is told too: calibration may fit norms and biases.
            plain = target is not None and place.converter is None
            return Choice(name, name, "kept", target or "" if plain else "", reason=why)
        module = self.model.get_submodule(target.rpartition(".")[0])
        why = self._fallback(header, target, module)
        transposed = isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))
        packed_as = name
        storage: Placement = "layer"
        if place.converter is not None:
            storage = "merged"
            transposed = False  # it is coded as it is stored
            why = why or _unmergeable(header, place.converter)
        else:
            if len(header.shape) == 3:
                packed_as, storage = target, "experts"
            if tuple(getattr(module, target.rpartition(".")[2]).shape) != header.shape:
                why = why or f"stored as {list(header.shape)}, the model has another shape"
            elif not self.names.arrive(packed_as, target):
                why = why or "transformers would not find its packed parts under their names"
        if why:
            return Choice(name, name, "kept", target, reason=why, is_matrix=True)
        return Choice(name, packed_as, storage, target, transposed, is_matrix=True)

    def _unfit(self, header: TensorHeader, target: str | None) -> str:  # noqa: PLR0911
        """Why this is no linear layer's weight inside a block."""
        if target is None:
            return HOMELESS
        if len(header.shape) < 2:
            return "one-dimensional"
        path, _, leaf = target.rpartition(".")
        module = self.model.get_submodule(path)
        if module is self.head:
            return "unembedding"
        if isinstance(module, nn.Embedding):
            return "embedding"
        if not _in_block(self.model, path):
            return "outside the blocks"
        held = getattr(module, leaf, None)
        if leaf == "weight" and _computes_linear(module):
            return ""
        if path in self.experts and held is not None and held.ndim == 3:
            return ""
        return f"{leaf} of a {type(module).__name__}"

    def _fallback(self, header: TensorHeader, target: str, module: nn.Module) -> str:
        """Why a linear layer's weight inside a block is kept all the same."""
        path, _, leaf = target.rpartition(".")
        if header.dtype not in _FLOATS:
            return f"stored as {header.dtype}"
        if self._is_router(path, getattr(module, leaf)):
            return "router"
        if min(header.shape) < 2:
            return "a vector: one row or column"
        if target in self.tied:
            return "tied to another tensor"
        if self.uses[id(module)] > 1:
            return "its module stands in several places"
        return ""

    def _expert_holders(self) -> Iterable[tuple[str, int]]:
        """Modules that hold n experts, and n."""
        for path, module in self.model.named_modules():
            if not _in_block(self.model, path):
                continue
            sizes = {p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3}
            if len(sizes) == 1 and max(sizes) > 1 and not isinstance(module, _CONVOLUTIONS):
                yield path, sizes.pop()
            elif isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1:
                yield path, len(module)

    def _is_router(self, path: str, weight: torch.Tensor) -> bool:
        if path in self.experts:
            return False
        for holder, n_experts in self.experts.items():
            home = holder.rpartition(".")[0] + "."
            inside = path == holder or path.startswith(holder + ".")
            if path.startswith(home) and not inside and weight.shape[0] == n_experts > 1:
                return True
        return False


def _unmergeable(header: TensorHeader, converter: Any) -> str:
    """Why a tensor that transformers merges or splits cannot be unpacked on the way."""
    if len(header.shape) != 2:
        return "merged or split when loaded, and no matrix"
    if header.shape[-1] % 4:
        return f"merged or split when loaded, in rows of {header.shape[-1]}: no multiple of 4"
    if not all(source.endswith(".weight") for source in converter._original_source_patterns):
        return "merged or split when loaded, under a name that is no weight's"
    return ""


def _computes_linear(module: nn.Module) -> bool:
    """Whether a subclass of `Linear` gives x · Wᵀ + b, seen on a small copy of it."""
    if type(module) in {nn.Linear, Conv1D}:
        return True
    if not isinstance(module, nn.Linear):
        return False
    small: Any = copy.deepcopy(module)
    small.in_features, small.out_features = 8, 4
    weight = torch.arange(32, dtype=torch.float32, device="cpu").reshape(4, 8).sin()
    small.weight = nn.Parameter(weight)
    bias = None
    if small.bias is not None:
        bias = torch.linspace(-1, 1, 4, device="cpu")
        small.bias = nn.Parameter(bias)
    x = torch.arange(16, dtype=torch.float32, device="cpu").reshape(1, 2, 8).cos()
    try:
        with torch.no_grad():
            found = small.eval()(x)
    except Exception:  # noqa: BLE001
        return False  # whatever it does with its input, it is not plain
    wanted = nn.functional.linear(x, weight, bias)
    same = isinstance(found, torch.Tensor) and found.shape == wanted.shape
    return same and torch.allclose(found, wanted, atol=1e-5)


def _has_head(model: Any) -> bool:
    try:
        return model.get_output_embeddings() is not None
    except (AttributeError, NotImplementedError):
        return False


def _in_block(model: nn.Module, path: str) -> bool:
    """Whether a module lies inside an element of a `ModuleList`, and is not itself that element."""
    parts = path.split(".")
    module: nn.Module = model
    for part in parts[:-1]:
        inside = isinstance(module, nn.ModuleList)
        module = module.get_submodule(part)
        if inside:
            return True
    return False
