"""The same tasks through PyTorch and through a bundle: how many points does the engine cost?"""
