"""MTEB parity: scores a bundle and its PyTorch model on the same tasks and compares the scores."""
