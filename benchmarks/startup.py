"""How long a start takes, as multiples of a bare `import torch` in the same round.

Each is a fresh interpreter; the files are in the page cache after a round that is not counted.
transformers and TransformerLens, where it is installed (`pip install trilens[bench]`), start in
turn with trilens.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

from benchmarks.common import ratios, save

ROUNDS = 5
TARGETS = {
    "trilens --version": 0.4,
    "trilens --help": 0.4,
    "import trilens": 0.4,
    "from trilens.caches import *": 1.3,
}
PROGRAMS = (
    "import torch",
    "import trilens",
    "from trilens.caches import *",
    "from trilens import Lens",
    "trilens --version",
    "trilens --help",
    "import transformers",
    "from transformers import AutoModelForCausalLM",
)


def command(program: str) -> list[str]:
    if program.startswith("trilens "):
        return [sys.executable, "-m", *program.split()]
    return [sys.executable, "-c", program]


def start(program: str) -> Any:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    arguments = command(program)
    return lambda: subprocess.run(arguments, check=True, capture_output=True, env=environment)


def main() -> None:
    peer = ["import transformer_lens"] if find_spec("transformer_lens") else []
    found = ratios({program: start(program) for program in (*PROGRAMS, *peer)}, ROUNDS)
    for program, target in TARGETS.items():
        found[program]["target"] = target
    save("startup", {"rounds": ROUNDS, "against_import_torch": found})


if __name__ == "__main__":
    main()
