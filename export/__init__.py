"""The build side: checkpoint to ONNX to plan to bundle, with a parity gate at each hop. Needs the extra `export`."""

try:
    import nvembed_deploy  # noqa: F401 - first of all: without its packages nothing here can even print its help
except ImportError as err:
    raise SystemExit(
        f"error: {err.name} is not installed for this Python; run `make engine` once and then .venv/bin/python -m "
        "export.trt, or pip install 'nvembed-deploy[export,cpu,rtx]'"
    ) from None
