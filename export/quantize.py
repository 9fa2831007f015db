"""`python -m export.quantize`: a checkpoint to a quantized ONNX bundle, without a plan."""

from __future__ import annotations

import functools

from nvembed_deploy.config import Precision

from . import trt

main = functools.partial(
    trt.main,
    name="quantize",
    plan=False,
    precisions=tuple(item for item in Precision if item.quantized),
    default=Precision.INT8,
)

if __name__ == "__main__":
    raise SystemExit(main())
