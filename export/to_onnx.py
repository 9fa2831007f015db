"""`python -m export.to_onnx`: the same as `export.trt` without a plan, for ONNX Runtime or for building elsewhere."""

from __future__ import annotations

import functools

from . import trt

main = functools.partial(trt.main, name="to_onnx", plan=False)

if __name__ == "__main__":
    raise SystemExit(main())
