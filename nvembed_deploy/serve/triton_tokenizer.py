"""Tokenizer of a Triton repository written by `export.triton`: converts texts to padded ids and masks.

Triton passes all waiting requests together; their rows are padded to one of a few lengths, so that the engine's
scheduler can batch requests of the same shape.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_deploy.errors import DeployError, InputError
from nvembed_deploy.files.records import from_json
from nvembed_deploy.tokenization import TextContract, TextEncoder, TokenBatch, TokenRow, check_pooled, check_texts

INPUTS = ("input_ids", "attention_mask", "pool_mask")
TEXT_INPUTS = ("text", "instruction", "prompt_name")


def _warn_of_numpy() -> None:
    """Writes to the server's log which NumPy this Triton may not support.

    If it does not, this process ends at the first text without a word, in the warm-up before the model is ready.
    """
    if int(np.__version__.partition(".")[0]) >= 2:
        sys.stderr.write(
            f"note: this Python has NumPy {np.__version__}; if the warm-up of the tokenizer ends with 'Stub process is "
            "not healthy', this Triton supports only NumPy 1, as 2.51 does: install 'numpy<2' there\n"
        )
        sys.stderr.flush()


def _strings(tensor: Any) -> list[str]:
    """Returns the texts of an input; none if the input is omitted."""
    return [] if tensor is None else [text.decode("utf-8") for text in tensor.as_numpy().reshape(-1)]


class TritonPythonModel:
    """Model for Triton's Python backend, which calls `initialize` once and `execute` with the queued requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the files in the folder of `model.py`.

        Args:
            args: Triton's arguments; `model_repository` and `model_version` give the folder.
        """
        _warn_of_numpy()
        folder = Path(args["model_repository"]) / args["model_version"]
        record = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
        contract = from_json(TextContract, record["text"])
        self.buckets: list[int] = record["buckets"]
        self.text = TextEncoder((folder / "tokenizer.json").read_bytes(), contract)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Returns one response per request; an invalid request gets an error and does not affect the others."""
        import triton_python_backend_utils as backend  # exists only inside Triton

        rows: list[list[TokenRow] | DeployError] = []
        for request in requests:
            try:
                inputs = [backend.get_input_tensor_by_name(request, name) for name in TEXT_INPUTS]
                rows.append(self._rows(*map(_strings, inputs)))
            except UnicodeDecodeError as err:
                rows.append(InputError(f"a text is not UTF-8 ({err.reason} at byte {err.start}); encode it as UTF-8"))
            except DeployError as err:
                rows.append(err)
        answers = []
        for request_rows in rows:
            if isinstance(request_rows, DeployError):
                answers.append(backend.InferenceResponse(error=backend.TritonError(str(request_rows))))
                continue
            padded = self._padded(request_rows)
            tensors = [backend.Tensor(name, array) for name, array in zip(INPUTS, padded, strict=True)]
            answers.append(backend.InferenceResponse(output_tensors=tensors))
        return answers

    def _rows(self, texts: list[str], instructions: list[str], prompt_names: list[str]) -> list[TokenRow]:
        """Tokenizes the texts of a request; instructions and prompt names are empty lists if they are omitted."""
        rows: list[TokenRow] = []
        max_length = min(self.buckets[-1], self.text.contract.max_tokens)
        no_names = [""] * len(texts)
        choices = zip(instructions or no_names, prompt_names or no_names, strict=True)
        prompts = [self.text.prompt(instruction or None, None, name or None) for instruction, name in choices]
        for prompt, group in groupby(zip(prompts, check_texts(texts), strict=True), key=itemgetter(0)):
            rows += self.text.tokenize([text for _, text in group], prompt=prompt, max_length=max_length)
        check_pooled(rows, max_length=max_length)
        return rows

    def _padded(self, rows: list[TokenRow]) -> TokenBatch:
        batch = self.text.pad(rows)
        longest = batch.input_ids.shape[1]
        bucket_length = next(bucket for bucket in self.buckets if bucket >= longest)
        padding = ((0, 0), (0, bucket_length - longest))
        return TokenBatch(
            input_ids=np.pad(batch.input_ids, padding, constant_values=self.text.contract.pad_id),
            attention_mask=np.pad(batch.attention_mask, padding),
            pool_mask=np.pad(batch.pool_mask, padding),
        )
