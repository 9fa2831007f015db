"""Benchmarks behind the figures in the README, and their records. Not part of the library."""
