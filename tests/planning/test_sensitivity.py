from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from checkpoint_cases import load
from sensitivity_cases import blocks, opened
from trilens.checkpoint import TernaryPlan, ternarize
from trilens.checkpoint.format.matrix_plan import MatrixPlan
from trilens.demo import demo_path
from trilens.errors import NonFiniteError, UsageError
from trilens.evaluation.reference import ReferenceLogits
from trilens.io.weight_files import read_headers
from trilens.lens.lens import Lens
from trilens.planning.matrices import find_matrices
from trilens.planning.sensitivity import measure_sensitivity
from trilens.progress import Step
from trilens.taps.parameters import checksum

FAMILIES = ["gpt2", "mamba", "rwkv", "mixtral", "gpt_oss", "recurrent_gemma"]
EXACT = MatrixPlan("exact", group_size=16)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_part_of_every_family(model_type: str, tmp_path: Path) -> None:
    lens = opened(model_type, tmp_path)
    headers = read_headers(tmp_path)
    before = checksum(dict(lens.model.named_parameters()))
    ids = blocks(model_type)
    found = measure_sensitivity(
        lens, ids, rule=EXACT, headers=headers, predict=model_type == "mamba"
    )
    assert found.checksum == before == checksum(dict(lens.model.named_parameters()))
    assert ReferenceLogits(lens, ids).nll_nats == found.nll_nats
    matrices = find_matrices(lens, headers)
    assert [row.name for row in found.of("block")] == [str(i) for i in range(lens.n_layers)]
    assert {row.name for row in found.of("kind")} == {matrix.kind for matrix in matrices}
    for subject in ("block", "kind"):
        assert sum(row.n_matrices for row in found.of(subject)) == len(matrices)
    last = found.of("blocks")[-1]
    assert last.n_weights == sum(matrix.n_weights for matrix in matrices)
    assert found.of("blocks")[0].kl_nats == found.of("block")[0].kl_nats
    for row in found.rows:
        assert math.isfinite(row.nll_nats)
        assert row.kl_nats > 0
        assert 0.05 < row.output_error < 0.6, row
        assert 2 < row.bits_per_weight <= 2 + 32 / 4
    ranks = [row.kl_nats for row in found.ranked("kind")]
    assert ranks == sorted(ranks, reverse=True)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "rwkv"])
def test_all_blocks_together_are_the_checkpoint_that_ternarize_writes(
    model_type: str, tmp_path: Path
) -> None:
    lens = opened(model_type, tmp_path / "src")
    headers = read_headers(tmp_path / "src")
    ids = blocks(model_type)
    found = measure_sensitivity(lens, ids, rule=EXACT, headers=headers, predict=False)
    plan = TernaryPlan(rule="exact", group_size=16)
    report = ternarize(tmp_path / "src", tmp_path / "out", plan=plan)
    written = load(tmp_path / "out").eval()
    reference = ReferenceLogits(lens, ids)
    lens.model = written
    damage = reference.measure()
    last = found.of("blocks")[-1]
    # RWKV-4 halves its residual on the way, a packed one does not: its norms' ε weighs otherwise.
    loose = 30 if model_type == "rwkv" else 1
    # Differences of losses: what is rounded are the losses themselves.
    rounded = 1e-5 * max(1.0, reference.nll_nats)
    assert last.nll_nats == pytest.approx(damage.nll_nats, abs=rounded * loose)
    assert last.kl_nats == pytest.approx(damage.kl_nats, rel=1e-3 * loose, abs=rounded)
    stored = sum(tensor.size_bytes for tensor in report.coded)
    assert last.n_weights == sum(tensor.n_weights for tensor in report.coded)
    assert last.bits_per_weight == pytest.approx(8 * stored / last.n_weights)


@pytest.fixture(scope="module")
def lens(tmp_path_factory: pytest.TempPathFactory) -> Lens:
    return opened("llama", tmp_path_factory.mktemp("llama"))


def test_each_matrix_and_its_prediction(lens: Lens) -> None:
    steps: list[Step] = []
    found = measure_sensitivity(
        lens,
        blocks("llama"),
        rule=EXACT,
        each_matrix=True,
        progress=steps.append,
    )
    rows = found.of("matrix")
    assert len(rows) == 28
    for row in rows:
        assert row.predicted_kl_nats is not None
        # The guess comes from noise of another kind and size: right within a factor.
        assert 0.1 < row.predicted_kl_nats / row.kl_nats < 10, row
    correlation = found.rank_correlation("matrix")
    assert correlation is not None
    assert correlation > 0.7
    assert found.to_dict()["rank_correlation"]["matrix"] == correlation
    assert [step.done for step in steps] == list(range(steps[0].total))
    whole = found.of("blocks")[-1].predicted_kl_nats
    assert whole == pytest.approx(sum(row.predicted_kl_nats or 0.0 for row in rows))


def test_without_a_prediction_there_is_no_correlation(lens: Lens) -> None:
    found = measure_sensitivity(lens, blocks("llama", 1), rule=EXACT, predict=False)
    assert all(row.predicted_kl_nats is None for row in found.rows)
    assert found.rank_correlation("kind") is None


def test_an_exception_on_the_way_leaves_the_weights(lens: Lens) -> None:
    before = checksum(dict(lens.model.named_parameters()))

    def stop(step: Step) -> None:
        if step.what == "blocks 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(lens, blocks("llama", 1), rule=EXACT, predict=False, progress=stop)
    assert checksum(dict(lens.model.named_parameters())) == before


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    lens = opened("mamba", tmp_path)
    name = "backbone.layers.1.mixer.in_proj.weight"
    with torch.no_grad():
        lens.model.get_parameter(name)[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="own logits"):
        measure_sensitivity(lens, blocks("mamba", 1), rule=EXACT)


def test_what_makes_no_sense_is_refused(lens: Lens, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="changes nothing"):
        measure_sensitivity(lens, blocks("llama", 1), rule=MatrixPlan("keep"))
    source = tmp_path / "src"
    opened("llama", source)
    ternarize(source, tmp_path / "out")
    packed = Lens.from_pretrained(str(tmp_path / "out"))
    with pytest.raises(UsageError, match="packed already"):
        measure_sensitivity(packed, blocks("llama", 1))


def test_a_kind_is_never_a_bare_number() -> None:
    lens = Lens.from_pretrained(str(demo_path("rwkv7")), dtype="float32")
    kinds = {matrix.kind for matrix in find_matrices(lens)}
    assert {"o_proj", "key", "g_lora.lora.0", "g_lora.lora.2"} < kinds
    assert not any(kind.isdigit() for kind in kinds)
