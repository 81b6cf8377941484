"""Requests to end leave nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import torch

from rwkv7_published import published_tensors

# Asks itself to end as the first file is flushed. What was started by nohup would not listen.
ENDS = """
import os, signal, sys
signal.signal({number}, signal.default_int_handler if {number} == 2 else signal.SIG_DFL)
real = os.fsync
def fsync(file):
    os.kill(os.getpid(), {number})
    return real(file)
os.fsync = fsync
from trilens.cli.main import main
main(sys.argv[1:])
"""


def test_term_and_hup_clean_up_as_an_interrupt_does(tmp_path: Path) -> None:
    torch.save(published_tensors(1, 64, 32), tmp_path / "published.pth")
    runs = {}
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        code = ENDS.format(number=int(number))
        out = tmp_path / number.name / "out"
        command = [sys.executable, "-c", code, "convert", tmp_path / "published.pth", "-o", out]
        runs[number] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for number, run in runs.items():
        _, errors = run.communicate()
        assert run.returncode == 128 + number, errors
        assert "Traceback" not in errors
        assert not list((tmp_path / number.name).iterdir())
