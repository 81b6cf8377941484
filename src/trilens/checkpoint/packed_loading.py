"""Packed tensors that transformers merges, splits or keeps for many experts, on their way in.

Merging and splitting move whole rows, so transformers' own operations do with codes and scales what
they do with weights: each part has a converter of its own, with the same operations. Only a scale
that holds for a whole matrix is first spread over its rows. An operation that moves anything else
than rows, and a parameter that the file holds half packed and half dense, are left to
`integration.Unpack`, which makes them dense.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Split,
    WeightConverter,
)

from trilens.checkpoint.arriving import experts_like, packed_like, two_bit_codes
from trilens.checkpoint.format.names import part_name
from trilens.checkpoint.format.skeleton import Names, module_at
from trilens.io.safetensors_header import TensorHeader, read_header
from trilens.ternary.packed.experts import TernaryExperts
from trilens.ternary.packed.linear import PARTS

__all__ = ["Merge", "Merges", "PartIn", "PartOut", "place_packed", "read_headers"]

_ALONG_ROWS = (Chunk, Concatenate, Interleave, Split)


@dataclass(slots=True)
class Merge:
    """One of transformers' converters, all of whose packed targets stay packed.

    Attributes:
        converter: As transformers has it.
        of_experts: Its targets are parameters of rank 3.
        rows: Path of a packed module → pattern of a source → rows of that source.
    """

    converter: WeightConverter
    of_experts: bool = False
    rows: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(slots=True)
class Merges:
    """What is packed though it is no plain linear layer of the file.

    Attributes:
        merges: By transformers' converter.
        endings: Last names of the expert parameters that the file holds as they are.
        paths: Of all packed modules that come by one or the other.
    """

    merges: dict[Any, Merge] = field(default_factory=dict)
    endings: set[str] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)

    def converters(self, old: WeightConverter, config: Any) -> list[WeightConverter]:
        """The converters of the parts beside transformers' own; none where it is to unpack."""
        merge = self.merges.get(_key(old))
        if merge is None:
            return []
        found = []
        for part in PARTS:
            sources = [part_name(name, part) for name in old._original_source_patterns]
            targets = [
                f"{name if merge.of_experts else name.removesuffix('.weight')}.{part}"
                for name in old._original_target_patterns
            ]
            first = PartIn(part, config, merge.rows, alone=False)
            found.append(old.copy(sources, targets, operations=[first, *old.operations]))
        return found

    def whole(self, ending: str, config: Any) -> list[WeightConverter]:
        """The converters of expert tensors that the file holds as the model does."""
        if ending not in self.endings:
            return []
        return [
            WeightConverter(
                [part_name(ending, part)], [f"{ending}.{part}"], [PartIn(part, config, {})]
            )
            for part in PARTS
        ]


class PartIn(ConversionOps):  # type: ignore[misc]
    """A part of packed matrices as it lies in memory: two-bit codes, and scales row by row.

    Args:
        part: which.
        config: how codes and scales are laid out in the file.
        rows: see `Merge`.
        alone: no operation follows.
    """

    def __init__(
        self, part: str, config: Any, rows: Mapping[str, Mapping[str, int]], *, alone: bool = True
    ) -> None:
        self.part, self.config, self.rows, self.alone = part, config, rows, alone

    def __deepcopy__(self, memo: Any) -> PartIn:
        return self  # nothing in it changes, and transformers copies converters for each parameter

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        target_patterns: Sequence[str] = (),
        *,
        full_layer_name: str = "",
        model: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """The same patterns, each with what is to be merged."""
        path = full_layer_name.removesuffix(f".{self.part}")
        found: dict[str, Any] = {}
        for pattern, value in input_dict.items():
            tensors = value if isinstance(value, list) else [value]
            rows = self.rows.get(path, {}).get(pattern.removesuffix(self.part))
            done = [self._ready(tensor, path, rows, model) for tensor in tensors]
            found[target_patterns[0] if self.alone else pattern] = done
        return found

    def _ready(self, tensor: Tensor, path: str, rows: int | None, model: Any) -> Tensor:
        if not self.part.endswith("codes"):
            spread = rows is not None and tensor.shape[0] == 1
            return tensor.expand(rows or 1, -1) if spread else tensor
        if self.config.storage != "compact":
            return tensor
        cols = model.get_submodule(path).in_features
        if tensor.is_meta:  # shapes without values
            return tensor.new_empty((*tensor.shape[:-1], -(-cols // 4)))
        return two_bit_codes(tensor, cols, path, "compact")

    @property
    def reverse_op(self) -> ConversionOps:
        """For a model that is saved."""
        return PartOut(self.part, self.config, alone=self.alone)


class PartOut(ConversionOps):  # type: ignore[misc]
    """A part of packed matrices as the file holds it: one scale where all rows have the same."""

    def __init__(self, part: str, config: Any, *, alone: bool) -> None:
        self.part, self.config, self.alone = part, config, alone

    def __deepcopy__(self, memo: Any) -> PartOut:
        return self

    def convert(
        self, input_dict: dict[str, Any], target_patterns: Sequence[str] = (), **_: Any
    ) -> dict[str, Any]:
        """The same patterns, each with what is to be saved."""
        if self.alone:
            return {target_patterns[0]: next(iter(input_dict.values()))}
        plans = [{"per": self.config.per}, *self.config.overrides.values()]
        whole = any(plan.get("per") == "tensor" for plan in plans)
        if self.part.endswith("codes") or not whole:
            return input_dict
        return {name: _shared(value) for name, value in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """Of a saved model nothing is loaded by this one."""
        return PartIn(self.part, self.config, {}, alone=self.alone)


def _shared(value: Any) -> Tensor:
    scale: Tensor = value[0] if isinstance(value, list) else value
    same = scale.shape[-1] == 1 and bool((scale == scale[:1]).all())
    return scale[:1].clone() if same else scale


def read_headers(files: Iterable[str] | None) -> dict[str, TensorHeader]:
    """The tensors of a checkpoint's files; none where it is not made of safetensors files."""
    found: dict[str, TensorHeader] = {}
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            return {}
        found |= read_header(Path(file))
    return found


def place_packed(model: Any, headers: Mapping[str, TensorHeader], config: Any) -> Merges:
    """Put packed modules where the file has packed tensors that are no plain linear layer's.

    Args:
        model: on the meta device, with all of its dense parameters.
        headers: the checkpoint's tensors.
        config: the section `quantization_config`.
    """
    found = Merges()
    names = Names(model)
    if config.merged:
        for key, merge in _merges(model, names, headers).items():
            targets = [
                (first, path) for first in merge.rows for path in _targets(first, merge.converter)
            ]
            held = [model.get_parameter_or_buffer(path) for _, path in targets]
            if not _packable(model, merge, [path for _, path in targets], held):
                continue
            merge.of_experts = held[0].ndim == 3
            for first, target in targets:
                found.paths.add(_swap(model, target, config.of(first, model), config, merged=True))
            merge.rows = {_module_path(f, merge.of_experts): rows for f, rows in merge.rows.items()}
            found.merges[key] = merge
    if config.experts:
        _place_whole(model, names, headers, config, found)
    return found


def _place_whole(
    model: Any, names: Names, headers: Mapping[str, TensorHeader], config: Any, found: Merges
) -> None:
    """Expert tensors that the file holds as the model does."""
    parameters = {name for name, p in model.named_parameters() if p.ndim == 3}
    codes = {part_name(name, "codes"): name for name in parameters}
    known = ChainMap(dict.fromkeys(codes, True), names.state)
    packed = {names.rename(name, known)[0] for name in headers if name.endswith("codes")}
    there = {codes[name]: name for name in sorted(packed & set(codes))}
    for ending in config.experts:
        for target in there:
            if f".{target}".endswith(f".{ending}"):
                found.paths.add(_swap(model, target, config.of(target, model), config))
                found.endings.add(ending)


def _merges(model: Any, names: Names, headers: Mapping[str, TensorHeader]) -> dict[Any, Merge]:
    """Converters that have packed sources, with the rows of each."""
    found: dict[Any, Merge] = {}
    dense: dict[Any, set[str]] = {}
    for name, header in headers.items():
        stem, _dot, part = name.rpartition(".")
        if part not in {"codes", "weight"}:
            continue
        place = names.place(f"{stem}.weight")
        if place.converter is None or place.target is None:
            continue
        key = _key(place.converter)
        if part == "weight":
            if header.shape != (0,):  # the guard of a packed one
                dense.setdefault(key, set()).add(place.target)
            continue
        merge = found.setdefault(key, Merge(place.converter))
        rows = merge.rows.setdefault(place.target, {})
        rows[place.pattern.removesuffix("weight")] = header.shape[0]
    return {key: m for key, m in found.items() if not dense.get(key, set()) & set(m.rows)}


def _key(converter: WeightConverter) -> Any:
    sources = tuple(converter._original_source_patterns)
    return sources, tuple(converter._original_target_patterns), converter.scope_prefix


def _targets(first: str, converter: WeightConverter) -> list[str]:
    """All parameters that a converter fills from the sources of the first."""
    patterns = converter.target_patterns
    return [first.replace(patterns[0], pattern) for pattern in patterns]


def _packable(model: Any, merge: Merge, targets: Sequence[str], held: Sequence[Tensor]) -> bool:
    """Whether the operations move rows alone, into parameters that can be packed."""
    if any("*" in pattern for pattern in merge.converter.target_patterns):
        return False
    rank = 2
    for operation in merge.converter.operations:
        if isinstance(operation, MergeModulelist) and operation.dim == 0:
            rank += 1
        elif not isinstance(operation, _ALONG_ROWS) or operation.dim % rank == rank - 1:
            return False
    if any(tensor.ndim != rank for tensor in held):
        return False
    for target in targets:
        module: Any = module_at(model, target.rpartition(".")[0])
        linear = type(module) is nn.Linear and target.endswith(".weight")
        # Rows of a merged matrix are the model's columns where it is held transposed.
        if not (linear if rank == 2 else not getattr(module, "is_transposed", False)):
            return False
    return True


def _module_path(target: str, of_experts: bool) -> str:
    return target if of_experts else target.removesuffix(".weight")


def _swap(
    model: Any, target: str, options: Mapping[str, Any], config: Any, *, merged: bool = False
) -> str:
    """Put an empty packed module in the place of a parameter; its path."""
    rotated = config.rotation is not None
    if merged:
        options = {**options, "per": "row"}  # a row keeps its scale wherever it goes
    path, _dot, leaf = target.rpartition(".")
    module = model.get_submodule(path)
    held = getattr(module, leaf)
    if held.ndim == 2:
        model.set_submodule(path, packed_like(module, options, compact=False, rotated=rotated))
        return path
    transposed = bool(getattr(module, "is_transposed", False))
    del module._parameters[leaf]
    experts: TernaryExperts = experts_like(held, options, transposed=transposed, rotated=rotated)
    module.add_module(leaf, experts.train(module.training))
    return target
