"""`Encoder`, and what it is made of: the opened bundle, windows of texts, batches of rows."""

from nvembed_deploy.encoder.encoder import EncodeOptions, Encoder

__all__ = ["EncodeOptions", "Encoder"]
