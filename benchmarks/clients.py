"""`python -m benchmarks.clients`: runs each block of docs/use-with.md with the real package, and compares the vectors.

The packages do not resolve together, so each group has an environment of its own below `--environments`, which is made
once. The server is a process of its own with the embedded model. Writes benchmarks/results/clients.json, from which
`tools.readme` makes the table of that page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_deploy import Encoder
from nvembed_deploy.console import echo, run
from nvembed_deploy.errors import DeployError
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "use-with.md"
RESULT = ROOT / "benchmarks" / "results" / "clients.json"
MODEL = "models/nv-embed-mini"
ADDRESS = "http://127.0.0.1:8080"
"""The server's address in the page, which the block gets the real one for."""
TOLERANCE = 2e-6
"""Maximum difference of two components: both are the same engine's, alone or in another batch."""
BLOCK = re.compile(r"<!-- client: (.+?); environment: (\w+) -->\n```python\n(.*?)```", re.DOTALL)
ENVIRONMENTS = {
    "vendors": (
        "openai==3.57.0",
        "cohere==7.3.1",
        "voyageai==0.5.0",
        "ollama==0.6.3",
        "litellm==1.110.2",
        "huggingface_hub==2.4.0",
        "numpy",
    ),
    "langchain": (
        "langchain-openai==1.7.4",
        "langchain-nvidia-ai-endpoints==1.5.0",
        "llama-index-embeddings-openai-like==0.4.0",
        "llama-index-embeddings-nvidia==0.6.0",
        "numpy",
    ),
    "haystack": ("haystack-ai==3.4.1", "nvidia-haystack==3.0.0", "chromadb==1.5.9", "openai==3.57.0", "numpy"),
    "optimum": ("optimum-onnx[onnxruntime]==0.1.0", "torch==2.13.0", "numpy"),
    # With this package itself, on ONNX Runtime.
    "project": (
        "--editable",
        f"{ROOT}[cpu]",
        "langchain-core==1.8.3",
        "langchain-tests==1.1.9",
        "llama-index-core==0.14.25",
        "chromadb==1.5.9",
        "txtai==9.14.0",
        "llm==0.36",
    ),
}
QUERY = "why do cats purr?"
DOCUMENTS = [
    "Purring calms the cat, and vibrations of that frequency are said to help bones heal.",
    "Salt lowers the freezing point of water, which is why it is spread on icy roads.",
    "Die Katze schnurrt.",
]
OUTPUT = """
import json, numpy
print()
print(json.dumps([numpy.asarray(query_vector, float).tolist(), numpy.asarray(document_vectors, float).tolist()]))
"""
QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "ANONYMIZED_TELEMETRY": "False",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "HF_HUB_OFFLINE": "0",
}
"""Settings of the packages that keep them from connecting to other hosts; huggingface_hub's would forbid any server."""


@dataclass(frozen=True)
class Block:
    """A block of the page."""

    client: str
    environment: str
    code: str


def blocks() -> list[Block]:
    """Returns the blocks of the page, in order."""
    return [Block(*match) for match in BLOCK.findall(PAGE.read_text(encoding="utf-8"))]


def run_block(block: Block, python: Path | str, url: str) -> tuple[np.ndarray, np.ndarray]:
    """Runs a block in another process.

    Args:
        block: The block.
        python: The interpreter of its environment.
        url: The server's address.

    Returns:
        The query's vector [D] and the documents' vectors [N, D].

    Raises:
        DeployError: It failed; the message has the last line of its error.
    """
    code = f"query = {QUERY!r}\ndocuments = {DOCUMENTS!r}\n{block.code.replace(ADDRESS, url)}{OUTPUT}"
    done = subprocess.run(
        [str(python), "-W", "ignore", "-c", code],
        cwd=ROOT, env=os.environ | QUIET, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise DeployError(f"{block.client}: {done.stderr.strip().splitlines()[-1][:500]}")
    query_vector, document_vectors = json.loads(done.stdout.splitlines()[-1])
    return np.array(query_vector), np.array(document_vectors)


def difference(vectors: tuple[np.ndarray, np.ndarray], encoder: Encoder) -> float:
    """Returns the maximum difference of a component from the encoder's vectors, infinite for other shapes."""
    expected = encoder.encode_query(QUERY), encoder.encode_document(DOCUMENTS)
    if any(actual.shape != right.shape for actual, right in zip(vectors, expected, strict=True)):
        return float("inf")
    return max(float(np.abs(actual - right).max()) for actual, right in zip(vectors, expected, strict=True))


class RunningServer:
    """`nvembed serve` of the embedded model on a free port, as a process of its own."""

    def __enter__(self) -> str:
        # The same engine as the encoder's: OpenVINO rounds otherwise.
        flags = ["--port", "0", "--device", "cpu", "--backend", "onnxruntime"]
        command = [sys.executable, "-m", "nvembed_deploy", "serve", MODEL, *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        url = self.process.stdout.readline().strip()
        if not url:
            raise DeployError("the server did not start; see its message above")
        return url.removesuffix("/v1")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)


def environment(name: str, folder: Path) -> Path:
    """Returns the interpreter of an environment, which is made if it does not exist in these versions."""
    path, packages = folder / name, ENVIRONMENTS[name]
    stamp = path / "packages.json"
    if not stamp.is_file() or json.loads(stamp.read_text(encoding="utf-8")) != list(packages):
        echo(f"making the environment {name}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", path], check=True)
        pip = [path / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*map(str, pip), *packages], check=True)
        stamp.write_text(json.dumps(packages), encoding="utf-8")
    return path / "bin" / "python"


LANGCHAIN_TESTS = """
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from nvembed_deploy.integrations.langchain import BundleEmbeddings


class Parameters:
    embeddings_class = property(lambda self: BundleEmbeddings)
    embedding_model_params = property(lambda self: {"path": "models/nv-embed-mini", "device": "cpu"})


class TestUnit(Parameters, EmbeddingsUnitTests):
    pass


class TestIntegration(Parameters, EmbeddingsIntegrationTests):
    pass
"""


def run_langchain_tests(python: Path) -> dict[str, Any]:
    """Runs LangChain's own tests of the class that `integrations.langchain` has, and returns the row of the record."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "test_langchain.py")
        path.write_text(LANGCHAIN_TESTS, encoding="utf-8")
        command = [str(python), "-m", "pytest", "-q", "--rootdir", folder, "-o", "asyncio_mode=auto", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    last_line = done.stdout.strip().splitlines()[-1]
    return {
        "client": f"langchain-tests: {re.sub(r' in .*', '', last_line)}",
        "packages": [name for name in ENVIRONMENTS["project"] if name.startswith("langchain")],
        "same_vectors": done.returncode == 0,
        "max_difference": None,
        "error": None if done.returncode == 0 else done.stdout[-2000:],
        "seconds": round(time.perf_counter() - started, 1),
    }


def measure(folder: Path) -> list[dict[str, Any]]:
    """Runs every block and returns a row for each."""
    rows: list[dict[str, Any]] = []
    encoder = Encoder(ROOT / MODEL, device="cpu", backend="onnxruntime")
    with RunningServer() as url:
        for block in blocks():
            python = environment(block.environment, folder)
            started = time.perf_counter()
            try:
                error, largest = None, difference(run_block(block, python, url), encoder)
            except DeployError as err:
                error, largest = str(err), float("inf")
            rows.append(
                {
                    "client": block.client,
                    "packages": [name for name in ENVIRONMENTS[block.environment] if "==" in name],
                    "same_vectors": largest <= TOLERANCE,
                    "max_difference": None if largest == float("inf") else largest,
                    "error": error,
                    "seconds": round(time.perf_counter() - started, 1),
                }
            )
            echo(f"{block.client}: {'the same vectors' if rows[-1]['same_vectors'] else error or largest}")
    rows.append(run_langchain_tests(environment("project", folder)))
    echo(rows[-1]["client"])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 if a block failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__)
    parser.add_argument("--environments", type=Path, default=Path("build/clients"), help="(default: %(default)s)")
    flags = parser.parse_args(argv)

    def command() -> None:
        rows = measure(flags.environments.absolute())
        record = {
            "command": "python -m benchmarks.clients",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "tolerance": TOLERANCE,
            "rows": rows,
        }
        write_file(RESULT, (json.dumps(record, indent=1) + "\n").encode())
        if wrong := [row["client"] for row in rows if not row["same_vectors"]]:
            raise DeployError(f"{len(wrong)} of {len(rows)} clients fail: {', '.join(wrong)}")
        echo(f"{len(rows)} of {len(rows)} clients have the encoder's vectors; see {RESULT.relative_to(ROOT)}")

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
