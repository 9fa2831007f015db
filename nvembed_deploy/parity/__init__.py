"""Parity: how far two embedders are apart on real text, and whether that passes."""
