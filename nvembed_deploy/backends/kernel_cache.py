"""TensorRT-RTX's compiled kernels, kept between starts, so that the second start on a GPU compiles nothing.

A TensorRT-RTX plan holds kernels for no GPU in particular; the runtime compiles them where it runs, at the first start.
They are in the user's cache folder and not beside the plan: a bundle may be read-only, and holds nothing that its
manifest does not name. Source: TensorRT for RTX documentation, "Runtime cache".
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from nvembed_deploy.backends.bindings import TENSORRT_RTX, ask
from nvembed_deploy.backends.cuda import CudaDevice
from nvembed_deploy.bundle.manifest import PlanInfo
from nvembed_deploy.errors import EngineError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import cache_folder

_log = logging.getLogger(__name__)


class RuntimeCache:
    """The kernels of one plan on one kind of GPU; all execution contexts of an engine share them.

    Args:
        engine: The plan, loaded.
        path: Their file; a missing one, or one that the runtime does not take, is begun anew.
        logger: See `bindings.make_logger`.
        bindings: TensorRT-RTX's module, for its enumerations.
    """

    def __init__(self, engine: Any, path: Path, logger: Any, bindings: Any) -> None:
        self._engine, self._path, self._logger, self._bindings = engine, path, logger, bindings
        self._saving = threading.Lock()
        config = ask(logger, "creating the runtime configuration", engine.create_runtime_config)
        self._cache = ask(logger, "creating the runtime cache", config.create_runtime_cache)
        self._known = path.read_bytes() if path.is_file() else b""
        if self._known and not self._cache.deserialize(self._known):
            _log.info("%s is of another driver, GPU or version, and begun anew", path)

    @classmethod
    def of(
        cls, engine: Any, info: PlanInfo, sha256: str | None, device: CudaDevice, logger: Any, bindings: Any
    ) -> RuntimeCache | None:
        """The cache of a plan, or None: TensorRT proper compiles plans when it builds them."""
        if info.runtime != TENSORRT_RTX or sha256 is None:
            return None
        capability = device.compute_capability.replace(".", "")
        return cls(engine, cache_folder() / f"{sha256[:16]}-{info.version}-sm{capability}.kernels", logger, bindings)

    def context(self) -> Any:
        """A new execution context that takes its kernels from here, and leaves here what it compiles.

        A shape that comes again is launched as one CUDA graph, which the runtime captures by itself. Source: TensorRT
        for RTX documentation, "Working with CUDA graphs".
        """
        config = ask(self._logger, "creating the runtime configuration", self._engine.create_runtime_config)
        ask(self._logger, "setting the runtime cache", config.set_runtime_cache, self._cache)
        config.cuda_graph_strategy = self._bindings.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return ask(self._logger, "creating an execution context", self._engine.create_execution_context, config)

    def save(self) -> None:
        """Keeps what was compiled since the last time. Where that fails, the next start compiles again, and no more."""
        with self._saving:
            try:
                content = bytes(
                    memoryview(ask(self._logger, "reading the runtime cache", self._cache.serialize)).cast("B")
                )
                if content == self._known:
                    return
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_file(self._path, content)
                self._known = content
            except (OSError, EngineError) as err:
                _log.info("%s cannot be written (%s); the next start compiles again", self._path, err)
