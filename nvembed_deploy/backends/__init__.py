"""Backends that run token batches, one module for each, behind the protocol in `base.py`."""
