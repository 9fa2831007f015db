"""What runs a batch: one file a backend behind the protocol in `base.py`."""
