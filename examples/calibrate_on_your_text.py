"""Quantizes a model on your own texts: `python examples/calibrate_on_your_text.py CHECKPOINT TEXTS.jsonl BUNDLE`.

TEXTS.jsonl has one {"text": ...} per line, with "instruction" for queries. Ranges of INT8 are fitted to these texts, so
take what will be embedded: short and long, questions and passages.
"""

import json
import sys
from pathlib import Path

from nvembed_deploy import Encoder
from nvembed_deploy.export.trt import main as export

checkpoint, texts, bundle = sys.argv[1:]
flags = ["--model", checkpoint, "--precision", "int8", "--onnx-only", "--out", bundle]
if export([*flags, "--calibration", texts, "--calibration-tokens", "4096"]):
    sys.exit(1)  # the comparison with PyTorch has refused it, or a file is wrong; the message says which

parity = json.loads(Path(bundle, "manifest.json").read_text())["parity"]
print("lowest cosine to PyTorch:", min(hop["min_cosine"] for hop in parity))
print(Encoder(bundle, device="cpu").encode("why do cats purr?").shape)
