"""Comparing a running server's vectors with the reference vectors of a bundle: are they of the same space?

The bundle's probes are the canaries: short texts that it holds the reference model's vectors for. They are sent to
`/v1/embeddings`, which most servers have. Probes with an instruction are sent only to a server of this project, and
those with special-token strings to none, because other servers interpret such strings.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.errors import ConfigError, ParityError
from nvembed_deploy.parity.compare import TOLERANCES, make_report, vector_differences
from nvembed_deploy.parity.probes import MIN_PROBES, PROBES, ReferenceOutputs
from nvembed_deploy.spec import Precision
from nvembed_deploy.tokenization import DEFAULT_QUERY_INSTRUCTION, TextEncoder

SECONDS = 120
"""Time limit of one request."""


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A text whose reference vector is known."""

    index: int
    """Index of the vector in the reference outputs."""
    text: str
    is_instructed: bool


class ServerClient:
    """Requests to a server with OpenAI's embeddings interface.

    Args:
        url: The server's address, with or without `/v1`.
        model: Name of the model in requests; None for the first one that the server lists.
        precision: Precision of the server's engine; None for what the server says about it.
        api_key: Sent as `Authorization: Bearer`; None for no key.

    Raises:
        ConfigError: The server cannot be reached, or lists no model.
    """

    def __init__(
        self, url: str, *, model: str | None = None, precision: Precision | None = None, api_key: str | None = None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is not the address of a server; pass one such as http://127.0.0.1:8080")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.facts = self._facts()
        self.precision = precision or self._stated_precision()
        self.model = model or self._first_model()

    @property
    def is_ours(self) -> bool:
        """Whether the server is one of this project, which takes an instruction."""
        return "manifest_sha256" in self.facts

    def embed(self, texts: list[str], instruction: str | None = None) -> NDArray[np.float64]:
        """Returns the server's vectors, float64 [N, D].

        Raises:
            ConfigError: The server refuses the texts, or answers something else.
        """
        body: dict[str, Any] = {"model": self.model, "input": texts, "encoding_format": "float"}
        if instruction is not None:
            body["instruction"] = instruction
        answer = self._json("/v1/embeddings", body)
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], dtype=np.float64)
            if vectors.ndim != 2 or len(vectors) != len(texts):
                raise ValueError(f"vectors of shape {vectors.shape} for {len(texts)} texts")
        except (KeyError, TypeError, ValueError) as err:
            raise ConfigError(f"{self.url}/v1/embeddings does not answer as OpenAI's interface does ({err})") from err
        return vectors

    def _facts(self) -> dict[str, Any]:
        try:
            facts = self._json("/info")
        except ConfigError:
            return {}  # a server of another kind
        return facts if isinstance(facts, dict) else {}

    def _stated_precision(self) -> Precision | None:
        """Returns the precision of the server's engine, if it says it as this project or text-embeddings-inference."""
        names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
        server_precision = str(self.facts.get("precision") or self.facts.get("model_dtype"))
        try:
            return Precision(names.get(server_precision, server_precision))
        except ValueError:
            return None

    def _first_model(self) -> str:
        models = self._json("/v1/models")
        try:
            return str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as err:
            raise ConfigError(f"{self.url}/v1/models lists no model; pass its name with --server-model") from err

    def _json(self, path: str, body: object = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as err:
            detail = err.read(500).decode("utf-8", "replace")
            raise ConfigError(f"{self.url}{path} answered with status {err.code}: {detail}") from err
        except (OSError, ValueError) as err:
            reason = getattr(err, "reason", err)
            raise ConfigError(f"{self.url}{path} cannot be read ({reason}); check the address") from err


def canaries(reference: ReferenceOutputs, text: TextEncoder, *, with_instruction: bool) -> list[Canary]:
    """Returns the probes that can be sent as text.

    Args:
        reference: The bundle's reference outputs.
        text: The bundle's text encoder.
        with_instruction: Whether the server takes an instruction.

    Raises:
        ParityError: There are too few for a comparison.
    """
    indices = {(row.prompt_tokens, *row.ids): index for index, row in enumerate(reference.rows)}
    max_length = min(max(map(len, reference.rows)), text.contract.max_tokens)
    prompts = {False: text.prompt(None, None), True: text.query_prompt(DEFAULT_QUERY_INSTRUCTION)}
    sendable = []
    for is_instructed, body in PROBES:
        row = text.tokenize([body], prompt=prompts[is_instructed], max_length=max_length)[0]
        index = indices.get((row.prompt_tokens, *row.ids))
        can_be_sent = not text.has_special_strings(body) and (with_instruction or not is_instructed)
        if index is not None and not row.truncated and can_be_sent:
            sendable.append(Canary(index=index, text=body, is_instructed=is_instructed))
    if len(sendable) < MIN_PROBES:
        raise ParityError(
            f"only {len(sendable)} of the bundle's reference texts can be sent to a server, and a comparison needs "
            f"{MIN_PROBES}; export it for longer texts with --max"
        )
    return sendable


def compare_server(
    server: ServerClient, reference: ReferenceOutputs, text: TextEncoder, *, precision: Precision
) -> ParityReport:
    """Compares a server's vectors with the reference's, within the bounds of the coarser precision of both sides.

    Args:
        server: The server.
        reference: The bundle's reference outputs.
        text: The bundle's text encoder.
        precision: The bundle's precision.

    Raises:
        ConfigError: The server refuses a text.
        ParityError: The vectors have another dimension, or there are too few texts for a comparison.
    """
    takes_instruction = server.is_ours and bool(text.contract.instruction_template)
    sent = canaries(reference, text, with_instruction=takes_instruction)
    compared = reference.selected([canary.index for canary in sent])
    instructions = [DEFAULT_QUERY_INSTRUCTION if canary.is_instructed else None for canary in sent]
    alone = np.concatenate(
        [server.embed([canary.text], instruction) for canary, instruction in zip(sent, instructions, strict=True)]
    )
    batched = np.empty_like(alone)
    for instruction in set(instructions):
        indices = [index for index, of_text in enumerate(instructions) if of_text == instruction]
        batched[indices] = server.embed([sent[index].text for index in indices], instruction)
    differences = vector_differences(compared, batched, alone, candidate=server.url, overlap=None)
    coarser = min(precision, server.precision or precision, key=lambda candidate: TOLERANCES[candidate].min_cosine)
    return make_report(differences, reference=reference.reference, candidate=server.url, precision=coarser)
