"""Which causal-LM types calibration can run block by block: tiny models, the proof of each.

PYTHONPATH=src:tests python -m benchmarks.calibrated_families
"""

from __future__ import annotations

from tinymodels import TYPES, build
from trilens.checkpoint.calibration.blocks import BlockRunner
from trilens.errors import TrilensError
from trilens.lens.proof import prove
from trilens.models.stacks import only_stack


def main() -> None:
    """Print each type that is refused and why, then how many are not."""
    proven = 0
    for model_type in TYPES:
        try:
            model = build(model_type)
            BlockRunner(model, prove(model, only_stack(model)).anatomy)
        except TrilensError as error:
            print(f"{model_type}: {error}")
        else:
            proven += 1
    print(f"{proven} of {len(TYPES)} types run block by block")


if __name__ == "__main__":
    main()
