"""A cache of TensorRT's kernel timings between builds. Source: TensorRT documentation, "Timing cache"."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed_deploy.backends.bindings import checked_call
from nvembed_deploy.errors import EngineError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import cache_folder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TimingCache:
    """A cache file for one TensorRT version and one kind of GPU; timings are not valid for others."""

    path: Path

    @classmethod
    def of(cls, bindings: Any, capability: str) -> TimingCache:
        """Returns the cache for a version of TensorRT and a GPU, in the user's cache folder."""
        return cls(
            cache_folder() / f"{bindings.__name__}-{bindings.__version__}-sm{capability.replace('.', '')}.timing"
        )

    def load(self, config: Any, logger: Any) -> None:
        """Gives the stored timings to the builder; a file that TensorRT refuses is ignored."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        try:
            self._set(config, logger, content)
        except EngineError:
            if not content:
                raise
            _log.warning("%s is damaged or was made on another GPU; starting with an empty timing cache", self.path)
            self._set(config, logger, b"")

    @staticmethod
    def _set(config: Any, logger: Any, content: bytes) -> None:
        cache = checked_call(logger, "creating the timing cache", config.create_timing_cache, content)
        checked_call(logger, "setting the timing cache", config.set_timing_cache, cache, False)

    def store(self, config: Any) -> None:
        """Stores the timings of a build. If the file cannot be written, the next build takes longer."""
        content = memoryview(config.get_timing_cache().serialize()).cast("B")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, content)
        except OSError as err:
            _log.warning(
                "%s cannot be written (%s); the next build will measure the kernels again", self.path, err.strerror
            )
