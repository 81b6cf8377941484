"""One block of a probe, with everything that happened in it: what the rules of gates read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from trilens.models.anatomy import Anatomy
from trilens.models.gates.events import FunctionCall, GateEvents, KernelCall, WeightedCall
from trilens.models.gates.kernels import KERNEL_GATES
from trilens.models.gates.site import (
    GateSource,
    Layout,
    find_columns,
    is_numbered,
    layout_of,
    rows_of,
)
from trilens.models.trace import ModuleCall, Trace, parent_path, same, tensors_in
from trilens.ternary.packed.experts import TernaryExperts

__all__ = ["BlockView", "blocks_of"]

_MIXER_ATTRIBUTES = (
    ("slope_rate", "query_decay"),
    ("mlstm_backend",),
    ("rg_lru",),
    ("slstm_cell",),
)
"""Attributes by which a recurrent mixer without a known kernel function is recognised."""


def blocks_of(trace: Trace, events: GateEvents, anatomy: Anatomy) -> Iterator[BlockView]:
    """The blocks in the order in which they ran, one per layer."""
    paths = {block.path for block in anatomy.blocks}
    for call in trace.calls:
        if call.path in paths:
            yield BlockView(trace, events, call)


class BlockView:
    """The calls of one block, and which of its gating calls are explained."""

    def __init__(self, trace: Trace, events: GateEvents, block: ModuleCall) -> None:
        self.seq = trace.seq
        self.block = block
        self.calls = [block, *trace.inside(block)]
        self.numbers = [i for i, c in enumerate(events.functions) if self._mine(c.tick)]
        self.functions = [events.functions[i] for i in self.numbers]
        self.products = [p for p in events.products if self._mine(p.tick)]
        self.weighted = [w for w in events.weighted if self._mine(w.tick)]
        self.streams = [p for p in events.streams if self._mine(p.tick)]
        self.topk = [t for t in events.topk if self._mine(t.tick)]
        self.kernels = [
            k for k in events.kernels if self._mine(k.start) and k.function in KERNEL_GATES
        ]
        self.attention = {site.path for site in trace.attention if self._mine(site.tick)}
        self.complaints: list[str] = []
        self._settled: set[int] = set()
        used = {p.factor for p in self.products} | {p.other for p in self.products}
        self._used = {number for number in used if number is not None}

    def _mine(self, tick: int) -> bool:
        return self.block.start < tick < self.block.end

    def open_calls(self) -> list[FunctionCall]:
        """Gating calls that no rule has explained yet."""
        return [call for call in self.functions if call.tick not in self._settled]

    def explain(self, calls: Iterable[FunctionCall]) -> None:
        """These gating calls are accounted for."""
        self._settled |= {call.tick for call in calls}

    def explain_path(self, path: str) -> None:
        """The gating calls of this very module are accounted for."""
        self.explain(call for call in self.functions if call.path == path)

    def outputs(self, kernel: KernelCall | None = None) -> dict[str, list[Tensor]]:
        """Gating function → outputs, of one kernel call and what is outside all kernels."""
        found: dict[str, list[Tensor]] = {}
        for call in self.functions:
            inside = kernel is not None and kernel.start < call.tick < kernel.end
            if inside or not call.kernel:
                found.setdefault(call.function, []).append(call.y)
        return found

    def scales_data(self, call: FunctionCall) -> bool:
        """Whether the call's output, or a copy of it, is a factor of a product with a tensor."""
        return self.numbers[self.functions.index(call)] in self._used

    def side_by_side(self) -> bool:
        """Whether several kernel calls are heads: what they gave is in one module's input."""
        if len(self.kernels) < 2 or len({(k.function, k.path) for k in self.kernels}) > 1:
            return False
        wanted = [self.rows(next(tensors_in(kernel.result))) for kernel in self.kernels]
        width = sum(rows.shape[1] for rows in wanted)
        for call in self.calls:
            for held in call.inputs if call.start > self.kernels[-1].end else ():
                if not held.is_floating_point() or layout_of(held, self.seq) is None:
                    continue
                rows = self.rows(held)
                if rows.shape[1] == width and all(
                    find_columns(own.to(rows.dtype), rows) is not None for own in wanted
                ):
                    return True
        return False

    def has_tokens(self, tensor: Tensor) -> bool:
        """Whether the tensor has a row per token."""
        return layout_of(tensor, self.seq) is not None

    def in_attention(self, path: str) -> bool:
        """Whether a module is, is in, or holds the module that calls softmax attention."""
        return any(self._related(path, site) for site in self.attention)

    @property
    def other_mixer(self) -> str:
        """The class of a recurrent mixer without a known kernel function, or ""."""
        found = (type(c.module).__name__ for c in self.calls[1:] if _is_other_mixer(c.module))
        return next(found, "")

    def mixer_of(self, path: str) -> str | None:
        """The recurrent mixer that a module is, is in, or holds; None where there is none."""
        for kernel in self.kernels:
            if self._related(path, kernel.path):
                return kernel.path
        for call in self.calls[1:]:
            known = _is_other_mixer(call.module)
            convolved = any(isinstance(child, nn.Conv1d) for child in call.module.children())
            if (known or convolved) and self._related(path, call.path):
                return call.path
        return None

    def _related(self, path: str, site: str) -> bool:
        if path == site or path.startswith(site + "."):
            return True
        return site.startswith(path + ".") and path.startswith(self.block.path + ".")

    def has_children(self, path: str) -> bool:
        """Whether a module of the block has modules of its own."""
        return any(c.path == path and any(True for _ in c.module.children()) for c in self.calls)

    def is_expert(self, path: str, x: Tensor) -> bool:
        """Whether a module belongs to routed experts, whose rows are sorted by expert."""
        if self.mixer_of(path) is not None:
            return False
        times = [call for call in self.calls if call.path == path]
        if len(times) > 1:
            return True
        if is_numbered(self.block.module, path.removeprefix(f"{self.block.path}.")):
            return True
        home = path
        # Some keep the weights in children of the module that sorts the rows and activates them.
        sorted_rows = x.dim() == 2 and x.shape[0] != self.seq
        while home.startswith(self.block.path + "."):
            here = [call.module for call in self.calls if call.path == home]
            if any(_is_stacked(module) for module in here):
                return True
            if sorted_rows and any(_is_stacked(child) for m in here for child in m.children()):
                return True
            home = parent_path(home)
        return False

    def is_activation_inside(self, call: FunctionCall) -> bool:
        """Whether the call is part of an activation: quick_gelu's sigmoid multiplies its input."""
        for module in self.calls:
            if module.path != call.path or not module.start < call.tick < module.end:
                continue
            file = type(module.module).__module__
            if not file.startswith(("transformers.activations", "torch.nn.modules.activation")):
                return False
            return not any(same(call.y, output) for output in module.outputs)
        return False

    def is_in_norm(self, call: FunctionCall) -> bool:
        """Whether the call belongs to a norm of the block, outside attention and mixers."""
        if self.in_attention(call.path) or self.mixer_of(call.path) is not None:
            return False
        first = call.path[len(self.block.path) + 1 :].partition(".")[0]
        home = f"{self.block.path}.{first}"
        return any(c.path == home and "Norm" in type(c.module).__name__ for c in self.calls)

    def is_sink(self, call: FunctionCall) -> bool:
        """Whether the call is the share that attention leaves to its real keys beside a sink."""
        heads = call.x.shape[1] if call.x.dim() == 3 else 0
        for module in self.calls:
            if module.path == call.path and call.path in self.attention:
                sinks = getattr(module.module, "sinks", None)
                return isinstance(sinks, Tensor) and sinks.numel() == heads
        return False

    def is_convolved(self, call: FunctionCall) -> bool:
        """Whether the call is the activation of a convolution: its input is one's output."""
        wanted = self.rows(call.x)
        for module in self.calls:
            if not isinstance(module.module, nn.Conv1d) or module.end > call.tick:
                continue
            for output in module.outputs:
                if output.dim() == 3 and output.shape[-1] >= self.seq:
                    rows = output[0, :, : self.seq].T
                    if find_columns(wanted, rows) is not None:
                        return True
        return False

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the probe as [seq, units]."""
        layout = layout_of(tensor, self.seq)
        if layout is None:
            return tensor.reshape(1, -1)
        return rows_of(tensor, layout, 1, self.seq, "probe")[0]

    def locate_weighted(
        self, x: Tensor, tick: int
    ) -> tuple[GateSource, Layout, str, WeightedCall] | None:
        """Where x passes by before a weight of the model is added to it or scales it."""
        wanted = self.rows(x)
        for call in self.weighted:
            shapes = tuple(call.x.shape), tuple(call.result.shape)
            if call.tick > tick or shapes[0] != shapes[1] or shapes[0][:2] != (1, self.seq):
                continue
            columns = find_columns(wanted, self.rows(call.result))
            place = None if columns is None else self.locate(call.x, call.tick)
            if place is None or place[1] != Layout("batched"):
                continue
            return place[0], Layout("batched", columns=columns), place[2], call
        return None

    def locate(self, x: Tensor, tick: int) -> tuple[GateSource, Layout, str] | None:
        """Where x passes by before a tick: the narrowest tensor of a module that holds it.

        Returns:
            The source, how to read it, and the module's path; None where no module shows it.
        """
        wanted = self.rows(x)
        best: tuple[tuple[int, int], GateSource, Layout, str] | None = None
        order: dict[nn.Module, int] = {}
        for call in self.calls:
            number = order.get(call.module, 0)
            order[call.module] = number + 1
            for source, tensor in _tensors(call, number, tick):
                layout = layout_of(tensor, self.seq)
                if layout is None or not tensor.is_floating_point():
                    continue
                rows = self.rows(tensor)
                rank = rows.shape[1], call.start
                if best is not None and best[0] <= rank:
                    continue
                columns = find_columns(wanted, rows)
                if columns is None:
                    continue
                whole = columns == slice(0, rows.shape[1])
                dtype = x.dtype if x.dtype != tensor.dtype else None
                read = Layout(layout.form, layout.axis, None if whole else columns, dtype)
                best = rank, source, read, call.path
        return None if best is None else best[1:]


def _tensors(call: ModuleCall, order: int, tick: int) -> Iterator[tuple[GateSource, Tensor]]:
    if call.end < tick:
        for index, tensor in enumerate(call.outputs):
            yield GateSource("output", call.module, index, order=order), tensor
    if call.start < tick:
        for index, tensor in enumerate(call.inputs):
            yield GateSource("input", call.module, index, order=order), tensor


def _is_stacked(module: nn.Module) -> bool:
    """Whether the module holds one matrix per expert."""
    if isinstance(module, nn.Conv1d):
        return False
    if any(isinstance(child, TernaryExperts) for child in module.children()):
        return True
    return any(p.dim() == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))


def _is_other_mixer(module: nn.Module) -> bool:
    names = dict(module.named_children()) | dict(module.named_buffers())
    return any(all(name in names for name in rule) for rule in _MIXER_ATTRIBUTES)
