"""trilens opens a language model: the residual stream, the attention, the gates.

import trilens

lens = trilens.Lens.from_pretrained("path/or/hub-id")
cap = lens.capture("The capital of France is", attention=True, gates=True)
cap.attention.top_attended_positions(layer=3, from_position=-1, k=5)
"""

from __future__ import annotations

from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.run import CompareOptions, compare
from trilens.caches.activation import ActivationCache, FullActivationCache
from trilens.caches.attention import AttentionCache
from trilens.caches.gates import GateCache, GateSpec
from trilens.caches.states import StateCache, StateSpec
from trilens.checkpoint import TernaryPlan, ternarize, validate
from trilens.errors import TrilensError
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.statistics.gating import GatingAccumulator, GatingAnalysis
from trilens.ternary.quantize import PerLayerQuant
from trilens.version import __version__

__all__ = [
    "ActivationCache",
    "AttentionCache",
    "Capture",
    "CompareOptions",
    "Comparison",
    "FullActivationCache",
    "GateCache",
    "GateSpec",
    "GatingAccumulator",
    "GatingAnalysis",
    "Lens",
    "PerLayerQuant",
    "StateCache",
    "StateSpec",
    "TernaryPlan",
    "TrilensError",
    "__version__",
    "compare",
    "ternarize",
    "validate",
]
