"""`python -m export.to_onnx`: the same command as `nvembed export --onnx-only`."""

from __future__ import annotations

import functools

from nvembed_deploy.export import trt

main = functools.partial(trt.main, onnx_only=True)

if __name__ == "__main__":
    from nvembed_deploy.export.to_onnx import main

    raise SystemExit(main(prog="python -m export.to_onnx"))
