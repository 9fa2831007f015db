"""Work that goes on beside the main thread, and dies with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class InBackground(Generic[Result]):
    """Runs a function on a thread that does not outlive the program: Ctrl-C does not wait for it."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._found: list[Result] = []
        self._error: BaseException | None = None

        def work() -> None:
            try:
                self._found.append(function())
            except BaseException as err:
                self._error = err

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def result(self) -> Result:
        """What the function gave, once it is done; its error is raised here."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]
