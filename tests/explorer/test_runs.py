"""Runs: one at a time and in order, cancelled, limited in time and number; errors by name."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from trilens.errors import BusyError, EditError
from trilens.explorer.runs import Run, Runs
from trilens.progress import Step


async def events_of(run: Run) -> list:
    found = []
    while (event := await asyncio.wait_for(run.events.get(), 10)) is not None:
        found.append(event)
    return found


def endless(run: Run) -> dict:
    while True:
        run.check()
        time.sleep(0.001)


def in_loop(work, **options):
    async def main():
        runs = Runs(**{"seconds": 10, **options})
        try:
            return await work(runs)
        finally:
            await asyncio.to_thread(runs.close)

    return asyncio.run(main())


def test_one_at_a_time_in_their_order() -> None:
    active, seen = [], []

    def work(number: int):
        def go(run: Run) -> dict:
            active.append(number)
            assert len(active) == 1
            time.sleep(0.01)
            seen.append(active.pop())
            return {"number": number}

        return go

    async def main(runs: Runs):
        return [await events_of(each) for each in [runs.start(work(i)) for i in range(4)]]

    found = in_loop(main)
    assert seen == [0, 1, 2, 3]
    assert [each[-1] for each in found] == [{"number": i} for i in range(4)]
    # Those in line hear how many are before them, until it is their turn.
    assert found[3][:-1] == [{"waiting": 3}, {"waiting": 2}, {"waiting": 1}]


def test_a_run_that_is_cancelled_ends_at_its_next_step_and_the_next_goes_on() -> None:
    async def main(runs: Runs):
        first, waiting, last = runs.start(endless), runs.start(endless), runs.start(lambda _: {})
        runs.cancel(waiting)
        assert [each for each in await events_of(waiting) if "waiting" not in each] == []
        runs.cancel(first)
        assert (await events_of(first))[-1]["error"] == "RunCancelledError"
        return await events_of(last)

    assert in_loop(main)[-1] == {}


def test_a_run_that_takes_too_long_ends() -> None:
    async def main(runs: Runs):
        return await events_of(runs.start(endless))

    (event,) = in_loop(main, seconds=0.05)
    assert event["error"] == "TimeLimitError" and "0.05 s" in event["message"]


def test_too_many_are_refused() -> None:
    async def main(runs: Runs):
        for _ in range(3):
            runs.start(endless)
        with pytest.raises(BusyError, match="2 runs wait"):
            runs.start(endless)

    in_loop(main, waiting=2)


@pytest.mark.parametrize(
    "error",
    [EditError("edit \x1b[31m is wrong"), ZeroDivisionError("x"), MemoryError(), KeyError()],
)
def test_a_run_that_crashes_says_its_error_and_the_next_runs(error: Exception) -> None:
    def crash(run: Run) -> dict:
        raise error

    async def main(runs: Runs):
        return await events_of(runs.start(crash)), await events_of(runs.start(lambda _: {"a": 1}))

    crashed, after = in_loop(main)
    assert crashed[0]["error"] == type(error).__name__
    assert crashed[0]["message"] and "\x1b" not in crashed[0]["message"]
    assert after[-1] == {"a": 1}


def test_steps_are_told_some_of_them() -> None:
    def work(run: Run) -> dict:
        for i in range(10_000):
            run.step(Step(i, 10_000, "layer\n1"))
        return {}

    async def main(runs: Runs):
        return await events_of(runs.start(work))

    found = in_loop(main)
    assert found[0] == {"done": 0, "total": 10_000, "what": "layer\\n1"}
    assert len(found) < 200


def test_closing_ends_what_runs() -> None:
    async def main(runs: Runs):
        runs.start(endless)
        runs.start(endless)
        await asyncio.to_thread(runs.close)
        return [each.name for each in threading.enumerate()]

    assert not [name for name in in_loop(main) if name.startswith("trilens-run")]
