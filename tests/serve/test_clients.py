"""Three of the clients in docs/use-with.md, as that page uses them; `python -m benchmarks.clients` runs all."""

import sys
from collections.abc import Iterator

import pytest

for library in ("fastapi", "openai", "ollama", "huggingface_hub"):
    pytest.importorskip(library, reason=f"{library} is not installed: make test installs it")

from benchmarks.clients import MODEL, TOLERANCE, Block, RunningServer, blocks, difference, run_block  # noqa: E402
from nvembed_deploy import Encoder  # noqa: E402
from tests.readme import ROOT  # noqa: E402

CLIENTS = ("openai", "openai, NIM's fields", "ollama", "huggingface_hub")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with RunningServer() as url:
        yield url


@pytest.fixture(scope="module")
def mini() -> Encoder:
    return Encoder(ROOT / MODEL, device="cpu", backend="onnxruntime")


@pytest.mark.parametrize("block", [block for block in blocks() if block.client in CLIENTS], ids=lambda b: b.client)
def test_a_client_gets_the_encoders_vectors(block: Block, url: str, mini: Encoder) -> None:
    assert difference(run_block(block, sys.executable, url), mini) <= TOLERANCE


def test_every_block_of_the_page_is_run() -> None:
    page = (ROOT / "docs" / "use-with.md").read_text(encoding="utf-8")
    assert len(blocks()) == page.count("```python")
    assert {block.client for block in blocks()} >= set(CLIENTS)
