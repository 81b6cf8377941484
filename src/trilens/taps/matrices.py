"""What each layer of a loaded model multiplies by, which is not always its parameter `weight`.

Quantizers, adapters and offloading put other layers in a model's place: codes under the name of the
weight they replace, a scale that is applied to the output, factors that are added, weights on disk.
A parameter is believed where its holder is one of torch's own layers or of the model's own code,
and the parameter is an ordinary floating one. Any other layer is asked: its packed codes, its
tensor's `dequantize`, the hook that brings an offloaded weight, or its answers to the identity.
What cannot be asked is left out with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trilens.errors import CaptureError
from trilens.io.messages import reason
from trilens.io.short_memory import is_short_of_memory
from trilens.models.offload import execution_device, hooks_on, in_memory
from trilens.taps.mode import evaluating
from trilens.ternary.packed.experts import TernaryExperts
from trilens.ternary.packed.linear import TernaryLinear

__all__ = ["Matrices", "Matrix", "matrices_of"]

_MODEL_CODE = (
    "torch.nn.modules.",
    "transformers.models.",
    "transformers.pytorch_utils",
    "trilens.",
)
_WRAPPER = "_orig_mod"
_ROWS = 512  # of the identity, in one call
_SAME = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far a layer may be from x · Wᵀ for W to be what it multiplies by; 1e-3 in wider dtypes."""
_LINEAR = 0.1
"""How far a measured layer may be from linear: inputs rounded to eight bits are within 0.02."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix, or stack of matrices, that a layer multiplies by.

    Attributes:
        name: of the parameter, or of the parameter that the layer stands in for.
        shape: [out, in] of a linear layer, however it is stored; else the parameter's own.
        source: "parameter": it is the module's own, in memory or offloaded; "packed": of a
            `TernaryLinear` or `TernaryExperts`; "tensor": asked of a quantized tensor; "measured":
            of the layer itself.
        read: gives the values, [*shape]; raises CaptureError, saying why it cannot.
    """

    name: str
    shape: tuple[int, ...]
    source: Literal["parameter", "packed", "tensor", "measured"]
    read: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Matrices:
    """All matrices of a model.

    Attributes:
        found: by name; of tied ones the first name alone.
        aliases: the other names of tied matrices, and the name under which they are in `found`.
        left_out: name → why nothing is known of it.
    """

    found: Mapping[str, Matrix]
    aliases: Mapping[str, str]
    left_out: Mapping[str, str]

    def get(self, name: str) -> Matrix | None:
        """The matrix of that name or alias."""
        return self.found.get(self.aliases.get(name, name))


def matrices_of(model: nn.Module) -> Matrices:
    """What every layer of a model multiplies by; nothing is computed before it is read.

    Memory: of the names and shapes alone; each `read` makes at most one matrix.
    """
    found: dict[str, Matrix] = {}
    aliases: dict[str, str] = {}
    left_out: dict[str, str] = {}
    first: dict[int, str] = {}
    files = {type(module).__module__ for module in model.modules() if _is_model(module)}
    own = files | {file.rpartition(".")[0] for file in files} - {""}
    walk = _Walk(model, own)
    for path, module, taken in walk.layers():
        for leaf, parameter in taken.items():
            name = ".".join(part for part in (*path.split("."), leaf) if part and part != _WRAPPER)
            if parameter is not None and id(parameter) in first:
                aliases[name] = first[id(parameter)]
                continue
            matrix = walk.matrix(name, path, module, leaf, parameter)
            if isinstance(matrix, str):
                left_out[name] = matrix
                continue
            found[name] = matrix
            if parameter is not None:
                first[id(parameter)] = name
    return Matrices(found, aliases, left_out)


class _Walk:
    def __init__(self, model: nn.Module, own: set[str]) -> None:
        self.model = model
        self.own = own

    def layers(self) -> Iterator[tuple[str, nn.Module, dict[str, Tensor | None]]]:
        """Modules with their matrices; what lies inside a layer that is asked is not looked at."""
        inside = ""  # of the last layer that is asked: modules come parents first
        for path, module in self.model.named_modules():
            if inside and path.startswith(inside):
                continue
            if isinstance(module, TernaryExperts):
                inside = f"{path}."
                home, _dot, leaf = path.rpartition(".")
                yield home, module, {leaf: None}
            elif path and self._is_asked(module):
                inside = f"{path}."
                weight = getattr(module, "_parameters", {}).get("weight")
                yield path, module, {"weight": weight}
            else:
                held = module.named_parameters(recurse=False)
                yield path, module, {leaf: p for leaf, p in held if p.dim() >= 2}

    def matrix(
        self, name: str, path: str, module: nn.Module, leaf: str, parameter: Tensor | None
    ) -> Matrix | str:
        """One matrix, or why there is none."""
        if isinstance(module, TernaryExperts):
            return Matrix(name, tuple(module.shape), "packed", partial(_experts, module))
        if self._is_asked(module):
            linear: Any = module
            shape = int(linear.out_features), int(linear.in_features)
            if isinstance(module, TernaryLinear):
                return Matrix(name, shape, "packed", partial(_unpacked, module))
            return Matrix(name, shape, "measured", partial(_asked, self.model, path, name))
        if parameter is None or (why := self._unread(path, module, leaf, parameter)):
            return "it has no values" if parameter is None else why
        flat = isinstance(module, Conv1D)
        sizes = tuple(parameter.shape)[::-1] if flat else tuple(parameter.shape)
        if type(parameter) not in (nn.Parameter, Tensor):
            return Matrix(name, sizes, "tensor", partial(_dequantized, parameter, name))
        return Matrix(name, sizes, "parameter", partial(_stored, self.model, path, leaf, flat))

    def _unread(self, path: str, module: nn.Module, leaf: str, parameter: Tensor) -> str:
        """Why a parameter is not what its module multiplies by, as far as is known; "" if it is."""
        if not self._is_known(module):
            return f"{leaf} of a {_title(module)}: it is not known what that multiplies by"
        if type(parameter) not in (nn.Parameter, Tensor):
            return ""
        if not _is_plain(parameter):
            return f"{leaf} of a {_title(module)} holds {_dtype(parameter)}: its scale is not known"
        if parameter.is_meta and not hooks_on(self.model, path):
            return "it is on the meta device, and no hook brings it into memory"
        return ""

    def _is_known(self, module: nn.Module) -> bool:
        file = type(module).__module__
        in_own = file in self.own or file.rpartition(".")[0] in self.own
        return in_own or file.startswith(_MODEL_CODE)

    def _is_asked(self, module: nn.Module) -> bool:
        """Whether a module is a linear layer that is not simply one of torch's."""
        if isinstance(module, TernaryLinear):
            return True
        sizes = [getattr(module, key, None) for key in ("in_features", "out_features")]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return False
        if not _computes(module):
            return False
        exact = type(module) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
        replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
        if not exact or replaced:
            return True
        weight = module._parameters.get("weight")
        return weight is None or (type(weight) is nn.Parameter and not _is_plain(weight))


def _computes(module: nn.Module) -> bool:
    """Whether a module multiplies itself, and does not just hold modules that do."""
    held = bool(module._parameters or module._buffers or "base_layer" in module._modules)
    return held or not module._modules


def _is_model(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel)


def _title(module: nn.Module) -> str:
    return type(module).__name__


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_plain(parameter: Tensor) -> bool:
    """Whether the numbers are the weights: float8 and integers are codes of a scale elsewhere."""
    return parameter.is_floating_point() and parameter.element_size() > 1


def _unpacked(module: TernaryLinear) -> Tensor:
    dense = module.reconstruct()
    return dense.T if module.transposed else dense


def _experts(module: TernaryExperts) -> Tensor:
    return module.parameter(torch.float32).detach()


def _dequantized(parameter: Any, name: str) -> Tensor:
    try:
        with torch.no_grad():
            values: Tensor = parameter.dequantize()
    except (RuntimeError, AttributeError, NotImplementedError, TypeError, ValueError) as cause:
        if is_short_of_memory(cause):
            raise
        raise CaptureError(f"{name} is a {type(parameter).__name__}: {reason(cause)}") from cause
    if not _is_plain(values) or values.shape != parameter.shape:
        kind = f"{_dtype(values)} {list(values.shape)}"
        raise CaptureError(f"{name} is a {type(parameter).__name__} that dequantizes to {kind}")
    return values.detach()


def _stored(model: nn.Module, path: str, leaf: str, flat: bool) -> Tensor:
    parameter = model.get_submodule(path)._parameters[leaf]
    if parameter is not None and not parameter.is_meta:
        values = parameter.detach()
        return values.T if flat else values
    with in_memory(model, path) as module:
        held = module._parameters[leaf]
        if held is None or held.is_meta:
            raise CaptureError(f"{path}.{leaf} is offloaded, and its hook does not bring it back")
        values = held.detach().clone()
    return values.T if flat else values


def _asked(model: nn.Module, path: str, name: str) -> Tensor:
    """What a layer's answers show; the weight of a layer of transformers' models that is not linear
    by itself (a router with a top-k, a linear layer of groups)."""
    try:
        return _measured(model, path, name)
    except CaptureError:
        module = model.get_submodule(path)
        held = {*module._parameters, *module._buffers} <= {"weight", "bias"}
        if not type(module).__module__.startswith("transformers.models.") or not held:
            raise
        return _stored(model, path, "weight", flat=False)


@torch.no_grad()
def _measured(model: nn.Module, path: str, name: str) -> Tensor:
    """The weight of a layer as its answers to the identity show it, if it is seen to be linear."""
    module, device = model.get_submodule(path), execution_device(model, path)
    with evaluating(module), torch.inference_mode(False):
        last: Exception | None = None
        for dtype in _dtypes(model, module):
            try:
                return _from_answers(module, name, dtype, device)
            except CaptureError:
                raise
            # Whatever a foreign layer raises, it is its answer to the question.
            except Exception as cause:
                if is_short_of_memory(cause):
                    raise
                last = cause
    raise CaptureError(
        f"{name}: a {_title(module)} does not answer to a plain input: "
        f"{reason(last) if last else 'no dtype to ask in'}"
    ) from last


def _from_answers(module: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    n_in: int = module.in_features  # type: ignore[assignment]
    n_out: int = module.out_features  # type: ignore[assignment]

    def ask(x: Tensor) -> Tensor:
        answer = module(x.unsqueeze(0))
        answer = answer[0] if isinstance(answer, tuple) else answer
        if not isinstance(answer, Tensor) or answer.shape != (1, len(x), n_out):
            raise CaptureError(f"{name}: a {_title(module)} does not give [tokens, {n_out}]")
        return answer[0].to(torch.promote_types(answer.dtype, torch.float32))

    bias = ask(torch.zeros(1, n_in, dtype=dtype, device=device))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, n_in, generator=generator).to(device, dtype)
    answers = ask(x) - bias

    def away(weight: Tensor) -> float:
        expected = x.to(answers.dtype) @ weight.to(answers.device, answers.dtype).T
        return float((expected - answers).norm() / answers.norm().clamp_min(1e-30))

    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter and _is_plain(weight) and not weight.is_meta:
        own = weight.detach()
        if own.shape == (n_out, n_in) and away(own) <= _SAME.get(dtype, 1e-3):
            return own
    columns = [
        (ask(torch.eye(n_in, dtype=dtype, device=device)[begin : begin + _ROWS]) - bias).T
        for begin in range(0, n_in, _ROWS)
    ]
    measured = torch.cat(columns, dim=1)
    found = away(measured)
    if not found <= _LINEAR:
        raise CaptureError(
            f"{name}: a {_title(module)} is not linear: {found:.2g} of its answer to random inputs "
            "is not that of the matrix its answers to the identity make"
        )
    return measured


def _dtypes(model: nn.Module, module: nn.Module) -> list[torch.dtype]:
    """What a layer may compute in: the model's dtype, then its own parameters', then float32."""
    tried = [getattr(model, "dtype", torch.float32)]
    tried += [p.dtype for p in module.parameters() if _is_plain(p)]
    tried += [torch.float32, torch.bfloat16, torch.float16]
    return [d for d in dict.fromkeys(tried) if d.is_floating_point and d.itemsize > 1]
