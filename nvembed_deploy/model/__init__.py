"""The reference model in PyTorch, and reading checkpoints. Running a bundle needs `config.py` and `family.py` only."""
