"""A calibration: block after block, stored on disk after each, and the damage at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trilens.checkpoint.calibration.block_job import (
    BlockJob,
    BlockMatrix,
    held_weight,
    put_matrix,
    rule_of,
)
from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.checkpoint.calibration.chain import FinishedBlock
from trilens.checkpoint.calibration.coder import code_block
from trilens.checkpoint.calibration.device import PlacedRunner, find_device
from trilens.checkpoint.calibration.effort import find_effort
from trilens.checkpoint.calibration.end_to_end import fit_end_to_end
from trilens.checkpoint.calibration.fit import FitOptions, put_weight
from trilens.checkpoint.calibration.handover import Key
from trilens.checkpoint.calibration.kept import DAMAGE_NAME, PROMPTS_NAME, read_damage
from trilens.checkpoint.calibration.measured import measure_text
from trilens.checkpoint.calibration.options import Calibration, Drawn, block_length, draw
from trilens.checkpoint.calibration.own_text import kept_text, write_text
from trilens.checkpoint.calibration.placement import Placed, place_choices
from trilens.checkpoint.calibration.store import Store
from trilens.checkpoint.calibration.streams import (
    Batch,
    Stream,
    batches_of,
    first_tokens,
    write_stream,
)
from trilens.checkpoint.evaluate import PROMPT_TOKENS
from trilens.checkpoint.format.damage import Damage
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.job import Job
from trilens.checkpoint.rotation import plain_weights
from trilens.io.atomic import write_bytes
from trilens.io.sealed import sealed
from trilens.lens.proof import prove
from trilens.models.loading import load_mapped
from trilens.models.positions import configured_positions
from trilens.models.stacks import only_stack
from trilens.progress import Progress, Step
from trilens.ternary.calibrated.rules import CALIBRATED_RULES, CalibratedRule
from trilens.ternary.quantize import PerLayerQuant

__all__ = ["run_calibration"]


def run_calibration(
    job: Job,
    calibration: Calibration,
    folder: Path,
    *,
    rule: CalibratedRule | None = None,
    fit: FitOptions | None = None,
    progress: Progress | None = None,
) -> tuple[Store, Damage]:
    """Code every matrix with the help of a text, and measure the damage.

    Args:
        job: the checkpoint, and the plan.
        calibration: the text.
        folder: where finished blocks are stored; of the same source, plan and text.
        rule: a calibrated rule in place of the plan's.
        fit: how norms, biases and scales are fitted, for rules that do so.
        progress: called with the block at work; `done` are the blocks before it.

    Raises:
        TextError: text that is too short, empty or all alike.
        AnatomyError: a model whose blocks cannot be run one by one.
        NonFiniteError: NaN or Inf on the text.
        LoadError, WriteError: files that cannot be read or written.

    Memory: with P the weights of the largest block, c the widest input, r the rows beside it and
    b = batch_size · length tokens: 8·P bytes for two copies in float32, 32·c² + 48·c·r for the
    matrix at work, and a batch's activations (about 4·b·(10·d_model + 3·c) bytes, several times
    that while norms are fitted). At the end the unembedding in float32 and b·vocab·4 for logits.
    The model's own weights are mapped from their files.
    """
    store = Store(folder)
    done = folder / DAMAGE_NAME
    if done.is_file():
        return store, read_damage(done)
    torch.manual_seed(calibration.seed)
    source, plan, tensors = job.source, job.plan, job.tensors
    model, tokenizer = load_mapped(source.folder, type(job.model), source.config, tensors)
    if source.given_tokenizer is not None:
        tokenizer = source.given_tokenizer
    longest = configured_positions(model)
    anatomy = prove(model, only_stack(model)).anatomy
    placed = place_choices(model, anatomy, job.choices, tensors, plan)
    texts: list[Drawn] = []

    def take_text() -> None:
        """What the model writes takes its time: not before it is known that it can be used."""
        written = _written(model, tokenizer, calibration, longest, store, progress)
        texts.append(draw(calibration, tokenizer, longest=longest, written=written))

    device = find_device(calibration.device)
    runner = PlacedRunner(model, anatomy, before=take_text, device=device)
    drawn = texts[0]
    rule = rule or CALIBRATED_RULES.get(plan.rule)
    fit = fit or find_effort(calibration.effort).seeded(calibration.seed)
    check = source.check_unchanged
    run = _Run(runner, placed, plan, calibration, drawn, store, progress, rule, fit, check)
    run.blocks()
    run.whole()
    damage = run.damage()
    prompts = {text.name: [b[:PROMPT_TOKENS].tolist() for b in text.blocks] for text in drawn.apart}
    write_bytes(folder / PROMPTS_NAME, sealed({"prompts": prompts}))
    write_bytes(done, sealed(damage.to_dict()))
    return store, damage


def _written(
    model: PreTrainedModel,
    tokenizer: Any,
    calibration: Calibration,
    longest: int | None,
    store: Store,
    progress: Progress | None,
) -> tuple[Tensor, ...]:
    """What the model writes itself to be calibrated on; nothing where it need not."""
    length, own = block_length(calibration, longest), calibration.own_text
    if own is None:
        return ()
    rows, began = sum(calibration.own_rows(length)), time.monotonic()

    def observe(share: float) -> None:
        if progress is not None:
            left = (time.monotonic() - began) * (1 - share) / share if share else None
            what = f"the model writes {rows * length:,} tokens, {share:.0%}"
            progress(Step(0, model.config.get_text_config().num_hidden_layers, what, left))

    return kept_text(
        store.folder,
        tokenizer,
        lambda: write_text(
            model,
            tokenizer,
            own,
            rows=rows,
            length=length,
            seed=calibration.seed,
            observe=observe,
        ),
    )


class _Run:
    """The state of a calibration: streams on disk, time so far."""

    def __init__(
        self,
        runner: BlockRunner,
        placed: tuple[Placed, ...],
        plan: TernaryPlan,
        calibration: Calibration,
        drawn: Drawn,
        store: Store,
        progress: Progress | None,
        rule: CalibratedRule | None,
        fit: FitOptions,
        check_source: Callable[[], None],
    ) -> None:
        self.check_source = check_source
        self.digests: dict[str, str] = {}
        self.rule, self.fit = rule, fit
        self.runner, self.placed, self.plan = runner, placed, plan
        self.calibration, self.drawn, self.store = calibration, drawn, store
        self.progress = progress
        size = calibration.batch_size
        self.text = batches_of(drawn.blocks, size)
        self.texts: list[tuple[Batch, ...]] = []  # set apart, each text's batches
        for text in drawn.apart:
            start = (self.texts[-1] if self.texts else self.text)[-1].stop
            self.texts.append(batches_of(text.blocks, size, start=start))
        self.apart = tuple(batch for batches in self.texts for batch in batches)
        # Trits that move want more text than coding does.
        partly = rule is not None and rule.fits_whole and fit.block_tokens is not None
        self.coding = first_tokens(self.text, fit.block_tokens or 0) if partly else self.text
        # Weights of several blocks stay as they were coded when all blocks are fitted together.
        self.repeated = {(m.name, m.expert) for each in placed for m in each.shared} | {
            (name, 0) for each in placed for name in each.shared_vectors.values()
        }
        self.began = time.monotonic()
        self.finished_now = 0

    def blocks(self) -> None:
        """Code every block that is not finished."""
        self.store.check_streams()
        if not self.store.records:
            self._write("dense", 0, lambda _batch: {})
        for index in range(len(self.store.records), self.runner.n_blocks):
            self._block(index)
            self.finished_now += 1

    def damage(self) -> Damage:
        """Measure both models on each text set apart."""
        last, whole = self.runner.n_blocks, self.store.whole
        self._report(last, "perplexity")
        dense = self._stream("dense", last)
        if whole is None or not (whole.matrices or whole.vectors):
            ternary, shift = self._stream("ternary", last), 0
        else:
            ternary, shift = self._once_more(), self.apart[0].start
        fallbacks = tuple(
            f"{matrix.name}{f'[{matrix.expert}]' if matrix.expert else ''}: {matrix.reason}"
            for record in self.store.records
            for matrix in record.matrices
            if matrix.reason
        )
        return Damage.of(
            tuple(
                measure_text(self.runner, text, batches, dense, ternary, shift)
                for text, batches in zip(self.drawn.apart, self.texts, strict=True)
            ),
            calibration_tokens=self.drawn.n_tokens,
            refused_documents=self.drawn.refused,
            fallbacks=fallbacks,
            own_text=self.calibration.own_text is not None,
        )

    def _block(self, index: int) -> None:
        self.check_source()  # its weights are mapped: a file that was cut off would end the process
        placed = self.placed[index]
        dense = self._stream("dense", index)
        ternary = self._stream("ternary", index) if index else dense
        job = BlockJob(
            index,
            placed.matrices,
            placed.vectors,
            self.coding,
            self.apart,
            dense,
            ternary,
            self.plan,
            self.rule,
            self.fit,
            partial(self._put_earlier, index),
        )

        def dense_after(block: nn.Module) -> Stream:
            self._report(index, "dense block")
            return self._write("dense", index + 1, self._after(index, dense, block))

        coded = code_block(self.runner, job, dense_after, lambda what: self._report(index, what))
        self._write("ternary", index + 1, lambda batch: coded.run(batch, ternary.read(batch)))
        self.check_source()
        kept = {self._path(name, index + 1).name for name in ("dense", "ternary")}
        digests = {name: digest for name, digest in self.digests.items() if name in kept}
        self.store.add(coded.record, coded.quants, coded.vectors, digests)
        for name in ("dense", "ternary"):  # the next block is all that a resumed run needs
            self._path(name, index).unlink(missing_ok=True)

    def whole(self) -> None:
        """Fit all blocks together, where the rule wants it."""
        if self.store.whole is not None or self.runner.n_blocks == 0:
            return
        finished = [self._finished(index) for index in range(self.runner.n_blocks)]
        if not any(block.quants for block in finished):
            return
        last, began = self.runner.n_blocks, time.monotonic()

        def observe(share: float) -> None:
            left = (time.monotonic() - began) * (1 - share) / share if share else None
            self._report(last, f"all blocks together, {share:.0%}", left)

        found = fit_end_to_end(
            self.runner, finished, self.text, self._stream("dense", last), self.fit, observe
        )
        quants: dict[tuple[str, int], PerLayerQuant] = {}
        vectors: dict[str, Tensor] = {}
        for placed, q, v in zip(self.placed, found.quants, found.vectors, strict=True):
            names = {matrix.path: (matrix.name, matrix.expert) for matrix in placed.matrices}
            quants |= {names[path]: quant for path, quant in q.items()}
            vectors |= {placed.vectors[name][0]: value for name, value in v.items()}
        self.check_source()
        self.store.finish(
            (found.kl_nats_before, found.kl_nats),
            quants,
            vectors,
            trit_changes=found.trit_changes,
        )

    def _finished(self, index: int) -> FinishedBlock:
        """A block as the store has it."""
        placed, dense = self.placed[index], self.runner.block(index)
        fixed: list[tuple[BlockMatrix, PerLayerQuant]] = []
        quants: dict[str, PerLayerQuant] = {}
        for matrix in placed.matrices:
            cols = held_weight(dense, matrix).shape[1]
            found = self.store.quant(matrix.name, matrix.expert, cols, self.plan.of(matrix.name))
            assert found is not None
            rule = rule_of(self.plan, self.rule, matrix)
            alone = (matrix.name, matrix.expert) not in self.repeated
            fits = rule is not None and rule.fits_whole and not found[0].was_ternary
            if matrix.path and alone and fits:
                quants[matrix.path] = found[0]
            else:
                fixed.append((matrix, found[0]))

        vectors, still = dict[str, Tensor](), dict[str, Tensor]()
        for inside, (name, _) in placed.vectors.items():
            new = self.store.vector(name)
            value = dense.get_parameter(inside).data if new is None else new
            (still if (name, 0) in self.repeated else vectors)[inside] = value

        def put(block: nn.Module) -> None:
            self._put_earlier(index, block)
            for matrix, quant in fixed:
                put_matrix(block, matrix, quant, self.plan)
            for inside, value in still.items():
                block.get_parameter(inside).data.copy_(value.float())

        dtypes = {inside: placed.vectors[inside][1] for inside in vectors}
        return FinishedBlock(put, quants, vectors, dtypes, self.plan)

    def _once_more(self) -> Stream:
        """The residual stream of the finished model on the texts set apart alone."""
        first = self.apart[0].start
        apart = [Batch(batch.ids, batch.start - first) for batch in self.apart]
        path = self.store.folder / "apart.f32"
        before, _ = write_stream(path, self.runner.form(0), apart, lambda _batch: {})
        for index in range(self.runner.n_blocks):
            parts = self._finished(index)
            block = self.runner.block(index)
            parts.fixed(block)
            for inside, quant in parts.quants.items():
                put_weight(block, inside, plain_weights(quant, self.plan))
            for inside, value in parts.vectors.items():
                block.get_parameter(inside).data.copy_(value.float())
            after = self._after(index, before, block)
            before, _ = write_stream(path, self.runner.form(index + 1), apart, after)
        return before

    def _after(
        self, index: int, before: Stream, block: nn.Module
    ) -> Callable[[Batch], dict[Key, Tensor]]:
        """What makes of a batch before a block what stands after it."""

        def make(batch: Batch) -> dict[Key, Tensor]:
            with torch.no_grad():
                call = self.runner.call(index, batch.ids, before.read(batch))
                return self.runner.run(index, block, call)

        return make

    def _put_earlier(self, index: int, block: nn.Module) -> None:
        """Put what earlier blocks' matrices and vectors became where this block runs them too."""
        for matrix in self.placed[index].shared:
            cols = held_weight(block, matrix).shape[1]
            found = self.store.quant(matrix.name, matrix.expert, cols, self.plan.of(matrix.name))
            assert found is not None
            put_matrix(block, matrix, found[0], self.plan)
        for inside, name in self.placed[index].shared_vectors.items():
            new = self.store.vector(name)
            if new is not None:
                block.get_parameter(inside).data.copy_(new.float())

    def _path(self, name: str, index: int) -> Path:
        return self.store.folder / f"{name}-{index:05d}.f32"

    def _stream(self, name: str, index: int) -> Stream:
        return Stream(self._path(name, index), self.runner.form(index), self._batches(name))

    def _write(self, name: str, index: int, make: Callable[[Batch], dict[Key, Tensor]]) -> Stream:
        path = self._path(name, index)
        stream, self.digests[path.name] = write_stream(
            path, self.runner.form(index), self._batches(name), make
        )
        return stream

    def _batches(self, name: str) -> tuple[Batch, ...]:
        """What stands in a stream: of the dense model everything, since the last fit reads it."""
        return (*(self.text if name == "dense" else self.coding), *self.apart)

    def _report(self, index: int, what: str, left: float | None = None) -> None:
        if self.progress is None:
            return
        total = self.runner.n_blocks
        if index < total:
            what = f"layer {index} of 0–{total - 1}: {what}"
            if self.finished_now:
                spent = time.monotonic() - self.began
                left = spent / self.finished_now * (total - index)
        self.progress(Step(index, total, what, left))
