"""Cache of TensorRT-RTX's compiled kernels, so that only the first start on a GPU compiles them.

A TensorRT-RTX plan contains no kernels for a specific GPU; the runtime compiles them at the first start. They are
stored in the user's cache folder instead of the bundle, which may be read-only and contains only files that its
manifest lists. Source: TensorRT for RTX documentation, "Runtime cache".
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from nvembed_deploy.backends.bindings import TENSORRT_RTX, checked_call
from nvembed_deploy.backends.cuda import CudaDevice
from nvembed_deploy.bundle.manifest import PlanInfo
from nvembed_deploy.errors import EngineError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import cache_folder

_log = logging.getLogger(__name__)


class RuntimeCache:
    """The kernels of one plan on one kind of GPU; all execution contexts of an engine share them.

    Args:
        engine: The loaded plan.
        path: The cache file; if it is missing or the runtime rejects it, the cache starts empty.
        logger: See `bindings.make_logger`.
        bindings: TensorRT-RTX's module, for its enumerations.
    """

    def __init__(self, engine: Any, path: Path, logger: Any, bindings: Any) -> None:
        self._engine, self._path, self._logger, self._bindings = engine, path, logger, bindings
        self._saving = threading.Lock()
        config = checked_call(logger, "creating the runtime configuration", engine.create_runtime_config)
        self._cache = checked_call(logger, "creating the runtime cache", config.create_runtime_cache)
        self._saved_content = path.read_bytes() if path.is_file() else b""
        if self._saved_content and not self._cache.deserialize(self._saved_content):
            _log.info("%s belongs to another driver, GPU or version; its kernels are compiled again", path)

    @classmethod
    def of(
        cls, engine: Any, info: PlanInfo, sha256: str | None, device: CudaDevice, logger: Any, bindings: Any
    ) -> RuntimeCache | None:
        """Returns the cache of a plan, or None for TensorRT, which compiles kernels at build time."""
        if info.runtime != TENSORRT_RTX or sha256 is None:
            return None
        capability = device.compute_capability.replace(".", "")
        return cls(engine, cache_folder() / f"{sha256[:16]}-{info.version}-sm{capability}.kernels", logger, bindings)

    def context(self) -> Any:
        """Returns a new execution context that reads its kernels from this cache and adds those that it compiles.

        Repeated shapes are launched as one CUDA graph, which the runtime captures by itself. Source: TensorRT
        for RTX documentation, "Working with CUDA graphs".
        """
        config = checked_call(self._logger, "creating the runtime configuration", self._engine.create_runtime_config)
        checked_call(self._logger, "setting the runtime cache", config.set_runtime_cache, self._cache)
        config.cuda_graph_strategy = self._bindings.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return checked_call(
            self._logger, "creating an execution context", self._engine.create_execution_context, config
        )

    def save(self) -> None:
        """Saves new kernels; if that fails, the next start compiles them again."""
        with self._saving:
            try:
                content = bytes(
                    memoryview(checked_call(self._logger, "reading the runtime cache", self._cache.serialize)).cast("B")
                )
                if content == self._saved_content:
                    return
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_file(self._path, content)
                self._saved_content = content
            except (OSError, EngineError) as err:
                _log.info("%s cannot be written (%s); the next start will compile the kernels again", self._path, err)
