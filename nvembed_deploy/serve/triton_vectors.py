"""Last model of a Triton repository written by `export.triton --output-dtype`: converts vectors to a smaller format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvembed_deploy.vectors import OutputDtype, convert

FLOATS, CONVERTED = "embedding", "converted"
"""Names of its input, FP32 [B, D], and of its output."""
SETTINGS = "vectors.json"


class TritonPythonModel:
    """Model for Triton's Python backend, which calls `initialize` once and `execute` with the queued requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the format and the step of int8 in the folder of `model.py`.

        Args:
            args: Triton's arguments; `model_repository` and `model_version` give the folder.
        """
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        self.dtype = OutputDtype(settings["output_dtype"])
        self.int8_step: float | None = settings["int8_step"]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Returns one response per request."""
        import triton_python_backend_utils as backend  # exists only inside Triton

        answers = []
        for request in requests:
            vectors = backend.get_input_tensor_by_name(request, FLOATS).as_numpy()
            converted = convert(vectors, self.dtype, int8_step=self.int8_step)
            answers.append(backend.InferenceResponse(output_tensors=[backend.Tensor(CONVERTED, converted)]))
        return answers
