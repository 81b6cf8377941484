"""Benchmarks: scripts with their last results beside them."""
