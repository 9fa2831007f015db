"""`OpenedBundle`: a bundle on its backend, opened again in other processes, and the options that it accepts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.backends.base import Backend, ClosedBackend
from nvembed_deploy.bundle.manifest import Manifest
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.bundle.vector_kinds import BOUNDED_BY, require_offered
from nvembed_deploy.encoder.batches import Layout, default_batch_tokens
from nvembed_deploy.encoder.windows import TokenRules
from nvembed_deploy.errors import THREAD_LIMIT, ConfigError, EngineError, is_thread_limit
from nvembed_deploy.tokenization import TextEncoder, Truncate
from nvembed_deploy.vectors import OutputDtype, convert

if TYPE_CHECKING:
    from typing_extensions import Self

    from nvembed_deploy.coalescer import Coalescer

Opener = Callable[[], tuple[Bundle, TextEncoder, Backend]]

_fork_lock = threading.Lock()


def fork_lock() -> threading.Lock:
    """Returns this process's lock for what is created once in a process."""
    return _fork_lock


def _renew_fork_lock() -> None:
    global _fork_lock
    _fork_lock = threading.Lock()  # a thread of the parent process may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_fork_lock)


class OpenedBundle:
    """A bundle on its backend, in this process: what it is, and the options of a call that it accepts.

    `Encoder` adds the embedding of texts. Forked and unpickled ones open the bundle again.
    """

    _bundle: Bundle
    _text: TextEncoder
    _backend: Backend

    def close(self) -> None:
        """Frees the engine and its memory; any further call raises `EngineError`. A second call does nothing."""
        self._is_closed = True
        self._backend = ClosedBackend(self._backend.name)
        if self._coalescer is not None:
            self._coalescer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[Opener, str | None], Self], tuple[Opener, str | None]]:
        """Pickles the path and the options; unpickling opens the bundle again."""
        return self._from_opener, (self._opener, self._query_instruction)

    @classmethod
    def _from_opener(cls, opener: Opener, query_instruction: str | None) -> Self:
        """Returns the parts that `opener` opens, here and in each process that the result is sent to."""
        opened = cls.__new__(cls)
        opened._open(opener, query_instruction)
        return opened

    def _open(self, opener: Opener, query_instruction: str | None) -> None:
        self._opener, self._query_instruction = opener, query_instruction
        try:
            self._bundle, self._text, self._backend = opener()
        except RuntimeError as err:
            if is_thread_limit(err):
                raise EngineError(THREAD_LIMIT) from err
            raise
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

    def _token_rules(
        self,
        instruction: str | None,
        prompt: str | None,
        prompt_name: str | None,
        *,
        max_length: int | None,
        truncate: Truncate,
    ) -> TokenRules:
        prefix = self._text.prompt(instruction, prompt, prompt_name)
        return TokenRules(
            prompt=self._prompts[prompt_name] if prompt_name else prefix,  # `query` with this encoder's instruction
            max_tokens=_limit("max_length", max_length, self.max_length, self.manifest.text.max_tokens),
            plan_tokens=self._backend.profile.max.tokens if self._backend.profile else None,
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
    ) -> Layout:
        max_rows = self.manifest.profile.max.batch
        layout = Layout(
            dim=self.output_dimension(dimensions),
            max_rows=_limit("batch_size", batch_size, max_rows, max_rows if self._backend.profile else None),
            max_tokens=_limit("batch_tokens", batch_tokens, default_batch_tokens(self._backend), None),
            normalize=normalize,
            dtype=self.offered_dtype(output_dtype),
        )
        if layout.dtype in BOUNDED_BY:
            if layout.dim != self.dimension:
                raise ConfigError(
                    f"{output_dtype} vectors are measured for {self.dimension} dimensions; omit dimensions"
                )
            if not normalize:
                raise ConfigError(f"{output_dtype} vectors are made of vectors of unit length; omit normalize=False")
        return layout

    def output_dimension(self, dimensions: int | None) -> int:
        """Returns the dimension of vectors that are truncated to `dimensions`, the bundle's for None.

        Raises:
            ConfigError: The model was not trained for it.
        """
        dim = _limit("dimensions", dimensions, self.dimension, self.dimension)
        matryoshka = self.manifest.source.architecture.matryoshka
        if dim != self.dimension and (matryoshka is None or not matryoshka.allows(dim, self.dimension)):
            cure = f"pass a supported dimension: {matryoshka}" if matryoshka else "omit dimensions"
            raise ConfigError(
                f"dimensions is {dim}; this model was not trained for vectors truncated to that dimension; {cure}"
            )
        return dim


def _limit(name: str, value: int | None, default: int, maximum: int | None) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ConfigError(f"{name} is {value!r}; pass a whole number of at least 1")
    if maximum is not None and value > maximum:
        raise ConfigError(f"{name} is {value}; this engine accepts at most {maximum}")
    return int(value)


def _checked_truncate(truncate: Truncate) -> Truncate:
    if not isinstance(truncate, bool) and truncate not in ("start", "end"):
        raise ConfigError(f"truncate is {truncate!r}; pass True (or 'end'), 'start' or False")
    return truncate
