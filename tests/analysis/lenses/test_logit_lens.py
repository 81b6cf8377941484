"""The logit lens against whole logits in float64; the last layer is the model's own output."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import trilens
from lens_cases import demo_lens
from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens.analysis import LogitLens, logit_lens
from trilens.analysis.lenses import readout
from trilens.errors import (
    IncomparableError,
    NonFiniteError,
    NotStoredError,
    OutOfRangeError,
    UsageError,
    ValueRangeError,
)

PROMPT = "def load(path):\n    with open(path"
DEMOS = ("transformer", "mamba", "rwkv7")
CLOSE = 1e-9  # float64: sums of 2,048 exponentials, some nats at most


def written_out(lens: trilens.Lens, cap: trilens.Capture, target: int) -> dict[str, torch.Tensor]:
    """Everything from whole logits, with torch's own softmax."""
    logits = torch.stack([lens.unembed(cap.residual[i]) for i in cap.residual.layers])
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    final = log_p[-1]
    top = p.topk(5)
    return {
        "top_ids": top.indices,
        "top_probabilities": top.values,
        "entropy_nats": -(p * log_p).sum(-1),
        "kl_nats": (final.exp() * (final - log_p)).sum(-1),
        "target_logits": logits[..., target],
        "target_probabilities": p[..., target],
        "target_ranks": (logits > logits[..., target, None]).sum(-1),
    }


def check(found: LogitLens, expected: dict[str, torch.Tensor], close: float = CLOSE) -> None:
    for name, values in expected.items():
        ours = getattr(found, name)
        if values.is_floating_point():
            assert_near(ours, values, close, least=1.0)
        else:
            assert torch.equal(ours, values), name


@pytest.mark.parametrize("name", DEMOS)
@pytest.mark.parametrize("chunk", [None, 100, 1])
def test_everything_is_what_whole_logits_give(name: str, chunk: int | None) -> None:
    lens = demo_lens(name)
    prompt = PROMPT if chunk != 1 else "import os"
    cap = lens.capture(prompt, residual="all")
    target = int(cap.token_ids[-1])
    found = logit_lens(cap, lens, target=target, chunk=chunk)
    check(found, written_out(lens, cap, target))
    assert float(found.kl_nats[-1].abs().max()) == 0.0
    assert found.positions == tuple(range(len(cap.tokens)))


@pytest.mark.parametrize("name", DEMOS)
def test_the_last_layer_is_the_model(name: str) -> None:
    lens = demo_lens(name)
    cap = lens.capture(PROMPT, residual="all")
    assert cap.logits is not None
    for target in (5, 900):
        found = logit_lens(cap, lens, k=3, target=target)
        # transformers' Mamba gives its logits in float32, whatever it computes in.
        close = 1e-6 if name == "mamba" else CLOSE
        assert_near(found.target_logits[-1], cap.logits[:, target], close)
        assert_near(found.target_probabilities[-1], cap.logits.softmax(-1)[:, target], close)
        top = cap.logits.softmax(-1).topk(3)
        assert torch.equal(found.top_ids[-1], top.indices)
    assert [token for token, _ in found.top_tokens(lens.n_layers - 1)] == [
        found.texts[token] for token, _ in cap.top_tokens(3)
    ]


def test_one_position_is_its_row_of_all() -> None:
    lens = demo_lens()
    whole = logit_lens(lens.capture(PROMPT, residual="all"), lens, target=" os")
    last = logit_lens(lens.capture(PROMPT), lens, target=" os")
    some = logit_lens(lens.capture(PROMPT, residual="all"), lens, target=" os", positions=[2, -1])
    assert last.positions == whole.positions[-1:] and some.positions == (2, whole.positions[-1])
    for name in ("entropy_nats", "kl_nats", "target_logits"):
        assert_near(getattr(last, name)[:, 0], getattr(whole, name)[:, -1], CLOSE, least=1.0)
        assert_near(getattr(some, name)[:, 0], getattr(whole, name)[:, 2], CLOSE, least=1.0)


def test_rows_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = demo_lens()
    cap = lens.capture(PROMPT, residual="all")
    whole = logit_lens(cap, lens, target=7)
    sizes = []
    unembed = lens.unembed

    def counted(residual, **options):
        logits = unembed(residual, **options)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(readout, "_ELEMENTS", 4 * 64 * 2)
    monkeypatch.setattr(lens, "unembed", counted)
    parts = logit_lens(cap, lens, target=7, chunk=64)
    assert max(sizes) == 4 * 64 * 2 and len(sizes) == math.ceil(len(cap.tokens) / 2) * 2048 // 64
    check(
        parts, {name: getattr(whole, name) for name in ("entropy_nats", "top_ids", "target_ranks")}
    )


def test_layers_that_were_captured_and_asked() -> None:
    lens = demo_lens()
    cap = lens.capture(PROMPT, layers=[1, 3])
    found = logit_lens(cap, lens, layers=[1])
    assert found.layers == (1,) and found.kl_nats is not None
    check(found, {"kl_nats": logit_lens(lens.capture(PROMPT), lens).kl_nats[1:2]})
    alone = logit_lens(lens.capture(PROMPT, layers=[1]), lens)
    assert alone.kl_nats is None and alone.table()[0]["kl_nats"] is None


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "bert", "cohere", "opt", "granite", "mamba2"])
def test_other_heads(kind: str) -> None:
    """A softcap, a scale, a bias and a transform before the unembedding; tokens in parts."""
    lens = trilens.Lens(build(kind, dtype=torch.float64))
    cap = lens.capture(prompt_ids(kind), residual="all")
    target = 3
    found = logit_lens(cap, lens, target=target, chunk=7)
    check(found, written_out(lens, cap, target), 1e-6)
    assert cap.logits is not None
    assert_near(found.target_logits[-1], cap.logits[:, target], 1e-6, least=1.0)


def test_a_head_that_is_no_plain_matrix_is_read_whole() -> None:
    lens = trilens.Lens(build("llama", dtype=torch.float64))
    cap = lens.capture(prompt_ids("llama"), residual="all")
    expected = written_out(lens, cap, 3)
    seen: list[tuple[int, ...]] = []
    head = lens.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda *call: seen.append(tuple(call[2].shape)))
    try:
        check(logit_lens(cap, lens, target=3, chunk=7), expected)
    finally:
        handle.remove()
    assert seen and all(shape[-1] == lens.anatomy.vocab for shape in seen)


def test_tokens_of_an_unembedding_in_parts_are_those_of_the_whole() -> None:
    lens = demo_lens()
    residual = lens.capture("import os", residual="all").residual[1]
    whole = lens.unembed(residual)
    for tokens in (slice(5, 90), torch.tensor([3, 900, 3])):
        assert_near(lens.unembed(residual, tokens=tokens), whole[..., tokens], CLOSE)


def test_as_rows_and_json() -> None:
    lens = demo_lens()
    found = logit_lens(lens.capture("import os"), lens, k=2, target="\n")
    rows = found.table()
    assert len(rows) == lens.n_layers and set(rows[0]) >= {"layer", "position", "target_rank"}
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["format"] == "trilens.logit_lens" and plain["target_token"] == "\n"
    assert len(plain["rows"][0]["top"]) == 2
    assert len(found.to_pandas()) == len(rows)
    assert found.top_tokens(0)[0][0] == rows[0]["top_token"]
    with pytest.raises(NotStoredError, match="layer 9 is not in this result: it has layers 0, 1"):
        found.top_tokens(9)


def test_what_is_refused() -> None:
    lens = demo_lens()
    cap = lens.capture(PROMPT)
    with pytest.raises(NotStoredError, match="capture with residual='last' or 'all'"):
        logit_lens(lens.capture(PROMPT, residual=None), lens)
    with pytest.raises(NotStoredError, match="capture with residual='all'"):
        logit_lens(cap, lens, positions=[0])
    with pytest.raises(OutOfRangeError, match="position 900"):
        logit_lens(cap, lens, positions=[900])
    with pytest.raises(NotStoredError, match="no positions"):
        logit_lens(cap, lens, positions=[])
    with pytest.raises(NotStoredError, match="layer 7"):
        logit_lens(cap, lens, layers=[7])
    with pytest.raises(ValueRangeError, match="k"):
        logit_lens(cap, lens, k=0)
    with pytest.raises(ValueRangeError, match="chunk"):
        logit_lens(cap, lens, chunk=0)
    with pytest.raises(IncomparableError, match="the lens of MambaForCausalLM"):
        logit_lens(cap, demo_lens("mamba"))
    bare = trilens.Lens(build("llama").model)
    with pytest.raises(UsageError, match="no unembedding"):
        logit_lens(bare.capture(prompt_ids("llama")), bare)


def test_logits_that_are_no_distribution_are_told_by_layer_and_position() -> None:
    lens = trilens.Lens(build("llama"))
    cap = lens.capture(prompt_ids("llama"), residual="all")
    cap.residual[1][2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layer 1 gives logits .* at position 2"):
        logit_lens(cap, lens)


def test_tokens_that_never_come() -> None:
    """−Inf logits (a vocabulary that is padded) have no share, no entropy and cost no KL."""
    lens = trilens.Lens(build("llama", dtype=torch.float64))
    head = lens.model.get_output_embeddings()
    bias = torch.zeros(head.out_features, dtype=torch.float64)
    bias[4] = -torch.inf
    head.bias = nn.Parameter(bias)
    cap = lens.capture(prompt_ids("llama"), residual="all")
    found = logit_lens(cap, lens, target=4, chunk=5)
    assert bool(found.entropy_nats.isfinite().all()) and bool(found.kl_nats.isfinite().all())
    assert float(found.target_probabilities.max()) == 0.0
    assert bool((found.target_ranks == head.out_features - 1).all())
