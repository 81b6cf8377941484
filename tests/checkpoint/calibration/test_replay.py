"""Parts of a block whose output is known: they do not run again, and nothing shows of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilens.checkpoint.calibration.replay import Carrier, Replay, Spool, find_carriers
from trilens.checkpoint.calibration.streams import Batch


class Attention(nn.Module):
    """Gives its last matrix's output, and leaves what it saw where it is told to."""

    def __init__(self, *, scaled: bool = False) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scaled, self.runs = scaled, 0

    def forward(self, x: Tensor, states: dict[str, Tensor] | None = None) -> tuple[Tensor, None]:
        self.runs += 1
        if states is not None:
            states["seen"] = x
        found = self.o(torch.tanh(self.q(x)))
        return (2 * found if self.scaled else found), None


class Block(nn.Module):
    """An attention and a matrix, each added to the stream."""

    def __init__(self, *, scaled: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(scaled=scaled), nn.Sequential(nn.Linear(8, 8))
        self.states: dict[str, Tensor] | None = {} if shared else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, self.states)[0]
        return x + self.mlp(x)


PATHS = ("attention.q", "attention.o", "mlp.0")


def carriers_of(block: Block) -> dict[str, Carrier]:
    x = torch.randn(2, 3, 8)
    return find_carriers(block, PATHS, lambda: block(x))


def test_what_gives_a_matrix_s_output_alone_is_found() -> None:
    found = carriers_of(Block())
    assert found == {
        "attention.o": Carrier("attention", 2, 0),
        "mlp.0": Carrier("mlp", None, 0),
    }
    # What it scales is not its matrix's output; where it can leave something, it has to run.
    for other in (Block(scaled=True), Block(shared=True)):
        assert carriers_of(other).keys() == {"mlp.0"}


def test_a_block_that_gives_another_output_without_its_parts_is_not_replayed() -> None:
    class Counting(Block):
        def forward(self, x: Tensor) -> Tensor:
            before = self.attention.runs
            return super().forward(x) + (self.attention.runs - before)

    assert carriers_of(Counting()) == {}


def test_a_replayed_part_does_not_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = Block()
    replay = Replay(block, carriers_of(block), tmp_path)
    batches = [Batch(torch.zeros(2, 3, dtype=torch.long), start) for start in (0, 6)]
    inputs = [torch.randn(2, 3, 8) for _ in batches]
    with torch.no_grad():
        for batch, x in zip(batches, inputs, strict=True):
            replay.keep("attention.o", batch, block.attention(x)[0])
        wanted = [block(x) for x in inputs]
        runs = block.attention.runs
        with replay.on(batches[0]):  # not before it is told to
            block(inputs[0])
        assert block.attention.runs == runs + 1
        replay.start("attention.o")
        replay.start("mlp.0")  # nothing was kept of it
        assert replay.ready == {"attention.o"}
        for batch, x, expected in zip(batches, inputs, wanted, strict=True):
            with replay.on(batch):
                assert torch.equal(block(x), expected)
        assert block.attention.runs == runs + 1
        with replay.on(batches[0], ["attention.q"]):  # what is watched in it needs it to run
            block(inputs[0])
        with replay.on(Batch(batches[0].ids, 12)):  # a batch that was not kept
            block(inputs[0])
        assert block.attention.runs == runs + 3
        with pytest.raises(ZeroDivisionError), replay.on(batches[0]):
            1 / 0
    assert all("forward" not in vars(module) for module in block.modules())
    replay.close()
    assert not replay.ready and not list(tmp_path.iterdir())


def test_a_spool_gives_back_what_it_was_given(tmp_path: Path, monkeypatch: Any) -> None:
    """The first bytes in memory, the rest in a file that has no name."""
    monkeypatch.setattr("trilens.checkpoint.calibration.replay._IN_MEMORY", 100)
    spool = Spool(tmp_path)
    tensors = {n: torch.randn(3, n + 1) for n in range(5)}
    for key, values in tensors.items():
        spool.put(key, values)
    spool.put("part", torch.arange(12.0).reshape(3, 4)[:, 1:3])
    assert 4 in spool and "none" not in spool
    assert all(torch.equal(spool.get(key), values) for key, values in tensors.items())
    assert spool.get("part").tolist() == [[1, 2], [5, 6], [9, 10]]
    assert not list(tmp_path.iterdir())
    spool.close()
