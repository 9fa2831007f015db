"""Parity: how much two embedders differ on real text, and whether the difference is within tolerance."""
