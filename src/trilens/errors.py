"""Every error that a caller can cause, under one root.

    TrilensError
    ├── UsageError               an argument is wrong
    │   ├── OutOfRangeError      a layer, position, head or index that is not there
    │   ├── ShapeError           a tensor of the wrong rank or size
    │   ├── DtypeError           a tensor of the wrong dtype
    │   ├── ValueRangeError      a number outside its allowed range
    │   ├── NonFiniteError       NaN or Inf where numbers are needed
    │   ├── NotStoredError       asked for something that this capture or cache does not hold
    │   │   └── AbsentLayerError  a layer that a cache does not hold; an OutOfRangeError too
    │   ├── TextNotFoundError    a text that does not occur in a prompt
    │   ├── MetricError          a metric that gives no number, or one that is not finite
    │   ├── UnknownSiteError     a name that no place of the forward pass has
    │   ├── IncomparableError    two models that cannot be compared
    │   ├── EditError            an edit that cannot be made
    │   │   ├── EditRangeError   of a layer, head, unit or position that is not there
    │   │   ├── EditConflictError  one that another edit would overwrite
    │   │   └── UntouchedEditError  one that touched nothing
    │   └── TooLargeError        the answer would need more memory than allowed without saying so
    ├── PromptError              a prompt that this model cannot read
    │   ├── EmptyPromptError
    │   ├── PromptTooLongError
    │   ├── TokenIdError         token ids outside the vocabulary
    │   ├── NoTokenizerError     a text prompt for a model without a tokenizer
    │   └── NoChatTemplateError  chat messages for a tokenizer without a template
    ├── TextError                text to measure on that is missing, unreadable or too short
    ├── LoadError                a model or file that cannot be loaded
    │   ├── ModelNotFoundError   no such directory or hub id
    │   ├── ConfigError          the configuration is missing, unreadable or of an unknown type
    │   ├── UnsafeFormatError    only pickled weights (.bin, .pt)
    │   ├── CorruptFileError     truncated or malformed
    │   ├── OfflineError         the hub cannot be reached
    │   └── MemoryShortError     the weights need more memory than is free
    ├── AnatomyError             blocks, final norm or unembedding could not be proven
    │   ├── RecorderError        the model runs, but not while its probe is recorded
    │   └── SeveralStreamsError  several residual streams that could not be told apart or read out
    ├── DamageError              ternary weights that do more damage than the caller allows
    ├── WriteError               a file that could not be written
    ├── ServeError           what the explorer refuses, or could not finish
    │   ├── PortInUseError   another program listens there
    │   ├── RequestError     a request that is too large, too slow, or from elsewhere
    │   ├── BusyError        too many runs wait already
    │   ├── TimeLimitError   a run took longer than it may
    │   └── RunCancelledError  a run that was cancelled, or whose client went away
    ├── RestoreError             weights that were replaced for a while did not come back
    ├── GenerationError          a model, or a text, that can't be generated from as asked
    └── CaptureError             a forward pass that did not give what was asked
        ├── SilentSiteError      a requested site that did not fire
        ├── SiteError            a site that is not proven in a layer
        ├── AttentionPathError   attention that goes through no supported path
        ├── ModifiedInPlaceError a captured tensor was overwritten by the model
        ├── ShardError           a shard of a store that could not be captured
        ├── RecurrentStateError  a recurrent state that is not there or not proven
        └── UnclaimedGateError   a layer gates in a way that no rule knows

Warnings derive from `TrilensWarning`, so that they can be filtered: `BeyondPositionsWarning`,
`DoubledBosWarning`.

Messages say: the noun, the problem, the offending value, the allowed range, what to do. Lists and
values of files go into them through `io.messages`.
"""

from __future__ import annotations

from trilens.printable import one_line

__all__ = [
    "AbsentLayerError",
    "AnatomyError",
    "AttentionPathError",
    "BeyondPositionsWarning",
    "BusyError",
    "CaptureError",
    "ConfigError",
    "CorruptFileError",
    "DamageError",
    "DoubledBosWarning",
    "DtypeError",
    "EditConflictError",
    "EditError",
    "EditRangeError",
    "EmptyPromptError",
    "GenerationError",
    "IncomparableError",
    "LoadError",
    "MemoryShortError",
    "MetricError",
    "ModelNotFoundError",
    "ModifiedInPlaceError",
    "NoChatTemplateError",
    "NoTokenizerError",
    "NonFiniteError",
    "NotStoredError",
    "OfflineError",
    "OutOfRangeError",
    "PortInUseError",
    "PromptError",
    "PromptTooLongError",
    "RecorderError",
    "RecurrentStateError",
    "RequestError",
    "RestoreError",
    "RunCancelledError",
    "ServeError",
    "SeveralStreamsError",
    "ShapeError",
    "ShardError",
    "SilentSiteError",
    "SiteError",
    "TextError",
    "TextNotFoundError",
    "TimeLimitError",
    "TokenIdError",
    "TooLargeError",
    "TrilensError",
    "TrilensWarning",
    "UnclaimedGateError",
    "UnknownSiteError",
    "UnsafeFormatError",
    "UntouchedEditError",
    "UsageError",
    "ValueRangeError",
    "WriteError",
]


class _OneLine:
    """A message as it may leave the program."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class TrilensError(_OneLine, Exception):
    """Root of every error that a caller of trilens can cause.

    Its message is one line of at most 1,500 characters without control codes, whatever values are
    named in it; `args` holds the text as it was raised.
    """


class UsageError(TrilensError):
    """An argument is wrong."""


class OutOfRangeError(UsageError, IndexError):
    """A layer, position, head or index that is not there."""


class ShapeError(UsageError):
    """A tensor of the wrong rank or size."""


class DtypeError(UsageError, TypeError):
    """A tensor of the wrong dtype."""


class ValueRangeError(UsageError, ValueError):
    """A number outside its allowed range."""


class NonFiniteError(UsageError, ValueError):
    """NaN or Inf where numbers are needed."""


class NotStoredError(UsageError, LookupError):
    """Asked for something that this capture or cache does not hold."""


class AbsentLayerError(NotStoredError, OutOfRangeError):
    """A layer that this cache does not hold."""


class TextNotFoundError(UsageError, LookupError):
    """A text that does not occur in a prompt, or that no token of it covers."""


class UnknownSiteError(UsageError, LookupError):
    """A name that no place of the forward pass has."""


class IncomparableError(UsageError):
    """Two models, or parts of them, that cannot be compared."""


class EditError(UsageError):
    """An edit that cannot be made."""


class EditRangeError(EditError, OutOfRangeError):
    """An edit of a layer, head, unit or position that is not there."""


class EditConflictError(EditError):
    """An edit whose values another edit of the same run would overwrite."""


class UntouchedEditError(EditError):
    """An edit that touched nothing while the model ran."""


class TooLargeError(UsageError):
    """The answer would need more memory than is allowed without saying so."""


class PromptError(TrilensError):
    """A prompt that this model cannot read."""


class EmptyPromptError(PromptError):
    """A prompt without a single token."""


class PromptTooLongError(PromptError):
    """A prompt longer than the model's positions."""


class TokenIdError(PromptError):
    """Token ids outside the model's vocabulary."""


class NoTokenizerError(PromptError):
    """A text prompt for a model that came without a tokenizer."""


class NoChatTemplateError(PromptError):
    """Chat messages for a tokenizer without a chat template."""


class TrilensWarning(_OneLine, UserWarning):
    """Root of every warning of trilens."""


class BeyondPositionsWarning(TrilensWarning):
    """A prompt longer than the positions that the configuration speaks of."""


class DoubledBosWarning(TrilensWarning):
    """A prompt begins with the model's first token twice: the text held one already."""


class TextError(TrilensError):
    """Text to measure or calibrate on that is missing, unreadable or too short."""


class LoadError(TrilensError):
    """A model or file that cannot be loaded."""


class ModelNotFoundError(LoadError):
    """No such directory, and no such hub id."""


class ConfigError(LoadError):
    """The model's configuration is missing, unreadable or of an unknown type."""


class UnsafeFormatError(LoadError):
    """Only pickled weights are there; trilens reads safetensors alone."""


class CorruptFileError(LoadError):
    """A file that is truncated or malformed."""


class OfflineError(LoadError):
    """The hub cannot be reached and the model is not in the local cache."""


class MemoryShortError(LoadError):
    """The weights need more memory than is free."""


class AnatomyError(TrilensError):
    """Blocks, final norm or unembedding could not be proven on this model."""


class RecorderError(AnatomyError):
    """The model runs, but not while trilens records its probe: the fault is not the model's."""


class SeveralStreamsError(AnatomyError):
    """The residual has several streams that could not be told apart or read out."""


class DamageError(TrilensError):
    """Ternary weights raise the perplexity by more than the caller allows."""


class WriteError(TrilensError):
    """A file that could not be written: no space, no permission, or it is in use."""


class ServeError(TrilensError):
    """What the explorer refuses, or could not finish."""


class PortInUseError(ServeError):
    """Another program listens on this port."""


class RequestError(ServeError):
    """A request that is too large or too slow, or that another page sent."""


class BusyError(ServeError):
    """More runs wait than are let wait."""


class TimeLimitError(ServeError):
    """A run that took longer than it may."""


class RunCancelledError(ServeError):
    """A run that was cancelled, or whose client went away."""


class RestoreError(TrilensError):
    """Weights that were replaced for a while did not come back as they were."""


class GenerationError(TrilensError):
    """A model that does not generate, or not as it reads a whole text, or no further."""


class CaptureError(TrilensError):
    """A forward pass that did not give what was asked."""


class SilentSiteError(CaptureError):
    """A requested site did not fire."""


class MetricError(UsageError):
    """A metric that gives no number, or one that is not finite."""


class SiteError(CaptureError):
    """A site that a layer has not, or that is not proven there."""


class ShardError(CaptureError):
    """A shard of a store that could not be captured."""


class AttentionPathError(CaptureError):
    """Attention that goes through no path that can be captured."""


class ModifiedInPlaceError(CaptureError):
    """A captured tensor was overwritten by the model after it was captured."""


class RecurrentStateError(CaptureError):
    """A recurrent state that the layers asked do not have, or that is not proven."""


class UnclaimedGateError(CaptureError):
    """A layer calls a gating function that is neither a known gate nor known to be none."""
