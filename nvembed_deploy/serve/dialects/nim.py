"""The fields that NVIDIA's NeMo Retriever embedding NIM adds to OpenAI's body, and its descriptions of the server.

Source: the NIM's API reference, versions 1.7 and 2.0.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import SkipValidation

from nvembed_deploy.bundle.manifest import Manifest
from nvembed_deploy.serve.requests import Body, RequestError
from nvembed_deploy.version import __version__

VectorType = Literal["float", "int8", "uint8", "binary", "ubinary"]
"""Number formats of vectors, under the names of hosted interfaces."""


class NimFields(Body):
    """`input_type`, `truncate`, `modality` and `embedding_type`."""

    input_type: Literal["query", "passage", "document"] | None = None
    """Side of the texts, whose prompt is used. `document` is Voyage's word for `passage`."""
    truncate: bool | Literal["NONE", "START", "END"] | None = None
    """What happens to texts that are too long; true and false are this server's words for `END` and `NONE`."""
    modality: SkipValidation[Literal["text"] | list[Literal["text"]] | None] = None
    """Checked by `check_modality`, because pydantic would report an error for each of a million invalid elements."""
    embedding_type: VectorType | None = None


def check_modality(modality: object) -> None:
    """Refuses everything but texts.

    Raises:
        RequestError: It is neither `text` nor a list of it.
    """
    modalities = modality if isinstance(modality, list) else [modality]
    if modality is not None and any(element != "text" for element in modalities):
        raise RequestError(400, "'modality' is invalid: send 'text' or a list of it", param="modality")


def health(message: Literal["ready", "live"], *, healthy: bool) -> dict[str, Any]:
    """Returns the body of `/v1/health/ready` and `/v1/health/live`."""
    return {"object": "health.response", "message": message if healthy else f"not {message}", message: healthy}


def metadata(name: str, manifest: Manifest, facts: dict[str, Any]) -> dict[str, Any]:
    """Returns the body of `/v1/metadata`: the NIM's fields, and this server's facts about the bundle."""
    model = {"shortName": name, "modelUrl": "", "modelName": manifest.source.name}
    return {
        "version": __version__,
        "assetInfo": [],
        "licenseInfo": {},
        "modelInfo": [model],
        "repository_override": "",
        **facts,
    }
