"""What `sensitivity` and `plan` share: a dense model with the headers of its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from trilens.cli.groups import Loading, Sampling
from trilens.cli.run.prompts import open_lens
from trilens.errors import ConfigError, UsageError, ValueRangeError
from trilens.io.hub import local_folder
from trilens.io.json import read_json
from trilens.io.safetensors_header import TensorHeader
from trilens.io.weight_files import read_headers
from trilens.lens.lens import Lens
from trilens.models.positions import max_positions_of, warn_beyond_positions
from trilens.text.token_blocks import sample_blocks

__all__ = ["Dense", "open_dense"]


@dataclass(frozen=True, slots=True)
class Dense:
    """A model and the headers of the checkpoint that it was read from."""

    lens: Lens
    headers: dict[str, TensorHeader]

    def blocks(
        self, documents: Sequence[str], sampling: Sampling, *, times: int = 1
    ) -> tuple[Tensor, ...]:
        """Token blocks drawn from documents, `times` as many, none longer than the model takes."""
        length = sampling.seq_length
        limit = max_positions_of(self.lens.model)
        if limit is not None and length > limit:
            raise ValueRangeError(
                f"sequence length {length} is out of range: the model takes at most {limit} tokens"
            )
        found = sample_blocks(
            self.lens.tokenizer,
            documents,
            length=length,
            tokens=times * sampling.max_tokens,
            seed=sampling.seed or 0,
        )
        warn_beyond_positions(self.lens.model, max(map(len, found), default=0))
        return found


def open_dense(model: str, loading: Loading) -> Dense:
    """Open a checkpoint whose weights are not quantized yet.

    Raises:
        UsageError: they are, or an option that names other weights or a part of the model.
        LoadError: it can't be loaded.
    """
    for option, value in (("--stack", loading.stack), ("--gguf-file", loading.gguf_file)):
        if value is not None:
            raise UsageError(
                f"{option} {value} cannot be taken here: the matrices are those of a checkpoint's "
                "safetensors, and the damage is that of the whole model; leave it out"
            )
    folder, source = local_folder(model, revision=loading.revision, code=loading.trust_remote_code)
    if read_json(folder / "config.json", ConfigError).get("quantization_config") is not None:
        raise UsageError(f"{source} is quantized already: give the checkpoint with dense weights")
    return Dense(open_lens(str(folder), replace(loading, revision=None)), read_headers(folder))
