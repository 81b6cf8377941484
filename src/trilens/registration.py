"""What transformers learns of trilens: ternary checkpoints and the model type `rwkv7`.

transformers is not imported for it. Each entry is made when the module of transformers that holds
the registry is imported, or at once where it is there already; the classes are imported when a
model needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from wrapt import lazy_import, register_post_import_hook

__all__ = ["register"]

_QUANTIZERS = "transformers.quantizers.auto"


def register() -> None:
    """Have the entries made, now or when transformers is imported."""
    for name, entry in _ENTRIES:
        register_post_import_hook(_when_whole(entry), name)


def _when_whole(entry: Callable[[Any], None]) -> Callable[[ModuleType], None]:
    def hook(module: ModuleType) -> None:
        # Another thread may be half way through the module: import_module waits for it.
        entry(import_module(module.__name__))

    return hook


def _ternary(auto: Any) -> None:
    for registry, name in (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "TrilensConfig"),
        (auto.AUTO_QUANTIZER_MAPPING, "TrilensQuantizer"),
    ):
        # Where the class is there already, it has made the entry itself.
        registry.setdefault("trilens", lazy_import("trilens.checkpoint.integration", name))


def _rwkv7_config(auto: Any) -> None:
    config = import_module("trilens.models.rwkv7.config").RWKV7Config
    auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def _rwkv7_models(auto: Any) -> None:
    config = import_module("trilens.models.rwkv7.config").RWKV7Config
    for registry, name in (
        (auto.MODEL_MAPPING, "RWKV7Model"),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING, "RWKV7ForCausalLM"),
    ):
        model = lazy_import("trilens.models.rwkv7.model", name)
        registry.register(config, model, exist_ok=True)


_ENTRIES: tuple[tuple[str, Callable[[Any], None]], ...] = (
    (_QUANTIZERS, _ternary),
    # The second chance of a thread that has found the first but not yet begun to run it.
    ("transformers.modeling_utils", lambda _: _ternary(import_module(_QUANTIZERS))),
    ("transformers.models.auto.configuration_auto", _rwkv7_config),
    ("transformers.models.auto.modeling_auto", _rwkv7_models),
)
