"""One block: its matrices coded in the order in which data runs through them, then the fit.

Each matrix is fitted to the inputs that the ternary matrices before it give. A dense twin of the
block, run on the dense model's residual stream, gives the target outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from trilens.checkpoint.calibration.block_job import (
    BlockJob,
    BlockMatrix,
    held_weight,
    put_matrix,
    rule_of,
)
from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.checkpoint.calibration.experts import expert_inputs, expert_of
from trilens.checkpoint.calibration.fit import fit_block
from trilens.checkpoint.calibration.pair import Aims, BlockPair
from trilens.checkpoint.calibration.replay import Spool
from trilens.checkpoint.calibration.stages import Stage
from trilens.checkpoint.calibration.store import BlockRecord, MatrixRecord
from trilens.checkpoint.calibration.streams import Batch, Stream
from trilens.checkpoint.rotation import plain_weights, to_be_coded
from trilens.errors import NonFiniteError
from trilens.ternary.calibrated.held_out import HeldOutError
from trilens.ternary.calibrated.hessian import Moments, MomentSums
from trilens.ternary.calibrated.rules import (
    Calibrated,
    calibrate,
)
from trilens.ternary.quantize import PerLayerQuant
from trilens.ternary.rules.rules import RuleName

__all__ = ["CodedBlock", "code_block"]


@dataclass(frozen=True, slots=True, eq=False)
class CodedBlock:
    """A finished block: how it runs, what to keep of it, and what was measured."""

    run: Callable[[Batch, Tensor], Tensor]
    quants: dict[tuple[str, int], PerLayerQuant]
    vectors: dict[str, Tensor]
    record: BlockRecord


def code_block(
    runner: BlockRunner,
    job: BlockJob,
    dense_after: Callable[[nn.Module], Stream],
    observe: Callable[[str], None] = lambda _: None,
) -> CodedBlock:
    """Code a block's matrices and fit what else may move.

    Args:
        runner: runs blocks.
        job: what to do.
        dense_after: makes the dense model's residual stream after the block, from its dense twin.
        observe: called with the name of what is coded next.

    Raises:
        NonFiniteError: the model gives NaN or Inf on the text, or holds it.

    Memory: the block's weights in float32 twice, and in float64 those of one matrix at a time; the
    moments of one stage, or its ternary matrices decoded; one batch of the text.
    """
    coder = _Coder(runner, job)
    after = coder.pair.after = dense_after(coder.dense)
    parts = [matrix for matrix in job.matrices if not matrix.path]
    experts = coder.seen_experts(parts)
    for matrix in parts:
        if matrix.parameter not in experts:
            coder.code_without_inputs(matrix, matrix.reason)
    stages, unseen = coder.pair.stages()
    by_path = {matrix.path: matrix for matrix in job.matrices if matrix.path}
    for path, why in unseen.items():
        coder.code_without_inputs(by_path[path], why)
    for stage in stages:
        observe(", ".join(path.rpartition(".")[2] for path in stage.members))
        coder.code_stage(stage, by_path)
    for name in experts:
        observe(name.rpartition(".")[2])
        coder.code_experts(name, [matrix for matrix in parts if matrix.parameter == name])
    observe("norms, biases, scales")
    return coder.finish(after)


def _too_few(n_tokens: int) -> str:
    return f"{n_tokens} tokens of the text reached it: too few"


@dataclass(frozen=True, slots=True, eq=False)
class _Coded:
    """A matrix that is coded, and not in the block yet; why by its weights alone, or ""."""

    matrix: BlockMatrix
    found: Calibrated
    why: str


class _Coder:
    """The state of a block while its matrices are coded one after the other."""

    def __init__(self, runner: BlockRunner, job: BlockJob) -> None:
        self.job, self.rule = job, job.rule
        self.pair = BlockPair(runner, job)
        self.dense, self.block = self.pair.dense, self.pair.block
        self.quants: dict[tuple[str, int], PerLayerQuant] = {}
        self.records: list[MatrixRecord] = []

    def options_of(self, matrix: BlockMatrix) -> dict[str, Any]:
        """Of its scales."""
        plan = self.job.plan.of(matrix.name)
        return {
            "group_size": plan.group_size,
            "per": plan.per,
            "scale_dtype": plan.scale_dtype,
        }

    def code_stage(self, stage: Stage, by_path: Mapping[str, BlockMatrix]) -> None:
        routed = stage.n_tokens != self.job.batches[0].ids.numel()
        rules = {path: rule_of(self.job.plan, self.rule, by_path[path]) for path in stage.members}
        corrected = {path for path, rule in rules.items() if rule and rule.corrected and not routed}
        repairing = {path for path in corrected if (rule := rules[path]) and rule.repairs_residual}
        aims = Aims(stage, corrected, repairing)
        inputs = Spool(self.job.dense.path.parent)
        moments = self._moments(aims, inputs)
        coded: dict[str, _Coded] = {}
        for path in stage.members:
            matrix, of = by_path[path], moments.get(path)
            if of is None or (routed and of.hessian.n_tokens < of.cross.shape[1]):
                n_tokens = 0 if of is None else of.hessian.n_tokens
                coded[path] = self._without_inputs(matrix, _too_few(n_tokens), of)
            else:
                coded[path] = self._code(matrix, of)
        del moments
        for path, error in self._held_out(aims, coded, inputs).items():
            self._keep(coded[path], error)
        self.pair.settled(stage, inputs)
        inputs.close()

    def _held_out(
        self, aims: Aims, coded: Mapping[str, _Coded], inputs: Spool
    ) -> dict[str, float | None]:
        """The error of each matrix on the text that it was not fitted to."""
        first = aims.stage.members[0]
        plan, dense = self.job.plan, {path: self.pair.dense_weight(path) for path in coded}
        found = {
            path: HeldOutError(plain_weights(each.found.quant, plan).to(self.pair.device))
            for path, each in coded.items()
        }
        sums = MomentSums(
            f"{self.pair.path}.{first}", dense[first].shape[1], {}, device=self.pair.device
        )
        for batch in self.job.held_out:
            if batch.start in inputs:
                entered = inputs.get(batch.start)
                if len(aims.corrected) < len(found):
                    sums.add(entered, {})
                for path in aims.corrected:
                    target = inputs.get((batch.start, path))
                    found[path].add(entered, dense=dense[path], target=target)
        if sums.n_tokens:
            hessian = sums.hessian()
            for path in set(found) - set(aims.corrected):
                found[path].add_moments(hessian, dense=dense[path])
        return {path: error.value for path, error in found.items()}

    def seen_experts(self, parts: Sequence[BlockMatrix]) -> tuple[str, ...]:
        """The parameters that hold experts whose products can be seen, in order."""
        names = {
            matrix.parameter
            for matrix in parts
            if self.dense.get_parameter(matrix.parameter).ndim == 3
        }
        if not names:
            return ()
        batch = self.job.batches[0]
        hidden = self.pair.read(self.job.dense, batch)
        seen = expert_inputs(
            self.dense, sorted(names), lambda: self.pair.run(self.dense, batch, hidden)
        )
        return tuple(dict.fromkeys(name for name, _, _ in seen))

    def code_experts(self, name: str, matrices: Sequence[BlockMatrix]) -> None:
        """Code the experts of one parameter, each on the tokens that reach it."""
        held = self.dense.get_parameter(name).data
        weights = [held_weight(self.dense, matrix) for matrix in matrices]
        experts = [expert_of(weight, held) for weight in weights]
        sums = {
            expert: MomentSums(f"{self.pair.path}.{name}[{expert}]", weight.shape[1], {})
            for expert, weight in zip(experts, weights, strict=True)
        }
        for expert, inputs in self.pair.expert_inputs(name, self.job.batches):
            if expert in sums:
                sums[expert].add(inputs, {})
        coded: list[_Coded] = []
        for matrix, weight, expert in zip(matrices, weights, experts, strict=True):
            n_tokens = sums[expert].n_tokens
            of = Moments.of(weight, sums[expert].hessian()) if n_tokens else None
            if of is None or n_tokens < weight.shape[1]:
                coded.append(self._without_inputs(matrix, _too_few(n_tokens), of))
            else:
                coded.append(self._code(matrix, of))
        errors: list[HeldOutError] = []
        for each in coded:  # what an expert is given is not of its own making
            put_matrix(self.block, each.matrix, each.found.quant, self.job.plan)
            errors.append(HeldOutError(held_weight(self.block, each.matrix)))
        for seen, inputs in self.pair.expert_inputs(name, self.job.held_out):
            for expert, weight, error in zip(experts, weights, errors, strict=True):
                if expert == seen:
                    error.add(inputs, dense=weight)
        for each, error in zip(coded, errors, strict=True):
            self._keep(each, error.value)
        self.pair.forget()

    def _moments(self, aims: Aims, inputs: Spool) -> dict[str, Moments]:
        """Moments of the text for the matrices of a stage; nothing where no token came by.

        In the same pass inputs are kept that are needed once more: all of them where the stage's
        output is the last of a part of the block, and those of the text held out, with targets.
        """
        stage = aims.stage
        weights = {path: self.pair.dense_weight(path) for path in stage.members}
        outputs = {path: len(weights[path]) for path in aims.corrected}
        first = next(iter(weights.values()))
        name = f"{self.pair.path}.{stage.members[0]}"
        sums = MomentSums(name, first.shape[1], outputs, device=self.pair.device)
        carried = bool(self.pair.carried(stage))
        for batch, entered, targets in self.pair.seen(aims, self.job.batches):
            sums.add(entered, targets)
            if carried:
                inputs.put(batch.start, entered)
        for batch, entered, targets in self.pair.seen(aims, self.job.held_out):
            inputs.put(batch.start, entered)
            for path, target in targets.items():
                inputs.put((batch.start, path), target)
        if sums.n_tokens == 0:
            return {}
        hessian = sums.hessian()
        rest = {path: weight for path, weight in weights.items() if path not in aims.corrected}
        return sums.result() | {path: Moments.of(w, hessian) for path, w in rest.items()}

    def _code(self, matrix: BlockMatrix, moments: Moments) -> _Coded:
        weight = held_weight(self.dense, matrix)
        rule = rule_of(self.job.plan, self.rule, matrix)
        if rule is None:
            return self._without_inputs(matrix, "", moments)
        weight = to_be_coded(weight.cpu(), matrix.name, self.job.plan)
        moments = moments.rotated() if self.job.plan.rotate else moments
        found = calibrate(weight, matrix.name, moments, rule=rule, **self.options_of(matrix))
        return _Coded(matrix, found, "")

    def code_without_inputs(self, matrix: BlockMatrix, why: str) -> None:
        """Code a matrix by its weights alone, and keep it; `why` as below."""
        self._keep(self._without_inputs(matrix, why), None)

    def _without_inputs(
        self, matrix: BlockMatrix, why: str, moments: Moments | None = None
    ) -> _Coded:
        """Code a matrix by its weights alone; `why`: the reason, where the rule needs inputs."""
        weight = to_be_coded(held_weight(self.dense, matrix).cpu(), matrix.name, self.job.plan)
        calibrated = rule_of(self.job.plan, self.rule, matrix)
        rule = cast("RuleName", self.job.plan.of(matrix.name).rule)  # where none is calibrated
        rule = rule if calibrated is None else calibrated.start
        quant = PerLayerQuant.quantize(weight, matrix.name, rule=rule, **self.options_of(matrix))
        error = None
        if moments is not None:
            decoded = plain_weights(quant, self.job.plan)
            error = moments.output_error(decoded)
        n_tokens = 0 if moments is None else moments.hessian.n_tokens
        found = Calibrated(quant, error if error is not None else -1.0, None, n_tokens, 0)
        return _Coded(matrix, found, why if calibrated is not None else "")

    def _keep(self, coded: _Coded, held_out: float | None) -> None:
        matrix, found = coded.matrix, coded.found
        quant = found.quant
        put_matrix(self.block, matrix, quant, self.job.plan)
        self.quants[(matrix.name, matrix.expert)] = quant
        self.records.append(
            MatrixRecord(
                matrix.name,
                matrix.expert,
                quant.rule,
                coded.why,
                found.output_error if found.output_error >= 0 else None,
                found.damping,
                found.n_tokens,
                found.dead_channels,
                found.changes,
                quant.was_ternary,
                quant.zeroed_units,
                held_out,
            )
        )

    def finish(self, after: Stream) -> CodedBlock:
        """Fit what may move, measure the block, and give it."""
        job = self.job
        vectors: dict[str, Tensor] = {}
        before: float | None = None
        movable = {
            m.path: self.quants[(m.name, m.expert)]
            for m in job.matrices
            if m.path
            and (rule := rule_of(self.job.plan, self.rule, m)) is not None
            and rule.fits_block
            and not self.quants[(m.name, m.expert)].was_ternary
        }
        wants = bool(movable)
        fitted = fit_block(
            self.block,
            movable,
            {name: dtype for name, (_, dtype) in job.vectors.items()} if wants else {},
            batches=job.batches,
            inputs=job.ternary,
            targets=after,
            run=self.pair.run,
            as_coded=self.pair.again,
            plan=job.plan,
            options=job.fit,
        )
        if not fitted.error < float("inf"):
            raise NonFiniteError(
                f"{self.pair.path} gives NaN or Inf on the calibration text: check "
                "the model's weights, or calibrate with other text"
            )
        if wants:
            self.pair.forget()
            before = fitted.error_before
            names = {m.path: (m.name, m.expert) for m in job.matrices}
            self.quants |= {names[path]: quant for path, quant in fitted.quants.items()}
            vectors = {job.vectors[name][0]: v for name, v in fitted.vectors.items()}
        record = BlockRecord(
            job.index, tuple(self.records), tuple(sorted(vectors)), before, fitted.error
        )
        return CodedBlock(self._after, self.quants, vectors, record)

    @torch.no_grad()
    def _after(self, batch: Batch, hidden: Tensor) -> Tensor:
        return self.pair.again(self.block, batch, hidden)
