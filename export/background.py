"""Work that runs beside the main thread and ends with the program."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def run_in_background(function: Callable[[], Result]) -> Future[Result]:
    """Runs a function on a daemon thread and returns its future.

    The threads of a `ThreadPoolExecutor` are joined when Python exits, so that Ctrl-C would have to wait for them. A
    daemon thread is not.

    Args:
        function: The function to run; an exception that it raises is raised again by the future's `result`.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as err:  # whatever it is, `result` raises it on the thread that asks
            future.set_exception(err)

    threading.Thread(target=work, daemon=True).start()
    return future
