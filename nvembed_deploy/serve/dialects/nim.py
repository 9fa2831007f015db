"""The fields that NVIDIA's NeMo Retriever embedding NIM adds to OpenAI's body, and its descriptions of the server.

Source: the NIM's API reference, versions 1.7 and 2.0.
"""

from __future__ import annotations

from typing import Any, Literal

from nvembed_deploy.bundle.manifest import Manifest
from nvembed_deploy.serve.requests import Body
from nvembed_deploy.version import __version__

VectorType = Literal["float", "int8", "uint8", "binary", "ubinary"]
"""Number formats of vectors, under the names of hosted interfaces."""


class NimFields(Body):
    """`input_type`, `truncate`, `modality` and `embedding_type`."""

    input_type: Literal["query", "passage", "document"] | None = None
    """Side of the texts, whose prompt is used. `document` is Voyage's word for `passage`."""
    truncate: bool | Literal["NONE", "START", "END"] | None = None
    """What happens to texts that are too long; true and false are this server's words for `END` and `NONE`."""
    modality: Literal["text"] | list[Literal["text"]] | None = None
    embedding_type: VectorType | None = None


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
