"""Checkpoints that the tests of this folder share."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Returns the checkpoint of a name, each made once. Read only."""
    root = tmp_path_factory.mktemp("stock")

    def of(name: str) -> Path:
        from tests.model.stock import make_checkpoint

        folder = root / name.replace(" ", "-")
        return folder if folder.exists() else make_checkpoint(name, folder)

    yield of
    shutil.rmtree(root)
