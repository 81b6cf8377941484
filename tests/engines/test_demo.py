"""The demo model as a GGUF file, in the engine that such files are made for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from transformers import AutoTokenizer

import trilens
from engines.engine import Engine, compare, engine_rounding, reference, reference_logits
from trilens.checkpoint.gguf import FORMATS, validate_gguf
from trilens.checkpoint.gguf.reader import read_gguf

DEMO = Path(trilens.__file__).parent / "demo" / "transformer"
PLAN = trilens.TernaryPlan(rule="exact", per="row", scale_dtype="float16")
PROMPT = "def read_lines(path):\n    "
TEXTS = [
    PROMPT,
    "The quick brown fox doesn't jump; it's 12345 times too lazy.\n\n\tEnd  of   text ",
    "naïve café ☕ 東京 — “quoted” <b>html</b> 3.14159e-10\r\n",
    "    for i in range(10):\n        print(i)\n",
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return reference(DEMO, tmp_path_factory.mktemp("demo") / "ternary", PLAN)


@pytest.fixture(scope="module", params=FORMATS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, trilens.checkpoint.TernaryReport, Engine]:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    report = trilens.ternarize(DEMO, path, plan=PLAN, format=request.param)
    engine = Engine(path)
    request.addfinalizer(engine.close)
    return request.param, path, report, engine


def test_no_matrix_falls_back(exported: Any) -> None:
    name, path, report, _ = exported
    assert report.fallbacks == ()
    assert all(tensor.decoded_exactly for tensor in report.tensors)
    coded = {tensor.name for tensor in validate_gguf(path).coded}
    assert len(coded) == 4 * 7
    assert {tensor.type for tensor in validate_gguf(path).coded} == {FORMATS[name].codec.name}


def test_text_becomes_the_same_tokens(exported: Any) -> None:
    *_, engine = exported
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    for text in TEXTS:
        assert engine.tokenize(text, special=True) == tokenizer(text)["input_ids"]


def test_logits_differ_by_the_rounding_of_activations_alone(exported: Any, dense: Any) -> None:
    """With the engine's 8-bit activations in the reference, both agree to float32's rounding.

    A sum that rounds the other way moves one 8-bit number by one, and from there on the two runs
    differ by as much as two roundings do: so most of many short texts must agree, not all.
    """
    name, _, _, engine = exported
    ids = AutoTokenizer.from_pretrained(DEMO)("".join(TEXTS))["input_ids"]
    short = [compare(engine, dense, name, ids[n : n + 6]) for n in range(0, 96, 6)]
    # Measured 7e-6 at most where nothing fell the other way.
    assert np.median([one.beyond_rounding for one in short]) < 1e-4
    long = compare(engine, dense, name, ids[:96])
    # Measured 0.30 (Q2_0) and 0.56 (TQ1_0, TQ2_0) of logits with a standard deviation of 3.3.
    assert 0 < long.rounding < 0.25 * long.spread
    # Two roundings of the same size in different places: at most their sum.
    assert long.difference < 2 * long.rounding


def test_four_levels(tmp_path: Path) -> None:
    """The rule quad in Q2_0: the level 2, and scales of either sign."""
    plan = trilens.TernaryPlan(rule="quad", group_size=128, scale_dtype="float16")
    trilens.ternarize(DEMO, tmp_path / "model.gguf", plan=plan, format="gguf-q2_0")
    four = reference(DEMO, tmp_path / "four", plan)
    ids = AutoTokenizer.from_pretrained(DEMO)("".join(TEXTS))["input_ids"][:96]
    engine = Engine(tmp_path / "model.gguf")
    try:
        short = [compare(engine, four, "gguf-q2_0", ids[n : n + 6]) for n in range(0, 96, 6)]
        assert np.median([one.beyond_rounding for one in short]) < 1e-4
        long = compare(engine, four, "gguf-q2_0", ids)
        assert long.difference < 2 * long.rounding < 0.5 * long.spread
    finally:
        engine.close()


def test_a_folded_rotation(tmp_path: Path) -> None:
    """Residual stream and values rotated: an ordinary model, whose trits the engine computes.

    Short texts, for in each of them no 8-bit number may fall the other way.
    """
    folded = tmp_path / "folded"
    assert len(trilens.fold_rotation(DEMO, folded).values) == 4
    trilens.ternarize(folded, tmp_path / "model.gguf", plan=PLAN, format="gguf-q2_0")
    rotated = reference(folded, tmp_path / "ternary", PLAN)
    ids = AutoTokenizer.from_pretrained(DEMO)("".join(TEXTS))["input_ids"][:96]
    engine = Engine(tmp_path / "model.gguf")
    try:
        short = [compare(engine, rotated, "gguf-q2_0", ids[n : n + 2]) for n in range(0, 96, 2)]
        assert np.median([one.beyond_rounding for one in short]) < 1e-4
        long = compare(engine, rotated, "gguf-q2_0", ids)
        assert long.difference < 2 * long.rounding < 0.5 * long.spread
        assert sum(one.wrong for one in (*short, long)) == 0
        assert sum(one.clear for one in (*short, long)) > 0
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_embeddings_in_fewer_bits(tmp_path: Path, dense: Any, name: Any) -> None:
    """The engine's logits are those of a model with the embedding that the file holds."""
    path = tmp_path / "model.gguf"
    plan = replace(PLAN, embeddings=name)
    report = trilens.ternarize(DEMO, path, plan=plan, format="gguf-tq2_0")
    assert report.bits_per_weight < 4.0 if name == "q8_0" else report.bits_per_weight < 3.2
    entry = read_gguf(path).tensors["token_embd.weight"]
    raw = np.frombuffer(path.read_bytes()[entry.begin : entry.end], dtype=np.uint8)
    kind = GGMLQuantizationType(entry.type_id)
    stored = torch.from_numpy(dequantize(raw.reshape(entry.shape[0], -1), kind))
    ids = AutoTokenizer.from_pretrained(DEMO)("".join(TEXTS))["input_ids"][:60]
    table = dense.get_input_embeddings().weight
    before = table.data.clone()
    engine = Engine(path)
    try:
        table.data.copy_(stored)
        short = [
            compare(engine, dense, "gguf-tq2_0", ids[n : n + 6], rounded_head=True)
            for n in range(0, 60, 6)
        ]
    finally:
        table.data.copy_(before)
        engine.close()
    assert np.median([one.beyond_rounding for one in short]) < 1e-4


def test_64_greedy_tokens(exported: Any, dense: Any) -> None:
    """One token at a time, as a user generates; a near tie may fall either way."""
    name, _, _, engine = exported
    ids = list(AutoTokenizer.from_pretrained(DEMO)(PROMPT)["input_ids"])
    n_prompt = len(ids)
    for _ in range(64):
        ids.append(int(reference_logits(dense, ids)[-1].argmax()))
    exact = reference_logits(dense, ids)
    with engine_rounding(dense, name):
        tolerance = 2 * np.abs(reference_logits(dense, ids) - exact).max()
    found = list(engine.logits(ids[:n_prompt])[-1:])
    found += [engine.next_logits(token) for token in ids[n_prompt:-1]]
    clear = 0
    for logits, wanted, token in zip(found, exact[n_prompt - 1 :], ids[n_prompt:], strict=False):
        second, first = np.sort(wanted)[-2:]
        if first - second > tolerance:
            assert int(logits.argmax()) == token
            clear += 1
    # Measured 46 (TQ1_0, TQ2_0) and 54 (Q2_0), and all 64 tokens are the same.
    assert clear >= 16  # the others are near ties: a test of none would prove nothing
