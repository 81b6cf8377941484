"""Ctrl-C at every line of a capture, forks beside one, captures inside one: nothing stays."""

from __future__ import annotations

import contextlib
import gc
import linecache
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import trilens
from hostile.scale import scaled
from tinymodels import build, prompt_ids
from trilens.errors import CaptureError
from trilens.lens.lens import Lens
from trilens.taps import hooks as taps_hooks
from trilens.taps.hooks import hooked
from trilens.taps.inputs import observe_inputs
from trilens.taps.kernels import KERNELS
from trilens.taps.registry import REGISTRY

TAPS = str(Path(trilens.__file__).parent / "taps")
WATCHED = (contextlib.__file__, torch.nn.modules.module.__file__, torch.utils.hooks.__file__)
# Between the last instruction of such a block and the release of its lock, CPython looks at no
# signal; a trace function sees a line there all the same.
LOCKS = (
    "with self.guard:",
    "with self._guard:",
    "with self._lock_of(",
    "with self._overrides.guard:",
)
REQUESTS: dict[str, dict[str, Any]] = {
    "llama": {"residual": "all", "attention": True, "gates": True},
    "mamba": {"residual": "last", "gates": True, "effective": True, "states": True},
}


class Interrupt:
    """Raises KeyboardInterrupt before the n-th line of ours, or counts the lines."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.lines = 0

    def __enter__(self) -> Interrupt:
        sys.settrace(self.call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def call(self, frame: FrameType, _event: str, _arg: object) -> Any:
        file = frame.f_code.co_filename
        ours = file.startswith(TAPS) or file in WATCHED
        return self.line if ours else None

    def line(self, frame: FrameType, event: str, _arg: object) -> Any:
        if event == "line":
            code = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if not code.startswith(LOCKS):
                self.lines += 1
                if self.lines == self.at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
        return self.line


def left_behind(model: torch.nn.Module) -> dict[str, Any]:
    return {
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "registry": dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        "attention watchers": len(REGISTRY._watchers),
        "kernel watchers": len(KERNELS._watchers),
        "overrides": (*REGISTRY._overrides.active, *KERNELS._overrides.active),
        "sets": len(taps_hooks._SETS),
        "modes": _get_current_function_mode_stack(),
        "training": [module.training for module in model.modules()],
    }


def bits(capture: Any) -> list[torch.Tensor]:
    return [tensor for _, tensor in capture._tensors()]


def interrupted(work: Callable[[], Any], at: int) -> BaseException | None:
    try:
        with Interrupt(at):
            work()
    except KeyboardInterrupt as interrupt:
        return interrupt
    return None


@pytest.mark.parametrize("model_type", REQUESTS)
def test_an_interrupt_at_any_line_leaves_the_model_as_it_was(model_type: str) -> None:
    model, ids = build(model_type), prompt_ids(model_type)
    lens, request = Lens(model), REQUESTS[model_type]
    tensor = ids.reshape(1, -1)
    with torch.no_grad():
        plain = model(tensor).logits
    clean, wanted = left_behind(model), bits(lens.capture(ids, **request))
    with Interrupt() as counter:
        lens.capture(ids, **request)
    points = range(1, counter.lines + 1)
    assert len(points) > 500
    gc.collect()
    gc.freeze()
    for at in sorted(
        random.Random(0).sample(points, scaled(full=min(len(points), 300), subset=40))
    ):
        # An interpreter that shows a traceback holds on to its frames, and to what they opened.
        shown = interrupted(lambda: lens.capture(ids, **request), at)
        assert shown is not None
        with torch.no_grad():
            assert torch.equal(model(tensor).logits, plain), f"line {at}"
        again = bits(lens.capture(ids, **request))
        assert all(map(torch.equal, again, wanted)), f"line {at}"
        assert left_behind(model)["hooks"] == 0, f"line {at}"
        del shown
        gc.collect()
        assert left_behind(model) == clean, f"line {at}"
    gc.unfreeze()
    other: list[Any] = []
    thread = threading.Thread(target=lambda: other.append(lens.capture(ids, **request)))
    thread.start()
    thread.join(60)
    assert other and all(map(torch.equal, bits(other[0]), wanted)), "a lock was left"


@pytest.mark.parametrize("model_type", REQUESTS)
def test_an_interrupted_generation_leaves_the_model_as_it_was(model_type: str) -> None:
    model, ids = build(model_type), prompt_ids(model_type, 6)
    lens, request = Lens(model), REQUESTS[model_type]
    config, tensor = model.generation_config, ids.reshape(1, -1)

    def work() -> Any:
        return lens.generate(ids, max_new_tokens=3, capture=request, temperature=1.0)

    wanted, clean = bits(work().capture), left_behind(model)
    state = torch.get_rng_state()
    with torch.no_grad():
        plain = model(tensor).logits
    with Interrupt() as counter:
        work()
    points = range(1, counter.lines + 1)
    gc.collect()
    gc.freeze()
    for at in sorted(random.Random(0).sample(points, scaled(full=150, subset=30))):
        shown = interrupted(work, at)
        assert shown is not None
        with torch.no_grad():
            assert torch.equal(model(tensor).logits, plain), f"line {at}"
        assert model.generation_config is config, f"line {at}"
        assert torch.equal(torch.get_rng_state(), state), f"line {at}"
        assert all(map(torch.equal, bits(work().capture), wanted)), f"line {at}"
        del shown
        gc.collect()
        assert left_behind(model) == clean, f"line {at}"
    gc.unfreeze()


def test_an_interrupted_probe_leaves_the_model_as_it_was() -> None:
    model, ids = build("llama"), prompt_ids("llama")
    clean, tensor = left_behind(model), ids.reshape(1, -1)
    with torch.no_grad():
        plain = model(tensor).logits
    with Interrupt() as counter:
        Lens(model)
    n_lines = counter.lines
    for at in sorted(random.Random(0).sample(range(1, n_lines + 1), scaled(full=120, subset=25))):
        assert interrupted(lambda: Lens(model), at) is not None
        with torch.no_grad():
            assert torch.equal(model(tensor).logits, plain), f"line {at}"
        Lens(model)
        assert left_behind(model) == clean, f"line {at}"


def test_a_signal_at_any_time_leaves_the_model_as_it_was() -> None:
    model, ids = build("llama"), prompt_ids("llama")
    lens, request = Lens(model), REQUESTS["llama"]
    clean, wanted = left_behind(model), bits(lens.capture(ids, **request))
    started = time.perf_counter()
    lens.capture(ids, **request)
    length = time.perf_counter() - started
    delays, hits = random.Random(0), 0
    # What other tests left would be finalized in between, and Python only prints what falls there.
    gc.collect()
    gc.freeze()
    watching, gc.callbacks[:] = gc.callbacks[:], []
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(scaled(full=1000, subset=40)):
            try:
                signal.setitimer(signal.ITIMER_REAL, delays.uniform(1e-5, length))
                lens.capture(ids, **request)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
            # torch's own `no_grad` may be stopped half way; that is not ours to undo.
            torch.set_grad_enabled(True)
            assert all(map(torch.equal, bits(lens.capture(ids, **request)), wanted))
            assert left_behind(model) == clean
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.callbacks[:] = watching
        gc.unfreeze()
    assert hits > scaled(full=250, subset=10)


def test_a_hook_that_stays_is_dead_and_the_next_set_sweeps_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    calls: list[int] = []
    manager = hooked(model)
    hooks = manager.__enter__()
    hooks.before(model[0], lambda *_: calls.append(1))
    hooks.after(model[0], lambda *_: calls.append(2))
    model(torch.zeros(1, 2))
    assert calls == [1, 2]
    hooks.closed = True  # as where a second interrupt ends the removal
    model(torch.zeros(1, 2))
    assert calls == [1, 2]
    with hooked(torch.nn.Linear(1, 1)):
        assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    manager.__exit__(None, None, None)


def test_an_edit_whose_block_was_left_open_edits_nothing() -> None:
    model, ids = build("llama"), prompt_ids("llama").reshape(1, -1)
    lens = Lens(model)
    with torch.no_grad():
        plain, inner = model(ids).logits, model.model(ids).last_hidden_state

    def left() -> Any:
        # Held by the caller, as the frames of a traceback that is shown are.
        manager = hooked(model)
        hooks = manager.__enter__()
        hooks.after(model.model.layers[1], lambda _m, _a, out: out * 2)
        return manager

    for run, wanted in (
        (lambda: model(ids).logits, plain),
        (lambda: model.model(ids).last_hidden_state, inner),
    ):
        held = left()
        with torch.no_grad():
            assert torch.equal(run(), wanted)
        assert left_behind(model)["hooks"] == 0
        held.__exit__(None, None, None)
    assert torch.equal(lens.capture(ids).logits, plain[0])


@pytest.mark.parametrize("inner", ["capture", "inner model", "probe"])
def test_a_capture_inside_a_capture_of_the_model_says_so(inner: str) -> None:
    model, ids = build("llama"), prompt_ids("llama")
    lens, other = Lens(model), Lens(model.model)
    wanted, clean = bits(lens.capture(ids)), left_behind(model)
    again = {
        "capture": lambda: lens.capture(ids),
        "inner model": lambda: other.capture(ids),
        "probe": lambda: Lens(model),
    }[inner]

    def inside(*_: object) -> None:
        again()

    handle = model.model.layers[1].mlp.register_forward_pre_hook(inside)
    with pytest.raises(CaptureError, match=r"LlamaForCausalLM.*inside another of the same model|"
                       r"LlamaModel.*inside another of the same model"):  # fmt: skip
        lens.capture(ids)
    handle.remove()
    assert left_behind(model) == clean
    assert all(map(torch.equal, bits(lens.capture(ids)), wanted))


def test_a_capture_of_another_model_inside_a_capture_is_one_like_any() -> None:
    model, ids = build("llama"), prompt_ids("llama")
    lens, other = Lens(model), Lens(build("llama"))
    wanted, found = bits(other.capture(ids)), []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(
        lambda *_: found.append(bits(other.capture(ids)))
    )
    lens.capture(ids)
    handle.remove()
    assert len(found) == 1 and all(map(torch.equal, found[0], wanted))


def test_inputs_are_observed_under_the_same_rule() -> None:
    model, ids = build("llama"), prompt_ids("llama")
    lens = Lens(model)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CaptureError, match="inside another of the same model"):
        observe_inputs(
            model,
            {name: model.get_parameter(name).shape[1]},
            [ids.reshape(-1)],
            lambda *_: lens.capture(ids),
        )
    assert left_behind(model)["hooks"] == 0


def test_a_fork_beside_a_capture_captures() -> None:
    """Eight children, each forked while another thread stands in the middle of a capture."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
    model, ids = build("llama"), prompt_ids("llama")
    lens, request = Lens(model), REQUESTS["llama"]
    wanted, clean = bits(lens.capture(ids, **request)), left_behind(model)
    reached, resume = threading.Event(), threading.Event()
    worker = threading.get_ident()

    def wait(*_: object) -> None:
        if threading.get_ident() != worker:
            reached.set()
            resume.wait(60)

    def capture_again() -> int:
        same = all(map(torch.equal, bits(lens.capture(ids, **request)), wanted))
        return 0 if same and left_behind(model) == expected else 1

    try:
        for child in range(scaled(full=64, subset=8)):
            reached.clear()
            resume.clear()
            handle = model.model.layers[child % 2].mlp.register_forward_pre_hook(wait)
            expected = {**clean, "hooks": 1}
            other = threading.Thread(target=lens.capture, args=(ids,), kwargs=request)
            other.start()
            assert reached.wait(60)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
                pid = os.fork()
            if pid == 0:
                code = 3
                try:
                    code = capture_again()
                finally:
                    os._exit(code)
            deadline = time.monotonic() + 60
            while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
            if done[0] == 0:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            resume.set()
            other.join(60)
            handle.remove()
            assert done[0] == pid, "the child hangs"
            assert os.waitstatus_to_exitcode(done[1]) == 0
            assert left_behind(model) == clean
    finally:
        resume.set()
        torch.set_num_threads(threads)
