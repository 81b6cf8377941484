"""A block that becomes ternary beside its dense twin, and what its matrices are given on a text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from trilens.checkpoint.calibration.block_job import BlockJob
from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.checkpoint.calibration.experts import expert_inputs
from trilens.checkpoint.calibration.fit import transposed
from trilens.checkpoint.calibration.replay import Replay, Spool, find_carriers
from trilens.checkpoint.calibration.stages import (
    BLOCK_OUTPUT,
    Stage,
    find_stages,
    watching,
)
from trilens.checkpoint.calibration.streams import Batch, Stream, pieces_of

__all__ = ["Aims", "BlockPair"]


class Aims:
    """What the matrices of a stage should give.

    Args:
        stage: the matrices.
        corrected: those that should give what the dense model's give; the others what the dense
            matrix makes of the same input.
        repairing: of those, the ones that should give what the residual stream lacks, where they
            add to it.
    """

    def __init__(self, stage: Stage, corrected: set[str], repairing: set[str]) -> None:
        self.stage = stage
        self.corrected = [path for path in stage.members if path in corrected]
        self.sites = {path: site for path, site in stage.sites.items() if path in repairing}


class BlockPair:
    """The two copies of a block.

    Args:
        runner: runs blocks.
        job: which one, on which text.
    """

    def __init__(self, runner: BlockRunner, job: BlockJob) -> None:
        self.runner, self.job = runner, job
        self.dense = runner.block(job.index)
        self.block = runner.block(job.index)
        self._folder: Path = job.dense.path.parent
        self._replays = {
            id(twin): Replay(twin, {}, self._folder) for twin in (self.dense, self.block)
        }
        self.after: Stream | None = None

    @property
    def device(self) -> torch.device:
        """Where both copies are."""
        return next(self.block.parameters()).device

    def read(self, stream: Stream, batch: Batch) -> Tensor:
        """A residual stream, where the block is. Shapes: → float32 [batch, seq, d_model]."""
        return stream.read(batch).to(self.device)

    def run(self, block: nn.Module, batch: Batch, hidden: Tensor) -> Tensor:
        """The residual stream after the block or a copy of it."""
        call = self.runner.call(self.job.index, batch.ids)
        return self.runner.run(self.job.index, block, call, hidden)

    @property
    def path(self) -> str:
        """Where the block stands in the model."""
        return self.runner.path(self.job.index)

    def again(
        self, block: nn.Module, batch: Batch, hidden: Tensor, watched: Collection[str] = ()
    ) -> Tensor:
        """The same, without running the parts again whose output is known."""
        with self._replays[id(block)].on(batch, watched):
            return self.run(block, batch, hidden)

    def stages(self) -> tuple[tuple[Stage, ...], dict[str, str]]:
        """Which matrices read the same input, in order; those without a stage, and why."""
        batch = self.job.batches[0]
        hidden = self.read(self.job.dense, batch)
        paths = [matrix.path for matrix in self.job.matrices if matrix.path]
        found = find_stages(self.dense, paths, lambda: self.run(self.dense, batch, hidden), hidden)
        seen = [path for stage in found[0] for path in stage.members]
        probe = pieces_of([batch], 1)[0]
        there = self.read(self.job.dense, probe)
        carriers = find_carriers(self.dense, seen, lambda: self.run(self.dense, probe, there))
        for twin in (self.dense, self.block):
            self._replays[id(twin)] = Replay(twin, carriers, self._folder)
        return found

    def seen(
        self, aims: Aims, batches: Sequence[Batch]
    ) -> Iterator[tuple[Batch, Tensor, dict[str, Tensor]]]:
        """Inputs of a stage and what its corrected matrices should give, batch by batch.

        Batches of which no token came by are left out.
        """
        first = aims.stage.members[0]
        befores = sorted({site.before for site in aims.sites.values()})
        for batch in batches:
            hidden = self.read(self.job.ternary, batch)
            with watching(self.block, inputs=[first], states=befores, shape=hidden.shape) as watch:
                seen = watch(
                    lambda b=batch, h=hidden: self.again(self.block, b, h, (first, *befores))  # type: ignore[misc]
                )
            entered = seen.get(("input", first))
            if entered is None:
                continue
            targets: dict[str, Tensor] = {}
            if aims.corrected:
                true = self._dense_seen(aims, batch)
                for path in aims.corrected:
                    if path in aims.sites:
                        before = seen.get(("state", aims.sites[path].before), hidden)
                        targets[path] = true[("state", aims.sites[path].after)] - before
                    else:
                        targets[path] = true[("output", path)]
                    bias = getattr(self.dense.get_submodule(path), "bias", None)
                    if isinstance(bias, Tensor):
                        targets[path] = targets[path] - bias
            yield batch, entered, targets

    def settled(self, stage: Stage, inputs: Spool) -> None:
        """The matrices of a stage are ternary: what they give from now on need not run again.

        Args:
            stage: the matrices.
            inputs: what they were given, by the start of the batch.
        """
        own, dense = self._replays[id(self.block)], self._replays[id(self.dense)]
        for path in self.carried(stage):
            module = self.block.get_submodule(path)
            for batch in (*self.job.batches, *self.job.held_out):
                if batch.start in inputs:
                    with torch.no_grad():
                        own.keep(path, batch, module(inputs.get(batch.start)))
            own.start(path)
            dense.start(path)

    def carried(self, stage: Stage) -> tuple[str, ...]:
        """The matrices of a stage whose output alone a part of the block gives."""
        carriers = self._replays[id(self.block)].carriers
        return tuple(path for path in stage.members if path in carriers)

    def expert_inputs(self, name: str, batches: Sequence[Batch]) -> Iterator[tuple[int, Tensor]]:
        """What the experts of one parameter are given, batch by batch."""
        for batch in batches:
            hidden = self.read(self.job.ternary, batch)

            def run(batch: Batch = batch, hidden: Tensor = hidden) -> Tensor:
                return self.again(self.block, batch, hidden, (name,))

            for _, expert, inputs in expert_inputs(self.block, [name], run):
                yield expert, inputs

    def forget(self) -> None:
        """Something else of the block has changed: every part runs again."""
        for replay in self._replays.values():
            replay.close()

    def dense_weight(self, path: str) -> Tensor:
        """[out, in]."""
        weight = self.dense.get_parameter(f"{path}.weight").data
        return weight.T if transposed(self.dense, path) else weight

    def _dense_seen(self, aims: Aims, batch: Batch) -> dict[tuple[str, str], Tensor]:
        """What the dense twin gives where a stage's matrices should give it."""
        own = [path for path in aims.corrected if path not in aims.sites]
        states = sorted({site.after for site in aims.sites.values()})
        replay = self._replays[id(self.dense)]
        kept = [path for path in self.carried(aims.stage) if path not in replay.ready]
        known: dict[tuple[str, str], Tensor] = {}
        if BLOCK_OUTPUT in states and self.after is not None:
            known["state", BLOCK_OUTPUT] = self.read(self.after, batch)
            states.remove(BLOCK_OUTPUT)
        if not own and not states:
            return known
        hidden = self.read(self.job.dense, batch)
        requested = sorted({*own, *kept})
        with watching(self.dense, outputs=requested, states=states, shape=hidden.shape) as watch:
            true = watch(lambda: self.again(self.dense, batch, hidden, (*requested, *states)))
        for path in kept:
            if ("output", path) in true:
                replay.keep(path, batch, true["output", path])
        return known | true
