"""`Encoder`: texts in, unit vectors out, from a bundle and whatever can run it on this machine."""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.backends import Backend, Output
from nvembed_deploy.backends.cuda import CudaRuntime
from nvembed_deploy.backends.ort import CPU, CPU_NOTES, GPU, OrtBackend, available_providers
from nvembed_deploy.backends.trt import open_plan
from nvembed_deploy.batching import plan_batches
from nvembed_deploy.bundle import CPU_GRAPH, GRAPH, OPEN_ATTEMPTS, PLAN, TOKENIZER, Bundle, Manifest
from nvembed_deploy.errors import (
    BundleError,
    ConfigError,
    DeployError,
    DeviceMismatchError,
    InputError,
    InputTypeError,
    MissingExtra,
    NumericsError,
)
from nvembed_deploy.text import TextEncoder, TokenRow, check_pooled, check_texts

WINDOW_TEXTS = 4096
"""Texts that are tokenized and ordered together; a generator is never read further ahead."""
DEFAULT_BATCH_TOKENS = 4096
UNIT_TOLERANCE = 1e-3
NORM_FLOOR = 1e-12

_log = logging.getLogger(__name__)


class Encoder:
    """Embeds texts with a bundle.

    With a CUDA device and the runtime that the plan was built for, the plan runs on TensorRT or TensorRT-RTX. Without
    one, the graph that the plan was built from runs on ONNX Runtime, and a warning says why.

    Args:
        path: A bundle's folder, its `engine.plan`, or its `model.onnx` (which then runs on ONNX Runtime by choice).
        device: `auto`, `cpu`, `cuda` or `cuda:N`. With `cuda` nothing falls back.

    Raises:
        BundleError: The bundle is missing, damaged or incomplete.
        DeviceMismatchError: `device` asks for CUDA and the plan or the machine does not fit.
        MissingExtra: A package that is needed is not installed.
        EngineError: The engine could not be loaded.

    Example:
        >>> encoder = Encoder("engine.plan")
        >>> encoder.encode("How do I undo a commit?", instruction="Given a question, retrieve passages").shape
        (4096,)
    """

    def __init__(self, path: str | Path, *, device: str = "auto") -> None:
        self._bundle, self._text, self._backend = open_parts(path, device)

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
            texts: One str, or any iterable of them; a generator is read as needed. An empty text gets a vector, that of
                `<s></s>` as in NVIDIA's code, since real corpora hold some; the log says how many there were.
            instruction: The task in words, such as "Given a question, retrieve passages that answer it". The model's
                template makes a prompt of it. For queries; passages take none.
            prompt: The prefix verbatim, instead of `instruction`.
            prompt_name: The prefix by its name in `manifest.text.prompts`, where the model has such.
            dimensions: Keep this many numbers of each vector, made unit length again; for models trained for it
                (`manifest.source.architecture.matryoshka`).
            max_length: Most tokens of a text, special tokens and prompt included. Default: `self.max_length`.
            batch_size: Most texts of a batch.
            batch_tokens: Most padded tokens of a batch. Batches hold texts of similar length.
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
        if isinstance(texts, str):
            vector: NDArray[np.float32] = self.encode(
                [texts],
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
            )[0]
            return vector
        if isinstance(texts, (bytes, bytearray, Mapping, AbstractSet)) or not isinstance(texts, Iterable):
            raise InputTypeError(f"texts is a {type(texts).__name__}; pass a str, a list of str, or a generator of str")
        prefix = self._text.prompt(instruction, prompt, prompt_name)
        width = self._width(dimensions)
        limit = self._limit("max_length", max_length, self.max_length, self.manifest.text.max_tokens)
        most_rows = self.manifest.profile.max.batch
        rows_limit = self._limit("batch_size", batch_size, most_rows, most_rows if self._backend.profile else None)
        tokens_limit = self._limit("batch_tokens", batch_tokens, DEFAULT_BATCH_TOKENS, None)
        parts: list[NDArray[np.float32]] = []
        cut = blank = start = 0
        with _progress(show_progress, texts) as bar:
            for window in _windows(texts):
                checked = check_texts(window, first_index=start)
                blank += sum(not text or text.isspace() for text in checked)
                rows = self._text.tokenize(checked, prompt=prefix, max_length=limit)
                cut += self._check_rows(rows, start, limit, truncate)
                part = np.empty((len(rows), width), dtype=np.float32)
                for indices in plan_batches([len(row) for row in rows], max_rows=rows_limit, max_tokens=tokens_limit):
                    part[indices] = self._run([rows[index] for index in indices], indices, start, normalize, width)
                    if bar is not None:
                        bar.update(len(indices))
                parts.append(part)
                start += len(rows)
        if blank:
            _log.warning("%d of %d texts were empty or only white space; their vectors mean nothing", blank, start)
        if cut:
            _log.warning("%d of %d texts were longer than max_length=%d tokens and were cut", cut, start, limit)
        return np.concatenate(parts) if parts else np.empty((0, width), dtype=np.float32)

    def _run(
        self, rows: list[TokenRow], indices: list[int], start: int, normalize: bool, width: int
    ) -> NDArray[np.float32]:
        output = self._backend.run(self._text.pad(rows))
        _check_vectors(output, [start + index for index in indices], self.backend)
        if width == self.dimension:
            return output.embeddings if normalize else output.embeddings * output.norms[:, None]
        cut = output.embeddings[:, :width]
        scale = 1 / np.linalg.norm(cut, axis=1).clip(NORM_FLOOR) if normalize else output.norms
        return cut * scale[:, None].astype(np.float32)

    def _width(self, dimensions: int | None) -> int:
        width = self._limit("dimensions", dimensions, self.dimension, self.dimension)
        trained = self.manifest.source.architecture.matryoshka
        if width != self.dimension and (trained is None or not trained.allows(width, self.dimension)):
            cure = f"pass one of them: {trained}" if trained else "leave dimensions out"
            raise ConfigError(f"dimensions is {width}; this model was not trained for vectors cut to that; {cure}")
        return width

    def _check_rows(self, rows: list[TokenRow], start: int, limit: int, truncate: bool) -> int:
        check_pooled(rows, max_length=limit)
        longest = self._backend.profile.max.tokens if self._backend.profile else limit
        for index, row in enumerate(rows, start):
            if row.truncated and not truncate:
                raise InputError(
                    f"text {index} is longer than max_length={limit} tokens; shorten it, raise max_length, or pass "
                    "truncate=True"
                )
            if len(row) > longest:
                raise InputError(
                    f"text {index} has {len(row)} tokens and the plan takes {longest}; pass max_length={longest}, or "
                    "rebuild it: python -m export.trt --max BATCHxTOKENS"
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


def open_parts(path: str | Path, device: str) -> tuple[Bundle, TextEncoder, Backend]:
    """Opens a bundle, its tokenizer and what shall run it, all of one generation; the errors are `Encoder`'s."""
    index = _device_index(device)
    for _ in range(OPEN_ATTEMPTS):
        bundle = Bundle.open(path)
        try:
            text = TextEncoder(bundle.read(TOKENIZER), bundle.manifest.text)
            backend = _choose_backend(bundle, Path(path).name, device, index)
        except DeployError:
            if bundle.is_current():
                raise
            continue
        if bundle.is_current():  # else it was replaced between the check and the load; then the new one is opened
            return bundle, text, backend
    raise BundleError(f"{path} is being replaced all the time; open it when that has ended")


def _device_index(device: str) -> int | None:
    """Number of the CUDA device, 0 for `auto`, None for the CPU."""
    kind, _, number = device.partition(":") if isinstance(device, str) else ("", "", "")
    if device == "cpu":
        return None
    if device == "auto" or device == "cuda":
        return 0
    if kind == "cuda" and number.isdecimal():
        return int(number)
    raise ConfigError(f"device is {device!r}; pass 'auto', 'cpu', 'cuda' or 'cuda:N'")


def _choose_backend(bundle: Bundle, name: str, device: str, index: int | None) -> Backend:
    """The best backend that `device` allows.

    Args:
        bundle: The checked bundle.
        name: Last part of the path that the user gave: `model.onnx` asks for ONNX Runtime.
        device: As the user gave it.
        index: Number of the CUDA device, None for the CPU.
    """
    if index is None:
        return _ort_on_cpu(bundle)
    if bundle.manifest.plan is None and name == PLAN:
        raise BundleError(f"{bundle.folder} has no {PLAN}; build one: python -m export.trt --precision fp16")
    reasons: list[str] = []
    if bundle.manifest.plan is None:
        reasons.append("the bundle has none")
    attempts: list[Callable[[], Backend]] = [functools.partial(_ort_on_cuda, bundle, index)]
    if bundle.manifest.plan is not None and name != GRAPH:
        attempts.insert(0, functools.partial(open_plan, bundle, index))
    for attempt in attempts:
        try:
            backend = attempt()
        except (DeviceMismatchError, MissingExtra) as err:
            if device != "auto":
                raise type(err)(f"device={device!r} was asked for: {err}; mend that, or pass device='auto'") from err
            reasons.append(str(err))
            continue
        if reasons:
            _warn_of_fallback(reasons[0], backend)
        return backend
    backend = _ort_on_cpu(bundle)
    if name != GRAPH:
        _warn_of_fallback(reasons[0], backend)
    return backend


def _warn_of_fallback(reason: str, backend: Backend) -> None:
    warnings.warn(
        f"{PLAN} is not used: {reason}. The graph it is built from runs on {backend.name} instead. Pass device='cpu' "
        "to ask for that, or device='cuda' to make this an error.",
        stacklevel=5,
    )


def _ort_on_cuda(bundle: Bundle, index: int) -> Backend:
    """ONNX Runtime's TensorRT and CUDA providers, those that are installed."""
    installed = [provider for provider in GPU if provider in available_providers()]
    if not installed:
        raise DeviceMismatchError(
            "the installed ONNX Runtime has no CUDA provider; pip install 'nvembed-deploy[gpu]' in place of [cpu]"
        )
    CudaRuntime.load().device(index)
    ordered = tuple((provider, {"device_id": index}) for provider in installed)
    return OrtBackend(
        bundle.folder / GRAPH,
        providers=(*ordered, CPU),
        as_written=bundle.manifest.precision.quantized,  # its full optimisation refuses signed pairs (1.27 to 1.32)
        dimension=bundle.manifest.dimension,
    )


def _ort_on_cpu(bundle: Bundle) -> Backend:
    has_own = CPU_GRAPH in bundle.manifest.files
    return OrtBackend(
        bundle.folder / (CPU_GRAPH if has_own else GRAPH),
        note=CPU_NOTES[bundle.manifest.precision.base] if has_own else "",
        dimension=bundle.manifest.dimension,
    )


def _check_vectors(output: Output, indices: list[int], backend: str) -> None:
    """Refuses vectors that are not finite or not of unit length; NaN fails every comparison, so it is caught too."""
    lengths = np.linalg.norm(output.embeddings, axis=1)
    good = np.abs(lengths - 1) <= UNIT_TOLERANCE
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise NumericsError(
            f"text {indices[row]}: {backend} gave a vector of length {lengths[row]} instead of 1; rebuild the "
            "engine in bf16: python -m export.trt --precision bf16"
        )


def _windows(texts: Iterable[object]) -> Iterator[list[object]]:
    iterator = iter(texts)
    while window := list(itertools.islice(iterator, WINDOW_TEXTS)):
        yield window


def _progress(show: bool, texts: Iterable[str]) -> Any:
    if not show:
        return nullcontext()
    from tqdm import tqdm

    return tqdm(total=len(texts) if isinstance(texts, Sized) else None, unit="text", desc="encoding")
