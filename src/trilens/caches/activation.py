"""The residual stream that a run leaves behind: one tensor per layer.

`ActivationCache` holds the last token of every layer, `FullActivationCache` all tokens. Layer i is
the residual stream AFTER block i (`resid_post`), before the final norm. A cache knows no model:
one built by hand grows by `push`, one that a capture made is sealed and keyed by the model's own
layer numbers.

Of a model with several residual streams each layer's tensor has an axis of streams before d_model,
and the layer's readout is held beside it: the one vector that the final norm would read.
"""

from __future__ import annotations

from typing import ClassVar, SupportsIndex

from torch import Tensor

from trilens.caches.indices import check_index
from trilens.caches.layer_cache import LayerCache

__all__ = ["ActivationCache", "FullActivationCache"]


class ActivationCache(LayerCache):
    """The residual stream after every block at one token, the last of the prompt.

    Shapes:
        every stored tensor [d_model], of several streams [streams, d_model]; `stack()` the same
        with layers as first axis.

    Args:
        activations: Tensors to push, layer 0 first.
    """

    __slots__ = ()

    _AXES: ClassVar[tuple[str, ...]] = ("d_model",)


class FullActivationCache(LayerCache):
    """The residual stream after every block at every token of the prompt.

    Shapes:
        every stored tensor [seq, d_model], of several streams [seq, streams, d_model]; `stack()`
        the same with layers as first axis.

    Args:
        activations: Tensors to push, layer 0 first.

    Memory:
        layers · seq · d_model elements: 1.07 GB for 32 layers, 4096 tokens and width 4096 in
        bfloat16; `stack()` of a cache without capacity takes as much again.
    """

    __slots__ = ()

    _AXES: ClassVar[tuple[str, ...]] = ("seq", "d_model")

    @property
    def seq_len(self) -> int:
        """Tokens per layer; 0 while nothing is stored."""
        return 0 if self.is_empty else int(self._tensors[0].shape[0])

    def get_position(self, layer: SupportsIndex, position: SupportsIndex) -> Tensor:
        """The residual stream after one block at one token, as a copy.

        Shapes:
            returns [d_model], of several streams [streams, d_model].

        Args:
            layer: The model's layer number.
            position: The token, −seq … seq − 1; negative positions count from the end.

        Raises:
            AbsentLayerError: a layer that is not stored.
            OutOfRangeError: a position that is not there.
            OutOfRangeError: a layer that is not a whole number.
        """
        tensor, owner = self[layer], f"this {type(self).__name__}"
        return tensor[check_index(position, self.seq_len, "position", owner, negative=True)].clone()

    def last(self) -> ActivationCache:
        """The last token of every layer: a sealed cache of copies with the same layer numbers.

        Copies, so that keeping it does not keep the whole sequence alive.
        """
        return ActivationCache.from_layers(
            {
                layer: tensor[-1].clone()
                for layer, tensor in zip(self.layers, self._tensors, strict=True)
            },
            readouts=None
            if self._readouts is None
            else {layer: made[-1].clone() for layer, made in self._readouts.items()},
        )
