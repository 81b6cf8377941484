"""Ternary checkpoints: made, checked, and read by transformers once this package is imported."""

from trilens.checkpoint.calibration import Calibration
from trilens.checkpoint.evaluate import Sample
from trilens.checkpoint.format.damage import Damage
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.format.report import SampleReport, TensorReport, TernaryReport
from trilens.checkpoint.integration import TrilensConfig
from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.validation import validate

__all__ = [
    "Calibration",
    "Damage",
    "Sample",
    "SampleReport",
    "TensorReport",
    "TernaryPlan",
    "TernaryReport",
    "TrilensConfig",
    "ternarize",
    "validate",
]
