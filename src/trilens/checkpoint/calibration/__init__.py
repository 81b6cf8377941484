"""Coding a checkpoint with the help of a text, block by block, and measuring the damage."""

from trilens.checkpoint.calibration.options import Calibration

__all__ = ["Calibration"]
