"""Exports a checkpoint for CPUs and embeds with it: `python examples/export_checkpoint.py CHECKPOINT BUNDLE`.

CHECKPOINT is a folder in NV-Embed's published layout, or that of a relative, such as models/nv-embed-mini.
"""

import sys

import numpy as np

from nvembed_deploy import Encoder
from nvembed_deploy.engines.show import main as show
from nvembed_deploy.export.trt import main as export

checkpoint, bundle = sys.argv[1:]

# What is read from which file: mask, pooling, prompts, special tokens. What no file states is refused.
if show([checkpoint]):
    sys.exit(1)

# The graph is compared with PyTorch; if it differs, nothing is written. Without --onnx-only, a TensorRT plan is built.
if export(["--model", checkpoint, "--precision", "fp16", "--onnx-only", "--out", bundle]):
    sys.exit(1)

encoder = Encoder(bundle, device="cpu")
vectors = encoder.encode_query(["why do cats purr?", "how long does an egg boil?"])
print(encoder.backend, vectors.shape, np.linalg.norm(vectors, axis=1).round(3))
