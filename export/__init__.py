"""Export of a checkpoint to a bundle, with a parity gate after each step. Needs the extra `export`."""

if __name__ == "export":  # the door `python -m export.trt`, in a Python that may have no packages
    try:
        import numpy  # noqa: F401
        import tokenizers  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as err:
        raise SystemExit(
            f"error: {err.name} is not installed for this Python; run `make engine` once and then .venv/bin/python -m "
            "export.trt"
        ) from None
