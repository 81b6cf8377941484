"""Numbers and tensors that an edit takes: read, or refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trilens.errors import EditError, EditRangeError, OutOfRangeError
from trilens.io.messages import clip
from trilens.io.paths import as_path
from trilens.io.tensor_files import SUFFIXES, read_tensor
from trilens.numbers import whole_number

__all__ = [
    "Numbers",
    "SiteSource",
    "TensorFile",
    "TensorLike",
    "is_source",
    "numbers_of",
    "read_number",
    "read_numbers",
    "read_values",
]

Numbers: TypeAlias = "SupportsIndex | Iterable[SupportsIndex] | None"
"""Layers, heads or units: one, several, or None for all."""


class SiteSource(Protocol):
    """What a `Capture` gives to an edit: values of sites, and where they come from."""

    @property
    def tokens(self) -> list[str]:
        """Its tokens as text."""

    @property
    def model(self) -> Any:
        """Which model it is of."""

    @property
    def sites(self) -> Any:
        """[seq, *shape] by name and layer."""


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A tensor in a file, read when the edit is checked.

    Attributes:
        path: of a .safetensors or .npy file.
        name: of the tensor in a .safetensors file; None where it holds only one.

    Raises:
        EditError: the path has another suffix, or a .npy file is given a name.
    """

    path: str | Path
    name: str | None = None

    def __post_init__(self) -> None:
        path = as_path(self.path)
        if not path.name.endswith(SUFFIXES):
            raise EditError(
                f"file {clip(str(path))} holds no tensor that an edit reads: give a .safetensors "
                "or .npy file"
            )
        if path.name.endswith(".npy") and self.name is not None:
            raise EditError(f"file {clip(str(path))} holds one array, which has no name")
        object.__setattr__(self, "path", path)

    def __str__(self) -> str:
        return f"{self.path}" if self.name is None else f"{self.path}:{self.name}"

    @classmethod
    def parse(cls, text: str) -> TensorFile:
        """Read ``file.safetensors:name``, ``file.safetensors`` or ``file.npy``."""
        match = re.fullmatch(r"(.*?\.(?:safetensors|npy))(?::(.*))?", text, re.DOTALL)
        return cls(match[1], match[2]) if match else cls(text)

    def load(self) -> Tensor:
        """The tensor.

        Raises:
            LoadError: the file is missing or damaged.
            UsageError: no tensor of that name, or several and none was named.
        """
        return read_tensor(Path(self.path), self.name)


TensorLike: TypeAlias = "Tensor | NDArray[Any] | Sequence[Any] | float | TensorFile"
"""A tensor, an array, nested lists of numbers, one number, or a file."""


def read_numbers(value: object, noun: str) -> tuple[int, ...] | None:
    """One whole number or several, as a tuple; None stays None.

    Raises:
        EditRangeError: not whole numbers, or negative.
        EditError: none, or not distinct.
    """
    if value is None:
        return None
    if isinstance(value, str | bytes | dict):
        raise EditError(f"{noun}s {clip(value)} cannot be read: give a number or several")
    try:
        if not isinstance(value, Iterable) or getattr(value, "shape", None) == ():
            numbers: tuple[int, ...] = (whole_number(value, noun),)
        else:
            numbers = tuple(whole_number(each, noun) for each in value)
    except OutOfRangeError as error:
        raise EditRangeError(str(error)) from None
    if not numbers:
        raise EditError(f"{noun}s are empty: name at least one, or leave them out for all")
    if min(numbers) < 0:
        raise EditRangeError(f"{noun} {min(numbers)} is out of range: {noun}s count from 0")
    if len(set(numbers)) < len(numbers):
        raise EditError(f"{noun}s {clip(list(numbers))} are not distinct: name each once")
    return numbers


def numbers_of(value: Numbers) -> tuple[int, ...] | None:
    """What `read_numbers` made of a field."""
    return cast("tuple[int, ...] | None", value)


def read_number(value: object, noun: str) -> float:
    """A finite number.

    Raises:
        EditError: something else.
    """
    is_one = isinstance(value, int | float | np.number | Tensor) and not isinstance(value, bool)
    try:
        number = float(cast("float", value)) if is_one else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise EditError(f"{noun} {clip(value)} is not a finite number")
    return number


def read_values(value: object, noun: str) -> Tensor | TensorFile:
    """A tensor of real numbers, by reference where it is one; a file stays a file.

    Raises:
        EditError: something else.
    """
    if isinstance(value, TensorFile):
        return value
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        # A number keeps all of its digits.
        dtype = torch.float64 if isinstance(value, float) else None
        tensor = (
            value if isinstance(value, Tensor) else torch.as_tensor(cast("Any", value), dtype=dtype)
        )
    except (TypeError, ValueError, RuntimeError):
        raise EditError(
            f"{noun} {clip(value)} is no tensor: give a tensor, an array, numbers or a TensorFile"
        ) from None
    if tensor.is_complex() or tensor.dtype == torch.bool or not tensor.numel():
        raise EditError(
            f"{noun} of shape {list(tensor.shape)} and dtype {tensor.dtype} cannot be read: give "
            "real numbers"
        )
    return tensor if tensor.is_floating_point() else tensor.float()


def is_source(value: object) -> bool:
    """Whether a value is a capture. Its parts are not asked for: they raise where not captured."""
    return {"tokens", "model", "sites"} <= set(dir(value))
