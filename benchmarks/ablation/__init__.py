"""Measures the effect of each part of the recipe; see `python -m benchmarks.ablation --help`."""
