"""Declaration of `trilens sensitivity`."""

from __future__ import annotations

from trilens.cli import options as o
from trilens.cli.lazy import run

__all__ = ["sensitivity"]


def sensitivity(
    model: o.Model,
    data: o.Data,
    rule: o.Rule = "absmean",
    group_size: o.GroupSize = None,
    per: o.Per = None,
    each_matrix: o.EachMatrix = False,
    predict: o.Predict = True,
    max_tokens: o.MaxTokens = 4096,
    seq_length: o.SeqLength = 256,
    seed: o.Seed = 0,
    field: o.Field = "text",
    dtype: o.Dtype = "float32",
    device_map: o.DeviceMap = None,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    format: o.Format = "table",
    debug: o.Debug = False,
) -> None:
    """Measure which layers and matrices ternary weights damage.

    Each block alone, blocks 0 … i together and each kind of matrix alone are ternarized in memory
    and restored. Nothing is written.
    """
    run("sensitivity", locals())
