"""Teaching transformers to load a ternary checkpoint, through its own extension points.

`trilens.registration` enters the quantization method "trilens". `from_pretrained` then builds the
model on the meta device, puts a `TernaryLinear` or `TernaryExperts` where the checkpoint says so,
and reads codes and scales straight into it. What transformers merges or splits is merged packed
(`packed_loading`); where that cannot be, it is unpacked on the way in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trilens.checkpoint.arriving import Arriving, dense_like, packed_like, two_bit_codes
from trilens.checkpoint.format.names import FORMAT_VERSION, QUANT_METHOD, ROTATION, part_name
from trilens.checkpoint.format.plan import Storage
from trilens.checkpoint.format.skeleton import module_at
from trilens.checkpoint.packed_experts import restore_experts, use_packed_experts
from trilens.checkpoint.packed_loading import Merges, place_packed, read_headers
from trilens.errors import ConfigError, CorruptFileError
from trilens.io.messages import other_version
from trilens.io.weight_files import GUARD_NAME
from trilens.ternary.calibrated.rules import levels_of
from trilens.ternary.packed.experts import TernaryExperts
from trilens.ternary.packed.linear import PARTS, Packed, TernaryLinear
from trilens.ternary.packed.module import PackedModule
from trilens.ternary.rotation import rotate_back

__all__ = ["TrilensConfig", "TrilensQuantizer", "Unpack"]


class TrilensConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The section `quantization_config` of a ternary checkpoint's config.json.

    Args:
        format_version: of the layout of codes and scales.
        rule: the rule that made the trits.
        per: what one scale covers.
        group_size: weights that share a scale along a row, or None.
        layers: paths of the layers that are packed in memory.
        merged: whether there are packed tensors that transformers merges or splits.
        experts: last names of the parameters that hold a matrix for each of many experts.
        storage: how codes lie in the file; in memory they are packed in two bits.
        rotation: "hadamard" where weights and inputs are rotated.
        overrides: parameter → rule, per and group_size that differ from the general ones.
        weights: the name of the weights' file or index where it is not the usual one.

    Raises:
        ConfigError: a version or an option that this trilens does not know.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        rule: str = "absmean",
        per: str = "tensor",
        group_size: int | None = None,
        layers: Sequence[str] = (),
        merged: bool = False,
        experts: Sequence[str] = (),
        storage: str = "two_bit",
        rotation: str | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        weights: str | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if format_version != FORMAT_VERSION:
            raise ConfigError(
                other_version("quantization_config has format", format_version, FORMAT_VERSION)
            )
        if unknown:
            raise ConfigError(
                f"quantization_config has an option {min(unknown)!r}: this trilens does not know it"
            )
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.rule = rule
        self.per = per
        self.group_size = group_size
        self.layers = list(layers)
        self.merged = merged
        self.experts = list(experts)
        if storage not in get_args(Storage):
            raise ConfigError(
                f"quantization_config has the storage {storage!r}: this trilens does not know it"
            )
        if rotation not in {None, ROTATION}:
            raise ConfigError(
                f"quantization_config has the rotation {rotation!r}: this trilens does not know it"
            )
        self.storage = storage
        self.rotation = rotation
        self.weights = weights
        self.overrides = {name: dict(options) for name, options in (overrides or {}).items()}

    def of(self, target: str, model: Any) -> Mapping[str, Any]:
        """Rule, per and group size of one parameter, under its name in the model.

        Args:
            target: the parameter.
            model: the model; the checkpoint's class may have another prefix.
        """
        plain = {"rule": self.rule, "per": self.per, "group_size": self.group_size}
        prefix = f"{model.base_model_prefix}."
        for spelling in (target, target.removeprefix(prefix), prefix + target):
            if spelling in self.overrides:
                return {**plain, **self.overrides[spelling]}
        return plain


class Unpack(ConversionOps):  # type: ignore[misc]
    """Packed parts to dense tensors, before transformers merges or splits them.

    What comes in plain, as from a model that was saved again, goes through as it is.

    Args:
        config: how codes and scales are laid out.
        whole: the parts make up a whole parameter, that of many experts.
    """

    supports_many_to_many = True

    def __init__(self, config: TrilensConfig, *, whole: bool = False) -> None:
        self.config = config
        self.whole = whole

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str | None = None,
        model: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """One dense tensor for each set of parts, under the name of the plain tensor."""
        name = full_layer_name or ""
        held = model.get_parameter_or_buffer(name)
        if self.whole:
            prefix = next(iter(input_dict)).removesuffix("second_codes").removesuffix("codes")
            (parts,) = _collect(input_dict, prefix)
            module = module_at(model, name.rpartition(".")[0])
            rotated = bool(getattr(module, "is_transposed", False))
            cols = held.shape[-2 if rotated else -1]
            dense = self._dense(parts, name, held.dtype, cols, self.config.of(name, model))
            return {name: dense.transpose(-1, -2).contiguous() if rotated else dense}
        found: dict[str, Any] = {}
        for key, value in input_dict.items():
            stem, _dot, part = key.rpartition(".")
            if part not in PARTS:
                found[key] = value
            elif part == "codes":
                options = self.config.of(name, model)
                found[f"{stem}.weight"] = [
                    self._dense(parts, key, held.dtype, self._cols(parts, name, model), options)
                    for parts in _collect(input_dict, f"{stem}.")
                ]
        return found

    def _cols(self, parts: dict[str, Tensor], name: str, model: Any) -> int:
        """The length of rows: a multiple of 4 by the pipeline's rule; written down if compact."""
        found: int = self.config.of(name, model).get("cols", 4 * parts["codes"].shape[-1])
        return found

    def _dense(
        self,
        parts: dict[str, Tensor],
        name: str,
        dtype: torch.dtype,
        cols: int,
        options: Mapping[str, Any],
    ) -> Tensor:
        if parts["codes"].is_meta:  # shapes without values
            return torch.empty((*parts["codes"].shape[:-1], cols), dtype=dtype, device="meta")
        size, levels = options["group_size"], levels_of(options["rule"])
        two_bit = {
            part: two_bit_codes(tensor, cols, name, self.config.storage, levels)
            if part.endswith("codes")
            else tensor
            for part, tensor in parts.items()
        }
        packed = Packed(**two_bit, cols=cols, group_size=size, levels=levels)
        if self.config.rotation is None:
            return packed.dense(dtype)
        return rotate_back(packed.dense()).to(dtype)


def _collect(input_dict: dict[str, Any], prefix: str) -> list[dict[str, Tensor]]:
    """The parts of each tensor that was collected under one pattern."""
    there = {part: input_dict[prefix + part] for part in PARTS if prefix + part in input_dict}
    lists = {part: v if isinstance(v, list) else [v] for part, v in there.items()}
    count = len(lists["codes"])
    if "scale" not in lists or any(len(tensors) != count for tensors in lists.values()):
        raise CorruptFileError(f"{prefix}codes and its scales are not equally many")
    return [{part: tensors[i] for part, tensors in lists.items()} for i in range(count)]


class TrilensQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads a ternary checkpoint."""

    requires_calibration = True  # only checkpoints that are ternary already can be loaded
    serialized_names = {"weight": ["weight", *PARTS]}  # noqa: RUF012
    quantization_config: TrilensConfig

    def __init__(self, quantization_config: TrilensConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._changed: list[tuple[WeightConverter, WeightConverter | None]] = []
        self._merges = Merges()
        self._packed: list[tuple[WeightConverter, WeightConverter | None]] = []

    def update_attn_implementation(self, config: Any) -> Any:
        """Finds the weights where they are: what config.json names is there to stop others."""
        if getattr(config, "transformers_weights", None) == GUARD_NAME:
            config.transformers_weights = self.quantization_config.weights
        return config

    def is_serializable(self) -> bool:
        """Codes and scales are saved as they are."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """What is saved: beside each layer's codes an empty `weight`.

        transformers without trilens would make up a weight and warn. It refuses one of another
        shape.
        """
        modules = dict(model.named_modules())
        packed = [path for path, m in modules.items() if isinstance(m, TernaryLinear)]
        plain = [path for path in packed if path not in self._merges.paths]
        # Layers that became dense since, as by merging an adapter, are saved as dense ones.
        self.quantization_config.layers = plain
        guards = {f"{path}.weight": torch.empty(0) for path in plain}
        return {**model.state_dict(), **guards}, {}

    @property
    def is_trainable(self) -> bool:
        """The packed weights have no gradient."""
        return False

    def get_load_operations(self) -> dict[str, Any]:
        """Unpacks what transformers' own converters take."""
        if not self.quantization_config.merged:
            return {}
        return {"dequantize": lambda quantizer: Unpack(quantizer.quantization_config)}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Adds the packed names to transformers' converters, and one for expert tensors."""
        config, updated = self.quantization_config, []
        self._changed, self._packed = [], []
        for old in weight_conversions:
            parts = self._merges.converters(old, config) if isinstance(old, WeightConverter) else []
            if parts:
                # Saving reverses the order and takes the first that matches: parts stand behind.
                updated += [old, *parts]
                self._packed += [(part, old) for part in parts]
                continue
            (new,) = super().update_weight_conversions([old], model)
            updated.append(new)
            if new is not old:
                self._changed.append((new, old))
        for ending in config.experts:
            parts = self._merges.whole(ending, config)
            self._packed += [(part, None) for part in parts]
            if not parts:
                sources = [part_name(ending, part) for part in PARTS]
                parts = [WeightConverter(sources, ending, [Unpack(config, whole=True)])]
                self._changed.append((parts[0], None))
            updated += parts
        return updated

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        if config.merged or config.experts:
            self._merges = place_packed(model, read_headers(checkpoint_files), config)
            if any(isinstance(m, TernaryExperts) for m in model.modules()):
                use_packed_experts(model)
        for path in config.layers:
            found = _path_in(model, path)
            if found is None:
                continue  # a bare model has no place for what only the full one has
            layer = packed_like(
                model.get_submodule(found),
                config.of(f"{path}.weight", model),
                compact=config.storage == "compact",
                rotated=config.rotation is not None,
            )
            model.set_submodule(found, layer)
            guard = rf"^(.*\.)?{re.escape(found)}\.weight$"
            model._keys_to_ignore_on_load_unexpected.add(guard)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if getattr(model, "dry_run", False):
            return model  # shapes without values, from `models.config_check`
        for path, module in list(model.named_modules()):
            if isinstance(module, PackedModule):
                _check_read(module, path)
            if isinstance(module, Arriving):
                module = module.arrived(path)  # noqa: PLW2901
                model.set_submodule(path, module)
            if isinstance(module, PackedModule):
                for parameter in module.packed.parts.values():
                    parameter.requires_grad_(False)
                if module.codes.device.type != "meta":
                    module.check(path)
        if getattr(model.config, "rescale_every", 0):
            # Such a model would divide weights in place and halve its residual to match; packed
            # weights cannot be divided. Without both it computes the same.
            model.config.rescale_every = 0
        # What is saved from now on is what lies in memory.
        self.quantization_config.storage = "two_bit"
        self.quantization_config.weights = None
        # Saving turns the conversions around: it must find transformers' own.
        originals = {id(new): old for new, old in self._changed}
        used = [originals.get(id(c), c) for c in model._weight_conversions]
        model._weight_conversions = [c for c in used if c is not None]
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # A model that was saved has the name of its dtype in its config.
        target: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for path, module in list(model.named_modules()):
            if isinstance(module, TernaryLinear):
                model.set_submodule(path, dense_like(module, target))
            elif isinstance(module, TernaryExperts):
                home, _dot, leaf = path.rpartition(".")
                holder = model.get_submodule(home)
                del holder._modules[leaf]
                holder.register_parameter(leaf, module.parameter(target))
        restore_experts(model)
        model._weight_conversions = _without_parts(model._weight_conversions, self._packed)
        return model


def _without_parts(
    used: Sequence[Any] | None, packed: Sequence[tuple[WeightConverter, WeightConverter | None]]
) -> list[Any] | None:
    """The conversions of a model that became dense: transformers' own in the place of the parts'.

    Saving turns them around, and goes by those that loading has used.
    """
    if used is None:
        return None
    originals = {id(new): old for new, old in packed}
    found: list[Any] = []
    for conversion in used:
        old = originals.get(id(conversion), conversion)
        if old is not None and all(old is not other for other in found):
            found.append(old)
    return found


def _check_read(layer: PackedModule, path: str) -> None:
    """Refuse a layer that transformers filled with whatever lay in memory.

    Raises:
        CorruptFileError: a part is not in the file.
    """
    for name, part in layer.named_parameters(recurse=False):
        read = part.is_meta or getattr(part, "_is_hf_initialized", False)
        if name in PARTS and not read:
            raise CorruptFileError(
                f"the checkpoint lacks {path}.{name}, which its config.json names: get the weight "
                "files again"
            )


def _path_in(model: Any, path: str) -> str | None:
    """A path of the checkpoint's own class in the class that is loaded: bare or with a head."""
    prefix = f"{model.base_model_prefix}."
    for spelling in (path, path.removeprefix(prefix), prefix + path):
        if isinstance(module_at(model, spelling), nn.Linear | Conv1D):
            return spelling
    return None


# In place of the names that `trilens.registration` enters until the classes are needed.
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = TrilensConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = TrilensQuantizer
