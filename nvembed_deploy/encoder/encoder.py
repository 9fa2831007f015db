"""`Encoder` embeds texts as unit vectors with a bundle, on the best backend of this machine."""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvembed_deploy.encoder.batches import Layout, even_batch_tokens, run_window
from nvembed_deploy.encoder.opened import OpenedBundle, fork_lock
from nvembed_deploy.encoder.windows import TokenRules, check_list, check_rows, tokenize, tokenized_windows
from nvembed_deploy.errors import InputTypeError
from nvembed_deploy.select_backend import absolute_path, open_checkpoint, open_parts
from nvembed_deploy.tokenization import TokenRow, Truncate, as_python_strings, check_container, check_texts
from nvembed_deploy.vectors import cosine_similarity, pairwise_cosine_similarity

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nvembed_deploy.coalescer import Coalescer

_log = logging.getLogger(__name__)


class EncodeOptions(TypedDict, total=False):
    """Options of `Encoder.encode` besides the instruction."""

    prompt: str | None
    prompt_name: str | None
    dimensions: int | None
    max_length: int | None
    batch_size: int | None
    batch_tokens: int | None
    normalize: bool
    truncate: Truncate
    output_dtype: str
    show_progress: bool


class Encoder(OpenedBundle):
    """Embeds texts with a bundle.

    The plan runs on TensorRT or TensorRT-RTX if this machine has the GPU and the runtime that it was built for.
    Otherwise the bundle's ONNX graph runs on ONNX Runtime or OpenVINO, and a warning gives the reason.

    Args:
        path: A bundle's folder, its `engine.plan`, or its `model.onnx` (which runs on ONNX Runtime); or the name of a
            Hugging Face repository that contains a bundle, such as `org/name`, which is downloaded.
        device: `auto`, `cpu`, `cuda` or `cuda:N`. `cuda` raises an error instead of falling back.
        backend: `auto`, `tensorrt`, `onnxruntime` or `openvino`. On a CPU with both of the latter installed,
            `auto` selects the faster one if its vectors agree: measured once for a bundle and machine, and cached.
        threads: Compute threads on a CPU; by default one for each physical core that this
            process may use.
        query_instruction: Instruction of `encode_query`, the task in words. By default the checkpoint's own prompt for
            queries, or "Given a question, retrieve passages that answer the question" if it takes any instruction.

    Raises:
        ConfigError: An argument is unknown, or two arguments contradict each other.
        BundleError: The bundle is missing, damaged or incomplete.
        DeviceMismatchError: `device` requests CUDA, and the plan or the machine does not match.
        MissingExtra: A required package is not installed.
        EngineError: The engine could not be loaded.

    Example:
        >>> encoder = Encoder("engine.plan")
        >>> encoder.encode("How do I undo a commit?", instruction="Given a question, retrieve passages").shape
        (4096,)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        query_instruction: str | None = None,
    ) -> None:
        # Absolute: another process may have another working directory when it opens the bundle again.
        opener = functools.partial(open_parts, absolute_path(path), device, backend=backend, threads=threads)
        self._open(opener, query_instruction)

    @classmethod
    def from_checkpoint(cls, checkpoint: Path, *, like: Encoder, device: str = "cpu") -> Encoder:
        """Returns an encoder that runs the checkpoint in PyTorch on the same tokens as a bundle's engine. Needs torch.

        Args:
            checkpoint: The folder in Hugging Face layout that the bundle was made from.
            like: The bundle's encoder.
            device: PyTorch's name of the device: `cpu` runs in FP32, the reference; `cuda` in FP16, as deployed.

        Raises:
            ConfigError: The bundle was made from different weights.
            CheckpointError: The folder cannot be read.
            MissingExtra: PyTorch is not installed.
        """
        return cls._from_opener(
            functools.partial(
                open_checkpoint,
                str(Path(checkpoint).absolute()),
                str(like._bundle.folder),
                like.manifest.manifest_sha256,
                device,
            ),
            like._query_instruction,
        )

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        instruction: str | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        max_length: int | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        normalize: bool = True,
        truncate: Truncate = True,
        output_dtype: str = "float32",
        show_progress: bool = False,
    ) -> NDArray[Any]:
        """Embeds one text or many.

        Args:
            texts: A str, or any iterable of str. A list is checked completely before any work is done; a generator is
                checked as it is read. An empty text is embedded as `<s></s>`, as in NVIDIA's code, since real corpora
                contain some; the log gives their number.
            instruction: The task in words, such as "Given a question, retrieve passages that answer it". It is
                inserted into the model's template. For queries; passages have no instruction.
            prompt: The prefix verbatim, in place of `instruction`.
            prompt_name: Name of one of `prompts`: `query`, `document`, or another that the checkpoint names.
            dimensions: Truncate vectors to this dimension and normalize them again; for models trained for it
                (`manifest.source.architecture.matryoshka`).
            max_length: Maximum tokens per text, special tokens and prompt included. Default: `self.max_length`.
            batch_size: Maximum texts per batch.
            batch_tokens: Maximum padded tokens per batch (default: 4,096 shared by the batches that run concurrently,
                or what a plan's profile is tuned for). Batches contain texts of similar length.
            normalize: If False, returns the pooled vectors without normalization.
            truncate: If True (or `end`), longer texts are truncated at `max_length`, which drops their `</s>` as
                NVIDIA's code does, and their number is logged; if `start`, their beginning is dropped instead, after
                the prompt; if False, they raise an error.
            output_dtype: Number format of the vectors: `float32`, `float16`, `int8`, `uint8` (int8 plus 128), or
                `ubinary` and `binary` (signs, eight in a byte), see `nvembed_deploy.vectors`. The smaller ones are
                offered if the bundle's manifest says what they cost (`nvembed show`).
            show_progress: Shows a progress bar on stderr.

        Returns:
            [N, D] of `output_dtype` in input order, as float32 rows of unit length; [D] for a single str; [0, D] for no
            texts. D is `dimensions` if given; bits have D / 8 bytes.

        Raises:
            InputTypeError: A text is not a str; the message gives its index.
            InputError: A text contains half a surrogate pair, is longer than `max_length` with
                `truncate=False`, or the instruction leaves no token to pool.
            ConfigError: An option is invalid.
            NumericsError: The engine returned a vector that is not finite or not of unit length.
        """
        single = isinstance(texts, str)
        blocks = list(
            self.encode_stream(
                [texts] if isinstance(texts, str) else texts,
                instruction=instruction,
                prompt=prompt,
                prompt_name=prompt_name,
                dimensions=dimensions,
                max_length=max_length,
                batch_size=batch_size,
                batch_tokens=batch_tokens,
                normalize=normalize,
                truncate=truncate,
                output_dtype=output_dtype,
                show_progress=show_progress,
            )
        )
        if not blocks:
            layout = self._layout(dimensions, output_dtype=output_dtype)
            return self.convert(np.empty((0, layout.dim), dtype=np.float32), layout.dtype)
        vectors = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return vectors[0] if single else vectors

    def encode_query(
        self, texts: str | Iterable[str], *, instruction: str | None = None, **options: Unpack[EncodeOptions]
    ) -> NDArray[Any]:
        """Embeds queries: as `encode`, with the prompt for queries unless a prompt is given.

        Args:
            texts: See `encode`.
            instruction: The task in words; default: `query_instruction` of the constructor.
            options: The other options of `encode`.

        Returns:
            [N, D], see `encode`.

        Raises:
            InputTypeError: See `encode`; likewise for the other errors.
        """
        return self._encode_side("query", texts, instruction, options)

    def encode_document(
        self, texts: str | Iterable[str], *, instruction: str | None = None, **options: Unpack[EncodeOptions]
    ) -> NDArray[Any]:
        """Embeds documents (passages): as `encode`, with the checkpoint's prompt for documents, if it has one.

        Args:
            texts: See `encode`.
            instruction: The task in words, for tasks that compare texts of one kind; default: none.
            options: The other options of `encode`.

        Returns:
            [N, D], see `encode`.

        Raises:
            InputTypeError: See `encode`; likewise for the other errors.
        """
        return self._encode_side("document", texts, instruction, options)

    async def aencode(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        max_length: int | None = None,
        truncate: Truncate = True,
    ) -> NDArray[np.float32]:
        """Embeds one text or many without blocking the event loop; calls that wait together share batches.

        Args:
            texts: A str, or a sequence of str.
            instruction: See `encode`; likewise for the remaining arguments.

        Returns:
            float32 [N, D], see `encode`.

        Raises:
            InputTypeError: See `encode`; likewise for the other errors.
        """
        tokenize = functools.partial(
            self.tokenize,
            instruction=instruction,
            prompt=prompt,
            prompt_name=prompt_name,
            max_length=max_length,
            truncate=truncate,
        )
        is_single = isinstance(texts, str)
        rows = await asyncio.to_thread(tokenize, [texts] if isinstance(texts, str) else texts)
        if not rows:
            return np.empty((0, self.output_dimension(dimensions)), dtype=np.float32)
        vectors = await asyncio.wrap_future(self._shared_batches().submit(rows, dimensions=dimensions))
        return vectors[0] if is_single else vectors

    def similarity(self, a: ArrayLike, b: ArrayLike) -> NDArray[np.float32]:
        """Returns the cosine of every vector in `a` with every vector in `b`: float32 [N, M].

        Raises:
            InputError: The vectors have different dimensions.
        """
        return cosine_similarity(a, b)

    def similarity_pairwise(self, a: ArrayLike, b: ArrayLike) -> NDArray[np.float32]:
        """Returns the cosine of each vector in `a` with the vector at the same position in `b`: float32 [N].

        Raises:
            InputError: The shapes differ.
        """
        return pairwise_cosine_similarity(a, b)

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        instruction: str | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        max_length: int | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        normalize: bool = True,
        truncate: Truncate = True,
        output_dtype: str = "float32",
        show_progress: bool = False,
    ) -> Iterator[NDArray[Any]]:
        """Embeds any number of texts in bounded memory, and yields their vectors in blocks.

        At most two windows of `WINDOW_TEXTS` texts are in memory: one is tokenized while the previous one runs.

        Args:
            texts: An iterable of str; see `encode`. A single str is not accepted.
            instruction: See `encode`; likewise for the remaining arguments.

        Yields:
            [n, D], the vectors of the next n texts in input order; n is `WINDOW_TEXTS` except for the last.

        Raises:
            InputTypeError: See `encode`; likewise for the other errors.
        """
        check_container(texts)
        rules = self._token_rules(instruction, prompt, prompt_name, max_length=max_length, truncate=truncate)
        self._require_open_here()
        layout = self._layout(
            dimensions,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            normalize=normalize,
            output_dtype=output_dtype,
        )
        texts = as_python_strings(texts)
        check_list(texts)
        return self._stream(texts, rules, layout, show_progress=show_progress)

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        instruction: str | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        max_length: int | None = None,
        truncate: Truncate = True,
        with_spans: bool = False,
    ) -> list[TokenRow]:
        """Tokenizes texts as `encode` does; `encode_rows` embeds the rows, also those of several calls together.

        Args:
            texts: A sequence of str; see `encode`. A single str is not accepted.
            instruction: See `encode`; likewise for the next arguments.
            with_spans: Sets `TokenRow.spans`, the characters of each token; not with `truncate="start"`.

        Raises:
            InputTypeError: See `encode`; likewise for the other errors.
        """
        check_container(texts)
        rules = self._token_rules(instruction, prompt, prompt_name, max_length=max_length, truncate=truncate)
        return tokenize(list(as_python_strings(texts)), self._text, rules=rules, with_spans=with_spans).rows

    def rows_from_ids(
        self,
        texts: Sequence[Sequence[int]],
        *,
        instruction: str | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        max_length: int | None = None,
        truncate: Truncate = True,
    ) -> list[TokenRow]:
        """Makes rows for `encode_rows` of texts that are tokenized already, with this model's tokenizer.

        Args:
            texts: Token ids of each text, without special tokens and without a prompt.
            instruction: See `encode`; likewise for the remaining arguments.

        Raises:
            InputError: See `encode`; or an id is not in the vocabulary.
            ConfigError: See `encode`.
        """
        rules = self._token_rules(instruction, prompt, prompt_name, max_length=max_length, truncate=truncate)
        rows = self._text.rows_from_ids(
            texts, prompt=rules.prompt, max_length=rules.max_tokens, drop_start=rules.truncate == "start"
        )
        check_rows(rows, rules)
        return rows

    def token_spans(self, text: str) -> list[tuple[int, int]]:
        """Returns the character span (start, end) of each token of a text of any length.

        Useful to split a long text into passages.

        Raises:
            InputTypeError: The text is not a str.
            InputError: It contains half a surrogate pair.
        """
        return self._text.spans(check_texts([text])[0])

    def encode_rows(
        self, rows: Sequence[TokenRow], *, dimensions: int | None = None, normalize: bool = True
    ) -> NDArray[np.float32]:
        """Embeds rows that `tokenize` returned; rows with different prompts may be mixed.

        Returns:
            float32 [N, D], see `encode`.

        Raises:
            ConfigError: The model does not support `dimensions`.
            NumericsError: See `encode`.
        """
        self._require_open_here()
        if not isinstance(rows, Sequence) or not all(isinstance(row, TokenRow) for row in rows):
            raise InputTypeError("rows were not returned by `tokenize`; pass the list that it returns, or a part of it")
        layout = self._layout(dimensions, batch_tokens=even_batch_tokens(rows, self._backend), normalize=normalize)
        return run_window(rows, layout, text_encoder=self._text, backend=self._backend)

    def _encode_side(
        self, side: str, texts: str | Iterable[str], instruction: str | None, options: EncodeOptions
    ) -> NDArray[Any]:
        if instruction is None and options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt"] = self._prompts[side]
        return self.encode(texts, instruction=instruction, **options)

    def _shared_batches(self) -> Coalescer:
        """Returns the coalescer of `aencode`, which is created for its first call."""
        from nvembed_deploy.coalescer import Coalescer

        self._require_open_here()
        with fork_lock():
            if self._coalescer is None:
                self._coalescer = Coalescer(self, max_waiting=sys.maxsize)
            return self._coalescer

    def _stream(
        self, texts: Iterable[object], rules: TokenRules, layout: Layout, *, show_progress: bool
    ) -> Iterator[NDArray[Any]]:
        truncated = blank = start = 0
        with _progress(show_progress, texts) as bar:
            for window in tokenized_windows(texts, self._text, rules):
                vectors = run_window(
                    window.rows, layout, text_encoder=self._text, backend=self._backend, first_index=start, bar=bar
                )
                truncated, blank = truncated + window.truncated_texts, blank + window.blank_texts
                start += len(vectors)
                yield self.convert(vectors, layout.dtype)
        if blank:
            _log.warning("%d of %d texts were empty or only white space; their vectors carry no meaning", blank, start)
        if truncated:
            message = "%d of %d texts were longer than max_length=%d tokens and were truncated"
            _log.warning(message, truncated, start, rules.max_tokens)


def _progress(show: bool, texts: Iterable[object]) -> Any:
    if not show:
        return nullcontext()
    from tqdm import tqdm

    return tqdm(total=len(texts) if isinstance(texts, Sized) else None, unit="text", desc="encoding")
