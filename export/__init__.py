"""Export of a checkpoint to a bundle, with a parity gate after each step. Needs the extra `export`."""

try:
    import nvembed_deploy  # noqa: F401 - without its dependencies, no module here can even print its help
except ImportError as err:
    raise SystemExit(
        f"error: {err.name} is not installed for this Python; run `make engine` once and then .venv/bin/python -m "
        "export.trt, or pip install 'nvembed-deploy[export,cpu,rtx]'"
    ) from None
