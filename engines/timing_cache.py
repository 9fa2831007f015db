"""TensorRT's measured kernel times, kept between builds. Source: TensorRT documentation, "Timing cache"."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed_deploy.backends.bindings import ask
from nvembed_deploy.errors import EngineError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import cache_folder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TimingCache:
    """A file of one TensorRT version and one kind of GPU; what it holds is worth nothing elsewhere."""

    path: Path

    @classmethod
    def of(cls, bindings: Any, capability: str) -> TimingCache:
        """The file for these bindings and this GPU, in the user's cache folder."""
        return cls(
            cache_folder() / f"{bindings.__name__}-{bindings.__version__}-sm{capability.replace('.', '')}.timing"
        )

    def load(self, config: Any, logger: Any) -> None:
        """Gives the builder what is known; a file that TensorRT does not take is left out."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        try:
            self._give(config, logger, content)
        except EngineError:
            if not content:
                raise
            _log.warning("%s is of another GPU or damaged, and begun anew", self.path)
            self._give(config, logger, b"")

    @staticmethod
    def _give(config: Any, logger: Any, content: bytes) -> None:
        cache = ask(logger, "creating the timing cache", config.create_timing_cache, content)
        ask(logger, "setting the timing cache", config.set_timing_cache, cache, False)

    def store(self, config: Any) -> None:
        """Keeps what was measured. A cache that cannot be written costs time at the next build, and nothing else."""
        content = memoryview(config.get_timing_cache().serialize()).cast("B")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, content)
        except OSError as err:
            _log.warning("%s cannot be written (%s); the next build measures again", self.path, err.strerror)
