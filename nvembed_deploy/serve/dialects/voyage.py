"""The fields that Voyage AI's clients add to OpenAI's body. Source: Voyage's API reference and its Python client."""

from __future__ import annotations

from nvembed_deploy.serve.dialects.nim import VectorType
from nvembed_deploy.serve.requests import Body


class VoyageFields(Body):
    """`truncation`, `output_dimension` and `output_dtype`; its `input_type` is NVIDIA's with another word."""

    truncation: bool | None = None
    output_dimension: int | None = None
    output_dtype: VectorType | None = None
