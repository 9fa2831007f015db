"""`Encoder`: texts in, unit vectors out, from a bundle and whatever can run it on this machine."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.backends.base import Backend, ClosedBackend, Output
from nvembed_deploy.batching import plan_batches
from nvembed_deploy.bundle.manifest import TOKENIZER, Manifest
from nvembed_deploy.bundle.reader import OPEN_ATTEMPTS, Bundle
from nvembed_deploy.console import program
from nvembed_deploy.errors import (
    BundleError,
    ConfigError,
    DeployError,
    EngineError,
    InputError,
    InputTypeError,
    MissingExtra,
    NumericsError,
)
from nvembed_deploy.files.hashing import hash_file
from nvembed_deploy.files.hub import is_hub_name
from nvembed_deploy.select_backend import BackendRequest, open_backend
from nvembed_deploy.tokenization import TextEncoder, TokenRow, check_pooled, check_texts

WINDOW_TEXTS = 4096
"""Texts that are tokenized and ordered together; a generator is read one such window ahead."""
DEFAULT_BATCH_TOKENS = 4096
UNIT_TOLERANCE = 1e-3
NORM_FLOOR = 1e-12

OpenParts = Callable[[], tuple[Bundle, TextEncoder, Backend]]

_log = logging.getLogger(__name__)
_fork_lock = threading.Lock()


def _renew_fork_lock() -> None:
    global _fork_lock
    _fork_lock = threading.Lock()  # a thread that is gone may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_fork_lock)


@dataclass(frozen=True, kw_only=True)
class _TokenRules:
    """How one call's texts become tokens."""

    prompt: str
    most: int
    """Tokens of the longest row."""
    truncate: bool


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How one call's rows are batched, and what its vectors look like."""

    width: int
    rows: int
    tokens: int
    normalize: bool


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Texts that are ordered by length together."""

    rows: list[TokenRow]
    cut: int
    blank: int


class Encoder:
    """Embeds texts with a bundle.

    With a CUDA device and the runtime that the plan was built for, the plan runs on TensorRT or TensorRT-RTX. Without
    one, the graph that the plan was built from runs on ONNX Runtime, and a warning says why.

    Args:
        path: A bundle's folder, its `engine.plan`, or its `model.onnx` (which then runs on ONNX Runtime by choice); or
            the name of a hub repository that holds one, such as `org/name`, which is downloaded (huggingface_hub).
        device: `auto`, `cpu`, `cuda` or `cuda:N`. With `cuda` nothing falls back.
        backend: `auto`, `tensorrt`, `onnxruntime` or `openvino`. On a CPU with both of the latter, `auto` takes the
            faster one if its vectors agree: measured once for a bundle and machine, and kept.
        threads: Threads that compute on a CPU; by default the runtime's own choice, one for each physical core.

    Raises:
        ConfigError: An argument is unknown, or two do not go together.
        BundleError: The bundle is missing, damaged or incomplete.
        DeviceMismatchError: `device` asks for CUDA and the plan or the machine does not fit.
        MissingExtra: A package that is needed is not installed.
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
        self, path: str | Path, *, device: str = "auto", backend: str = "auto", threads: int | None = None
    ) -> None:
        # In full: another process may stand in another folder when it opens the bundle again.
        self._take(functools.partial(open_parts, _absolute(path), device, backend=backend, threads=threads))

    @classmethod
    def from_checkpoint(cls, checkpoint: Path, *, like: Encoder, device: str = "cpu") -> Encoder:
        """Returns the checkpoint in PyTorch, given exactly the tokens that a bundle's engine is given. Needs torch.

        Args:
            checkpoint: The folder in Hugging Face layout that the bundle was made from.
            like: The bundle's encoder.
            device: PyTorch's name of the device: `cpu` for FP32, the truth; `cuda` for FP16, as one would deploy it.

        Raises:
            ConfigError: The bundle was made from other weights.
            CheckpointError: The folder cannot be read.
            MissingExtra: PyTorch is not installed.
        """
        return _opened(
            functools.partial(
                _open_checkpoint,
                str(Path(checkpoint).absolute()),
                str(like._bundle.folder),
                like.manifest.manifest_sha256,
                device,
            )
        )

    def close(self) -> None:
        """Frees the engine and its memory; any further call raises `EngineError`. A second call does nothing."""
        self._is_closed = True
        self._backend = ClosedBackend(self._backend.name)

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[OpenParts], Encoder], tuple[OpenParts]]:
        """Pickles and copies the path and the options: the other side opens the bundle again."""
        return _opened, (self._open,)

    def _take(self, open_: OpenParts) -> None:
        self._open = open_
        self._bundle, self._text, self._backend = open_()
        self._process = os.getpid()
        self._is_closed = False

    def _require_open_here(self) -> None:
        """Opens the bundle again in a forked process, where the runtime's threads are gone and a batch would hang.

        Raises:
            EngineError: The encoder was closed, or it runs on a GPU, of which a fork can make no use.
        """
        if self._is_closed:
            raise EngineError("this Encoder was closed; open the bundle again")
        if self._process == os.getpid():
            return
        if "CPU" not in self.backend:
            raise EngineError(
                f"this process was forked from one in which {self.backend} runs, and a fork cannot use its parent's "
                "GPU; start processes with the method 'spawn', or open the bundle in each"
            )
        with _fork_lock:
            if self._process != os.getpid():
                self._inherited = self._backend  # kept: freeing a runtime whose threads are gone can hang
                self._take(self._open)

    @property
    def backend(self) -> str:
        """What runs the model, and on which device."""
        return self._backend.name

    @property
    def manifest(self) -> Manifest:
        """All that the bundle says of itself."""
        return self._bundle.manifest

    @property
    def dimension(self) -> int:
        """D, the width of a vector."""
        return self.manifest.dimension

    @property
    def max_length(self) -> int:
        """Tokens of the longest text that the plan takes, special tokens and instruction included."""
        return min(self.manifest.profile.max.tokens, self.manifest.text.max_tokens)

    @property
    def _usual_tokens(self) -> int:
        """A plan's kernels were chosen for a batch, which on a large GPU is larger than what is best for a CPU."""
        profile = self._backend.profile
        if profile is None:
            return DEFAULT_BATCH_TOKENS // self._backend.in_flight
        return max(DEFAULT_BATCH_TOKENS, profile.opt.batch * profile.opt.tokens)

    def query_prompt(self, instruction: str) -> str:
        """The prompt of a query: the instruction in the model's template, or its own where it takes no instructions."""
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
        truncate: bool = True,
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embeds one text or many.

        Args:
            texts: One str, or any iterable of them. A list is checked whole before any work is done; a generator is
                checked as it is read, which is as needed. An empty text gets a vector, that of `<s></s>` as in
                NVIDIA's code, since real corpora hold some; the log says how many there were.
            instruction: The task in words, such as "Given a question, retrieve passages that answer it". The model's
                template makes a prompt of it. For queries; passages take none.
            prompt: The prefix verbatim, instead of `instruction`.
            prompt_name: The prefix by its name in `manifest.text.prompts`, where the model has such.
            dimensions: Keep this many numbers of each vector, made unit length again; for models trained for it
                (`manifest.source.architecture.matryoshka`).
            max_length: Most tokens of a text, special tokens and prompt included. Default: `self.max_length`.
            batch_size: Most texts of a batch.
            batch_tokens: Most padded tokens of a batch (default: 4,096 shared by the batches that run at a time, or
                what a plan's profile is tuned for). Batches hold texts of similar length.
            normalize: False gives the pooled vectors at their own length.
            truncate: True cuts longer texts at `max_length`, which drops their `</s>` as NVIDIA's code does, and logs
                how many; False raises instead.
            show_progress: Shows a progress bar on stderr.

        Returns:
            float32 [N, D] in input order, rows of unit length; [D] for a single str; [0, D] for no texts. D is
            `dimensions` where given.

        Raises:
            InputTypeError: A text is not a str; the message has its index.
            InputError: A text holds half a surrogate pair, is longer than `max_length` with
                `truncate=False`, or the instruction leaves nothing to pool.
            ConfigError: An option does not fit.
            NumericsError: The engine gave a vector that is not finite or not of unit length.
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
                show_progress=show_progress,
            )
        )
        if not blocks:
            return np.empty((0, self._width(dimensions)), dtype=np.float32)
        vectors = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return vectors[0] if single else vectors

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
        truncate: bool = True,
        show_progress: bool = False,
    ) -> Iterator[NDArray[np.float32]]:
        """Embeds texts of any number in bounded memory: `encode`, in blocks.

        At most two windows of `WINDOW_TEXTS` texts are held: one is tokenized while the one before it runs.

        Args:
            texts: As of `encode`, but for a single str.
            instruction: As of `encode`, and so are all that follow.

        Yields:
            float32 [n, D], the vectors of the next n texts in input order; n is `WINDOW_TEXTS` but for the last.

        Raises:
            InputTypeError: As of `encode`, and so are all others.
        """
        _check_container(texts)
        rules = self._token_rules(instruction, prompt, prompt_name, max_length=max_length, truncate=truncate)
        self._require_open_here()
        layout = self._layout(dimensions, batch_size=batch_size, batch_tokens=batch_tokens, normalize=normalize)
        texts = _plain(texts)
        if isinstance(texts, Sized) and cast("object", iter(texts)) is not texts and len(texts) > WINDOW_TEXTS:
            for first_index, window in _blocks(texts):  # the last one's faults are told before the first one runs
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
        truncate: bool = True,
    ) -> list[TokenRow]:
        """The tokens that `encode` would run, one row a text; `encode_rows` takes them, those of several calls too.

        Args:
            texts: As of `encode`, but for a single str.
            instruction: As of `encode`, and so are all that follow.

        Raises:
            InputTypeError: As of `encode`, and so are all others.
        """
        _check_container(texts)
        rules = self._token_rules(instruction, prompt, prompt_name, max_length=max_length, truncate=truncate)
        return self._prepare(list(_plain(texts)), 0, rules).rows

    def token_spans(self, text: str) -> list[tuple[int, int]]:
        """For each token of a text of any length, its first character and the one behind its last.

        A text that is too long is cut into passages by them.

        Raises:
            InputTypeError: The text is not a str.
            InputError: It holds half a surrogate pair.
        """
        return self._text.spans(check_texts([text])[0])

    def encode_rows(
        self, rows: Sequence[TokenRow], *, dimensions: int | None = None, normalize: bool = True
    ) -> NDArray[np.float32]:
        """Embeds what `tokenize` gave, rows of different prompts together.

        Returns:
            float32 [N, D], as of `encode`.

        Raises:
            ConfigError: `dimensions` does not fit.
            NumericsError: As of `encode`.
        """
        self._require_open_here()
        if not isinstance(rows, Sequence) or not all(isinstance(row, TokenRow) for row in rows):
            raise InputTypeError("rows are not what `tokenize` returned; pass its list, or a part of it")
        layout = self._layout(dimensions, batch_size=None, batch_tokens=None, normalize=normalize)
        return self._run_window(rows, 0, layout, bar=None)

    def _token_rules(
        self,
        instruction: str | None,
        prompt: str | None,
        prompt_name: str | None,
        *,
        max_length: int | None,
        truncate: bool,
    ) -> _TokenRules:
        return _TokenRules(
            prompt=self._text.prompt(instruction, prompt, prompt_name),
            most=self._limit("max_length", max_length, self.max_length, self.manifest.text.max_tokens),
            truncate=truncate,
        )

    def _layout(
        self, dimensions: int | None, *, batch_size: int | None, batch_tokens: int | None, normalize: bool
    ) -> _Layout:
        most_rows = self.manifest.profile.max.batch
        return _Layout(
            width=self._width(dimensions),
            rows=self._limit("batch_size", batch_size, most_rows, most_rows if self._backend.profile else None),
            tokens=self._limit("batch_tokens", batch_tokens, self._usual_tokens, None),
            normalize=normalize,
        )

    def _stream(
        self, texts: Iterable[object], rules: _TokenRules, layout: _Layout, *, show_progress: bool
    ) -> Iterator[NDArray[np.float32]]:
        cut = blank = start = 0
        with _progress(show_progress, texts) as bar:
            for window in self._windows(texts, rules):
                part = self._run_window(window.rows, start, layout, bar=bar)
                cut, blank, start = cut + window.cut, blank + window.blank, start + len(part)
                yield part
        if blank:
            _log.warning("%d of %d texts were empty or only white space; their vectors mean nothing", blank, start)
        if cut:
            _log.warning("%d of %d texts were longer than max_length=%d tokens and were cut", cut, start, rules.most)

    def _windows(self, texts: Iterable[object], rules: _TokenRules) -> Iterator[_Window]:
        """Checked and tokenized texts: read in the caller's thread, tokenized in another while the batches run."""
        iterator = iter(texts)
        read = list(itertools.islice(iterator, WINDOW_TEXTS))
        start, more = 0, len(read) == WINDOW_TEXTS  # a short call starts no thread
        with ThreadPoolExecutor(max_workers=1) if more else nullcontext() as pool:
            window = self._prepare(read, start, rules) if read else None
            while window is not None:
                start += len(window.rows)
                read = list(itertools.islice(iterator, WINDOW_TEXTS)) if more else []
                coming = pool.submit(self._prepare, read, start, rules) if pool is not None and read else None
                yield window
                window = coming.result() if coming is not None else None

    def _prepare(self, texts: Sequence[object], start: int, rules: _TokenRules) -> _Window:
        checked = check_texts(texts, first_index=start)
        rows = self._text.tokenize(checked, prompt=rules.prompt, max_length=rules.most)
        cut = self._check_rows(rows, start, rules)
        return _Window(rows=rows, cut=cut, blank=sum(not text or text.isspace() for text in checked))

    def _run_window(self, rows: Sequence[TokenRow], start: int, layout: _Layout, *, bar: Any) -> NDArray[np.float32]:
        vectors = np.empty((len(rows), layout.width), dtype=np.float32)
        batches = plan_batches([len(row) for row in rows], max_rows=layout.rows, max_tokens=layout.tokens)
        for indices, output in self._run_batches(rows, batches):
            _check_vectors(output, [start + index for index in indices], self.backend)
            vectors[indices] = _laid_out(output, layout)
            if bar is not None:
                bar.update(len(indices))
        return vectors

    def _run_batches(
        self, rows: Sequence[TokenRow], batches: Iterator[list[int]]
    ) -> Iterator[tuple[list[int], Output]]:
        """Runs batches in order, as many at a time as the backend gains by."""
        planned = list(batches)
        beside = self._backend.in_flight > 1 and len(planned) > 1
        run = self._backend.run_concurrent if beside else self._backend.run

        def embed(indices: list[int]) -> tuple[list[int], Output]:
            return indices, run(self._text.pad([rows[index] for index in indices]))

        if not beside:
            yield from map(embed, planned)
            return
        with ThreadPoolExecutor(max_workers=self._backend.in_flight) as pool:
            coming = [pool.submit(embed, indices) for indices in planned]
            try:
                for future in coming:
                    yield future.result()
            finally:
                for future in coming:  # after an error, what has not begun shall not
                    future.cancel()

    def _width(self, dimensions: int | None) -> int:
        width = self._limit("dimensions", dimensions, self.dimension, self.dimension)
        trained = self.manifest.source.architecture.matryoshka
        if width != self.dimension and (trained is None or not trained.allows(width, self.dimension)):
            cure = f"pass one of them: {trained}" if trained else "leave dimensions out"
            raise ConfigError(f"dimensions is {width}; this model was not trained for vectors cut to that; {cure}")
        return width

    def _check_rows(self, rows: list[TokenRow], start: int, rules: _TokenRules) -> int:
        check_pooled(rows, start, max_length=rules.most)
        longest = self._backend.profile.max.tokens if self._backend.profile else rules.most
        for index, row in enumerate(rows, start):
            if row.truncated and not rules.truncate:
                raise InputError(
                    f"text {index} is longer than max_length={rules.most} tokens; shorten it, raise max_length, or "
                    "pass truncate=True"
                )
            if len(row) > longest:
                raise InputError(
                    f"text {index} has {len(row)} tokens and the plan takes {longest}; pass max_length={longest}, or "
                    f"rebuild it: {program('build')} BUNDLE --max BATCHxTOKENS"
                )
        return sum(row.truncated for row in rows)

    def _limit(self, name: str, value: int | None, default: int, most: int | None) -> int:
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ConfigError(f"{name} is {value!r}; pass a whole number of at least 1")
        if most is not None and value > most:
            raise ConfigError(f"{name} is {value}; this engine takes at most {most}")
        return int(value)


def open_parts(
    path: str | Path, device: str, *, backend: str = "auto", threads: int | None = None
) -> tuple[Bundle, TextEncoder, Backend]:
    """Opens a bundle, its tokenizer and what shall run it, all of one generation; the errors are `Encoder`'s."""
    wish = BackendRequest.of(device, backend, threads)
    for _ in range(OPEN_ATTEMPTS):
        bundle = Bundle.open(path)
        try:
            text = TextEncoder(bundle.read(TOKENIZER), bundle.manifest.text)
            opened = open_backend(bundle, text, Path(path).name, wish)
        except DeployError:
            if bundle.is_current():
                raise
            continue
        if bundle.is_current():  # else it was replaced between the check and the load; then the new one is opened
            return bundle, text, opened
    raise BundleError(f"{path} is being replaced all the time; open it when that has ended")


def _opened(open_: OpenParts) -> Encoder:
    """Returns an encoder of what a function opens, here and in each process that the encoder is sent to."""
    encoder = Encoder.__new__(Encoder)
    encoder._take(open_)
    return encoder


def _open_checkpoint(
    checkpoint: str, bundle_folder: str, manifest_sha256: str, device: str
) -> tuple[Bundle, TextEncoder, Backend]:
    """Opens a checkpoint in PyTorch with the tokenizer and the rules of a bundle that was made from it."""
    try:
        from nvembed_deploy.backends.pytorch import PyTorchBackend
    except ImportError as err:
        raise MissingExtra(f"a checkpoint runs in PyTorch ({err}); pip install 'nvembed-deploy[export]'") from err
    bundle = Bundle.open(bundle_folder)
    if bundle.manifest.manifest_sha256 != manifest_sha256:
        raise BundleError(f"{bundle_folder} was replaced by another bundle; open both encoders again")
    text = TextEncoder(bundle.read(TOKENIZER), bundle.manifest.text)
    source = bundle.manifest.source
    for name, entry in source.files.items():
        path = Path(checkpoint, name)
        if path.suffix == ".safetensors" and (not path.is_file() or hash_file(path) != entry):
            raise ConfigError(
                f"{name} of {checkpoint} is not what the bundle was made from; pass its own checkpoint as "
                "--reference, or export it again"
            )
    layers = source.architecture.layers
    return bundle, text, PyTorchBackend(checkpoint, layers=layers, device=device, half=device != "cpu")


def _absolute(path: str | Path) -> str:
    """The path in full, links as they are.

    Raises:
        InputTypeError: It is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputTypeError(
            f"path is a {type(path).__name__}; pass a bundle's folder, its engine.plan or its model.onnx"
        )
    is_name = not os.path.lexists(path) and is_hub_name(str(path))
    return str(path) if is_name else str(Path(path).absolute())


def _check_container(texts: object) -> None:
    """Refuses what iterates over something else than texts: a str over its characters, a dict over its keys."""
    kind = type(texts).__name__
    if hasattr(texts, "columns") or hasattr(texts, "column_names"):  # pandas, polars, pyarrow: their columns' names
        raise InputTypeError(f"texts is a table ({kind}); pass one of its columns, such as table['text']")
    if getattr(texts, "ndim", 1) == 0:
        raise InputTypeError(f"texts is an array without dimensions ({kind}); pass a list of str")
    if isinstance(texts, (str, bytes, bytearray, Mapping, AbstractSet)) or not isinstance(texts, Iterable):
        raise InputTypeError(f"texts is a {kind}; pass a list of str, or a generator of str")


def _plain(texts: Iterable[str]) -> Iterable[str]:
    """Returns the str of a pyarrow array, whose elements are scalars of its own; anything else as it is."""
    if type(texts).__module__.partition(".")[0] == "pyarrow" and hasattr(texts, "to_pylist"):
        return cast("list[str]", texts.to_pylist())
    return texts


def _blocks(texts: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields windows of texts, each with the index of its first one."""
    remaining = iter(texts)
    first_index = 0
    while window := list(itertools.islice(remaining, WINDOW_TEXTS)):
        yield first_index, window
        first_index += len(window)


def _laid_out(output: Output, layout: _Layout) -> NDArray[np.float32]:
    if layout.width == output.embeddings.shape[1]:
        return output.embeddings if layout.normalize else output.embeddings * output.norms[:, None]
    cut = output.embeddings[:, : layout.width]
    scale = 1 / np.linalg.norm(cut, axis=1).clip(NORM_FLOOR) if layout.normalize else output.norms
    return cut * scale[:, None].astype(np.float32)


def _check_vectors(output: Output, indices: list[int], backend: str) -> None:
    """Refuses vectors that are not finite or not of unit length; NaN fails every comparison, so it is caught too."""
    lengths = np.linalg.norm(output.embeddings, axis=1)
    good = (np.abs(lengths - 1) <= UNIT_TOLERANCE) & np.isfinite(output.norms)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise NumericsError(
            f"text {indices[row]}: {backend} gave a vector of length {lengths[row]} instead of 1, pooled length "
            f"{output.norms[row]}; rebuild the engine in bf16: {program('export')} --precision bf16"
        )


def _progress(show: bool, texts: Iterable[object]) -> Any:
    if not show:
        return nullcontext()
    from tqdm import tqdm

    return tqdm(total=len(texts) if isinstance(texts, Sized) else None, unit="text", desc="encoding")
