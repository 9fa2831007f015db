"""The tokenizer of a Triton repository, which `export.triton` writes: texts to padded ids and masks.

Triton gives whatever requests wait together; their rows are padded to one of a few lengths, so that the engine behind
finds requests of one shape and puts them together again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_deploy.errors import DeployError, InputError
from nvembed_deploy.files.records import from_json
from nvembed_deploy.tokenization import TextContract, TextEncoder, TokenBatch, TokenRow, check_pooled, check_texts

INPUTS = ("input_ids", "attention_mask", "pool_mask")


class TritonPythonModel:
    """What Triton's Python backend calls: `initialize` once, then `execute` with what is in the queue."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the files beside `model.py`.

        Args:
            args: Triton's; `model_repository` and `model_version` say where the files are.
        """
        folder = Path(args["model_repository"]) / args["model_version"]
        record = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
        contract = from_json(TextContract, record["text"])
        self.buckets: list[int] = record["buckets"]
        self.text = TextEncoder((folder / "tokenizer.json").read_bytes(), contract)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One answer for each request; a request that cannot be embedded gets its error, and no other does."""
        import triton_python_backend_utils as backend  # there is one inside Triton only

        rows: list[list[TokenRow] | DeployError] = []
        for request in requests:
            try:
                texts, instructions = (
                    [
                        item.decode("utf-8")
                        for item in backend.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)
                    ]
                    for name in ("text", "instruction")
                )
                rows.append(self._rows(texts, instructions))
            except UnicodeDecodeError as err:
                rows.append(InputError(f"a text is not UTF-8 ({err.reason} at byte {err.start}); encode it as UTF-8"))
            except DeployError as err:
                rows.append(err)
        answers = []
        for found in rows:
            if isinstance(found, DeployError):
                answers.append(backend.InferenceResponse(error=backend.TritonError(str(found))))
                continue
            tensors = [backend.Tensor(name, part) for name, part in zip(INPUTS, self._padded(found), strict=True)]
            answers.append(backend.InferenceResponse(output_tensors=tensors))
        return answers

    def _rows(self, texts: list[str], instructions: list[str]) -> list[TokenRow]:
        found = []
        limit = min(self.buckets[-1], self.text.contract.max_tokens)
        for text, instruction in zip(check_texts(texts), instructions, strict=True):
            prompt = self.text.prompt(instruction or None, None)
            found += self.text.tokenize([text], prompt=prompt, max_length=limit)
        check_pooled(found, max_length=limit)
        return found

    def _padded(self, rows: list[TokenRow]) -> TokenBatch:
        batch = self.text.pad(rows)
        longest = batch.input_ids.shape[1]
        width = next(bucket for bucket in self.buckets if bucket >= longest)
        more = ((0, 0), (0, width - longest))
        return TokenBatch(
            input_ids=np.pad(batch.input_ids, more, constant_values=self.text.contract.pad_id),
            attention_mask=np.pad(batch.attention_mask, more),
            pool_mask=np.pad(batch.pool_mask, more),
        )
