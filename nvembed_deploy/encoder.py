"""`Encoder` embeds texts as unit vectors with a bundle, on the best backend of this machine."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nvembed_deploy.backends.base import Backend, ClosedBackend, Output
from nvembed_deploy.batching import plan_batches
from nvembed_deploy.bundle.manifest import Manifest
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.bundle.vector_kinds import BOUNDED_BY, require_offered
from nvembed_deploy.console import program
from nvembed_deploy.errors import ConfigError, EngineError, InputError, InputTypeError
from nvembed_deploy.select_backend import absolute_path, open_checkpoint, open_parts
from nvembed_deploy.tokenization import (
    TextEncoder,
    TokenRow,
    Truncate,
    as_python_strings,
    check_container,
    check_pooled,
    check_texts,
)
from nvembed_deploy.vectors import (
    OutputDtype,
    check_vectors,
    convert,
    cosine_similarity,
    output_vectors,
    pairwise_cosine_similarity,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nvembed_deploy.coalescer import Coalescer

WINDOW_TEXTS = 4096
"""Texts that are tokenized and sorted by length together; a generator is read one window ahead."""
DEFAULT_BATCH_TOKENS = 4096

Opener = Callable[[], tuple[Bundle, TextEncoder, Backend]]

_log = logging.getLogger(__name__)
_fork_lock = threading.Lock()


def _renew_fork_lock() -> None:
    global _fork_lock
    _fork_lock = threading.Lock()  # a thread of the parent process may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_fork_lock)


@dataclass(frozen=True, kw_only=True)
class _TokenRules:
    """Tokenization options of one call."""

    prompt: str
    max_tokens: int
    """Maximum tokens per row."""
    truncate: Truncate


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Batch limits and output options of one call."""

    dim: int
    max_rows: int
    max_tokens: int
    normalize: bool
    dtype: OutputDtype


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Tokenized texts that are sorted by length together."""

    rows: list[TokenRow]
    truncated_texts: int
    blank_texts: int


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


class Encoder:
    """Embeds texts with a bundle.

    The plan runs on TensorRT or TensorRT-RTX if this machine has the GPU and the runtime that it was built for.
    Otherwise the bundle's ONNX graph runs on ONNX Runtime or OpenVINO, and a warning gives the reason.

    Args:
        path: A bundle's folder, its `engine.plan`, or its `model.onnx` (which runs on ONNX Runtime); or the name of a
            Hugging Face repository that contains a bundle, such as `org/name`, which is downloaded.
        device: `auto`, `cpu`, `cuda` or `cuda:N`. `cuda` raises an error instead of falling back.
        backend: `auto`, `tensorrt`, `onnxruntime` or `openvino`. On a CPU with both of the latter installed,
            `auto` selects the faster one if its vectors agree: measured once for a bundle and machine, and cached.
        threads: Compute threads on a CPU; by default the runtime's own choice, one per physical core.
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

    _bundle: Bundle
    _text: TextEncoder
    _backend: Backend

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
        return _from_opener(
            functools.partial(
                open_checkpoint,
                str(Path(checkpoint).absolute()),
                str(like._bundle.folder),
                like.manifest.manifest_sha256,
                device,
            ),
            like._query_instruction,
        )

    def close(self) -> None:
        """Frees the engine and its memory; any further call raises `EngineError`. A second call does nothing."""
        self._is_closed = True
        self._backend = ClosedBackend(self._backend.name)
        if self._coalescer is not None:
            self._coalescer.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[Opener, str | None], Encoder], tuple[Opener, str | None]]:
        """Pickles the path and the options; unpickling opens the bundle again."""
        return _from_opener, (self._opener, self._query_instruction)

    def _open(self, opener: Opener, query_instruction: str | None) -> None:
        self._opener, self._query_instruction = opener, query_instruction
        self._bundle, self._text, self._backend = opener()
        self._prompts = self._text.prompts(query_instruction)
        self._coalescer: Coalescer | None = None
        self._process = os.getpid()
        self._is_closed = False

    def _require_open_here(self) -> None:
        """Opens the bundle again in a forked process, which lacks the runtime's threads, so that a batch would hang.

        Raises:
            EngineError: The encoder was closed, or it runs on a GPU, which a forked process cannot use.
        """
        if self._is_closed:
            raise EngineError("this Encoder was closed; open the bundle again")
        if self._process == os.getpid():
            return
        if "CPU" not in self.backend:
            raise EngineError(
                f"this process was forked from one that runs {self.backend}, and a forked process cannot use its "
                "parent's GPU; start processes with the method 'spawn', or open the bundle in each"
            )
        with _fork_lock:
            if self._process != os.getpid():
                self._inherited = self._backend  # never freed: freeing a runtime without its threads can hang
                self._open(self._opener, self._query_instruction)

    @property
    def backend(self) -> str:
        """Name of the runtime and the device that run the model."""
        return self._backend.name

    @property
    def bundle(self) -> Bundle:
        """The bundle on disk."""
        return self._bundle

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def dimension(self) -> int:
        """Dimension D of a vector."""
        return self.manifest.dimension

    @property
    def max_length(self) -> int:
        """Maximum tokens per text, special tokens and instruction included."""
        return min(self.manifest.profile.max.tokens, self.manifest.text.max_tokens)

    @property
    def _default_batch_tokens(self) -> int:
        """Tokens per batch: at least those that a plan is tuned for, which on a large GPU exceed a CPU's optimum."""
        profile = self._backend.profile
        if profile is None:
            return DEFAULT_BATCH_TOKENS // self._backend.in_flight
        return max(DEFAULT_BATCH_TOKENS, profile.opt.batch * profile.opt.tokens)

    def _even_batch_tokens(self, rows: Sequence[TokenRow]) -> int | None:
        """Returns the tokens per batch that give a CPU's concurrent batches the same work, or None for the default.

        Few rows, such as the 32 of a batch of sentence-transformers, would otherwise make one batch or two unlike ones.
        """
        in_flight, limit = self._backend.in_flight, self._default_batch_tokens
        if in_flight == 1 or self._backend.profile is not None or len(rows) < 2:
            return None
        total = sum(map(len, rows))
        batches = in_flight * math.ceil(total / (in_flight * limit))
        # One row more than the even share, since shorter rows are padded.
        return min(limit, math.ceil(total / batches) + max(map(len, rows)))

    @property
    def prompts(self) -> dict[str, str]:
        """The prefix of each kind of text: `query`, `document`, and the checkpoint's other named prompts."""
        return dict(self._prompts)

    @property
    def similarity_fn_name(self) -> str:
        """Name of the function that compares vectors, as in sentence-transformers: `cosine`."""
        return "cosine"

    def get_embedding_dimension(self) -> int:
        """Returns `dimension`, under its name in sentence-transformers."""
        return self.dimension

    def query_prompt(self, instruction: str) -> str:
        """Returns the prompt for queries: the model's template with the instruction, or its fixed query prompt."""
        return self._text.query_prompt(instruction)

    def __repr__(self) -> str:
        return f"Encoder({str(self._bundle.folder)!r}, {self.manifest.precision.value}, {self.backend})"

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
            prompt_name: Name of a prefix in `manifest.text.prompts`, for models that have named prompts.
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
            return np.empty((0, self._output_dim(dimensions)), dtype=np.float32)
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
        if isinstance(texts, Sized) and cast("object", iter(texts)) is not texts and len(texts) > WINDOW_TEXTS:
            for first_index, window in _windows(texts):  # an error in the last one is raised before the first one runs
                check_texts(window, first_index=first_index)
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
        return self._prepare(list(as_python_strings(texts)), 0, rules, with_spans=with_spans).rows

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
        self._check_rows(rows, 0, rules)
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
        layout = self._layout(dimensions, batch_tokens=self._even_batch_tokens(rows), normalize=normalize)
        return self._run_window(rows, 0, layout, bar=None)

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
        with _fork_lock:
            if self._coalescer is None:
                self._coalescer = Coalescer(self, max_waiting=sys.maxsize)
            return self._coalescer

    def _token_rules(
        self,
        instruction: str | None,
        prompt: str | None,
        prompt_name: str | None,
        *,
        max_length: int | None,
        truncate: Truncate,
    ) -> _TokenRules:
        return _TokenRules(
            prompt=self._text.prompt(instruction, prompt, prompt_name),
            max_tokens=self._limit("max_length", max_length, self.max_length, self.manifest.text.max_tokens),
            truncate=_checked_truncate(truncate),
        )

    def _layout(
        self,
        dimensions: int | None,
        *,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        normalize: bool = True,
        output_dtype: str = "float32",
    ) -> _Layout:
        max_rows = self.manifest.profile.max.batch
        layout = _Layout(
            dim=self._output_dim(dimensions),
            max_rows=self._limit("batch_size", batch_size, max_rows, max_rows if self._backend.profile else None),
            max_tokens=self._limit("batch_tokens", batch_tokens, self._default_batch_tokens, None),
            normalize=normalize,
            dtype=self.offered_dtype(output_dtype),
        )
        if layout.dtype in BOUNDED_BY and layout.dtype is not OutputDtype.FLOAT16:
            if layout.dim != self.dimension:
                raise ConfigError(
                    f"{output_dtype} vectors are measured for {self.dimension} dimensions; omit dimensions"
                )
            if not normalize:
                raise ConfigError(f"{output_dtype} vectors are made of vectors of unit length; omit normalize=False")
        return layout

    def offered_dtype(self, name: str) -> OutputDtype:
        """Returns the number format of a name.

        Raises:
            ConfigError: There is no such format, or the bundle does not offer it; the message says why.
        """
        try:
            dtype = OutputDtype(name)
        except ValueError:
            names = ", ".join(repr(dtype.value) for dtype in OutputDtype)
            raise ConfigError(f"output_dtype is {name!r}; it can be {names}") from None
        require_offered(dtype, self.manifest.vectors)
        return dtype

    def convert(self, vectors: NDArray[np.float32], dtype: OutputDtype) -> NDArray[Any]:
        """Converts vectors of this encoder, float32 [N, D] of unit length, to a format that it offers.

        Raises:
            ConfigError: See `offered_dtype`.
        """
        require_offered(dtype, self.manifest.vectors)
        kinds = self.manifest.vectors
        return convert(vectors, dtype, int8_step=kinds.int8_step if kinds else None)

    def _stream(
        self, texts: Iterable[object], rules: _TokenRules, layout: _Layout, *, show_progress: bool
    ) -> Iterator[NDArray[np.float32]]:
        truncated = blank = start = 0
        with _progress(show_progress, texts) as bar:
            for window in self._tokenized_windows(texts, rules):
                vectors = self._run_window(window.rows, start, layout, bar=bar)
                truncated, blank = truncated + window.truncated_texts, blank + window.blank_texts
                start += len(vectors)
                yield self.convert(vectors, layout.dtype)
        if blank:
            _log.warning("%d of %d texts were empty or only white space; their vectors carry no meaning", blank, start)
        if truncated:
            message = "%d of %d texts were longer than max_length=%d tokens and were truncated"
            _log.warning(message, truncated, start, rules.max_tokens)

    def _tokenized_windows(self, texts: Iterable[object], rules: _TokenRules) -> Iterator[_Window]:
        """Yields tokenized windows: read in the caller's thread, tokenized in another thread while batches run."""
        iterator = iter(texts)
        window_texts = list(itertools.islice(iterator, WINDOW_TEXTS))
        start, has_more = 0, len(window_texts) == WINDOW_TEXTS  # a short call starts no thread
        with ThreadPoolExecutor(max_workers=1) if has_more else nullcontext() as pool:
            window = self._prepare(window_texts, start, rules) if window_texts else None
            while window is not None:
                start += len(window.rows)
                window_texts = list(itertools.islice(iterator, WINDOW_TEXTS)) if has_more else []
                future = None
                if pool is not None and window_texts:
                    future = pool.submit(self._prepare, window_texts, start, rules)
                yield window
                window = future.result() if future is not None else None

    def _prepare(self, texts: Sequence[object], start: int, rules: _TokenRules, *, with_spans: bool = False) -> _Window:
        checked = check_texts(texts, first_index=start)
        rows = self._text.tokenize(
            checked,
            prompt=rules.prompt,
            max_length=rules.max_tokens,
            drop_start=rules.truncate == "start",
            with_spans=with_spans,
        )
        truncated_texts = self._check_rows(rows, start, rules)
        blank_texts = sum(not text or text.isspace() for text in checked)
        return _Window(rows=rows, truncated_texts=truncated_texts, blank_texts=blank_texts)

    def _run_window(self, rows: Sequence[TokenRow], start: int, layout: _Layout, *, bar: Any) -> NDArray[np.float32]:
        vectors = np.empty((len(rows), layout.dim), dtype=np.float32)
        batches = plan_batches([len(row) for row in rows], max_rows=layout.max_rows, max_tokens=layout.max_tokens)
        for indices, output in self._run_batches(rows, batches):
            check_vectors(output, [start + index for index in indices], self.backend)
            vectors[indices] = output_vectors(output, dim=layout.dim, normalize=layout.normalize)
            if bar is not None:
                bar.update(len(indices))
        return vectors

    def _run_batches(
        self, rows: Sequence[TokenRow], batches: Iterator[list[int]]
    ) -> Iterator[tuple[list[int], Output]]:
        """Yields the batches' outputs in order; up to `Backend.in_flight` batches run concurrently."""
        planned = list(batches)
        is_concurrent = self._backend.in_flight > 1 and len(planned) > 1
        run = self._backend.run_concurrent if is_concurrent else self._backend.run

        def embed(indices: list[int]) -> tuple[list[int], Output]:
            return indices, run(self._text.pad([rows[index] for index in indices]))

        if not is_concurrent:
            yield from map(embed, planned)
            return
        with ThreadPoolExecutor(max_workers=self._backend.in_flight) as pool:
            futures = [pool.submit(embed, indices) for indices in planned]
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:  # after an error, the remaining batches do not start
                    future.cancel()

    def _output_dim(self, dimensions: int | None) -> int:
        dim = self._limit("dimensions", dimensions, self.dimension, self.dimension)
        matryoshka = self.manifest.source.architecture.matryoshka
        if dim != self.dimension and (matryoshka is None or not matryoshka.allows(dim, self.dimension)):
            cure = f"pass a supported dimension: {matryoshka}" if matryoshka else "omit dimensions"
            raise ConfigError(
                f"dimensions is {dim}; this model was not trained for vectors truncated to that dimension; {cure}"
            )
        return dim

    def _check_rows(self, rows: list[TokenRow], start: int, rules: _TokenRules) -> int:
        check_pooled(rows, start, max_length=rules.max_tokens)
        max_tokens = self._backend.profile.max.tokens if self._backend.profile else rules.max_tokens
        for index, row in enumerate(rows, start):
            if row.truncated and not rules.truncate:
                raise InputError(
                    f"text {index} is longer than max_length={rules.max_tokens} tokens; shorten it, raise "
                    "max_length, or pass truncate=True"
                )
            if len(row) > max_tokens:
                raise InputError(
                    f"text {index} has {len(row)} tokens and the plan accepts {max_tokens}; pass "
                    f"max_length={max_tokens}, or rebuild the plan: {program('build')} BUNDLE --max BATCHxTOKENS"
                )
        return sum(row.truncated for row in rows)

    def _limit(self, name: str, value: int | None, default: int, maximum: int | None) -> int:
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ConfigError(f"{name} is {value!r}; pass a whole number of at least 1")
        if maximum is not None and value > maximum:
            raise ConfigError(f"{name} is {value}; this engine accepts at most {maximum}")
        return int(value)


def _from_opener(opener: Opener, query_instruction: str | None) -> Encoder:
    """Returns an encoder of the parts that `opener` opens, here and in each process that the encoder is sent to."""
    encoder = Encoder.__new__(Encoder)
    encoder._open(opener, query_instruction)
    return encoder


def _checked_truncate(truncate: Truncate) -> Truncate:
    if not isinstance(truncate, bool) and truncate not in ("start", "end"):
        raise ConfigError(f"truncate is {truncate!r}; pass True (or 'end'), 'start' or False")
    return truncate


def _windows(texts: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields windows of texts, each with the index of its first text."""
    remaining = iter(texts)
    first_index = 0
    while window := list(itertools.islice(remaining, WINDOW_TEXTS)):
        yield first_index, window
        first_index += len(window)


def _progress(show: bool, texts: Iterable[object]) -> Any:
    if not show:
        return nullcontext()
    from tqdm import tqdm

    return tqdm(total=len(texts) if isinstance(texts, Sized) else None, unit="text", desc="encoding")
