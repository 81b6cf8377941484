"""A model's mode and structure, put back when a block ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from trilens.taps.undo import undone

__all__ = ["evaluating", "forgetting", "frozen", "unchanged"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and every module back into its own mode afterwards.

    Compiled parts run as they are written: compiled code calls no hooks of the modules in it.
    """
    training = [module for module in model.modules() if module.training]
    stance = torch.compiler.set_stance("force_eager") if _is_compiled(model) else nullcontext()

    def put_back() -> None:
        for module in training:
            module.training = True

    with undone(put_back), stance:
        if training:
            model.eval()
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let gradients pass through a model's parameters without reaching them.

    Each parameter gets its own `requires_grad` back afterwards; no gradient is accumulated.
    """
    trainable = [each for each in model.parameters() if each.requires_grad]

    def put_back() -> None:
        for parameter in trainable:
            parameter.requires_grad_(True)

    with undone(put_back):
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield


@contextmanager
def forgetting(model: nn.Module) -> Iterator[None]:
    """Put back the tensors that a forward keeps as attributes of its modules.

    Qwen-VL keeps how far an image moved the positions, for the steps that follow; a later pass of
    vectors alone would read it.
    """
    before = {module: _kept(module) for module in model.modules()}

    def put_back() -> None:
        for module, held in before.items():
            for name in _kept(module).keys() - held.keys():
                delattr(module, name)
            for name, value in held.items():
                if vars(module).get(name) is not value:
                    vars(module)[name] = value

    with undone(put_back):
        yield


def _kept(module: nn.Module) -> dict[str, Tensor | None]:
    return {n: v for n, v in vars(module).items() if v is None or isinstance(v, Tensor)}


def _is_compiled(model: nn.Module) -> bool:
    return any(
        getattr(module, "_compiled_call_impl", None) is not None
        or "_orig_mod" in module._modules
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Put every module of a model back in its place, with its plain attributes.

    Some models rebuild themselves when a prompt is short (block-sparse attention that turns into
    full attention for good). Weights are not copied.

    Yields:
        A function: whether the model still has the modules that it began with.
    """
    before = {module: _state(module) for module in model.modules()}
    structure = _structure(model)

    def put_back() -> None:
        if _structure(model) != structure:
            for module, (attributes, children) in before.items():
                module.__dict__.update(attributes)
                module._modules.clear()
                module._modules.update(children)

    with undone(put_back):
        yield lambda: _structure(model) == structure


def _state(module: nn.Module) -> tuple[dict[str, object], dict[str, nn.Module | None]]:
    plain: dict[str, object] = {
        name: value
        for name, value in module.__dict__.items()
        if isinstance(value, str | int | float | bool | None)
    }
    return plain, dict(module._modules)


def _structure(model: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(module)) for path, module in model.named_modules()]
