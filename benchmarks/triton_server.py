"""`python -m benchmarks.triton_server BUNDLE --python ENV/bin/python`: a Triton server on an exported repository.

ENV is an environment with the server of the package nvidia-pytriton, which has the Python backend and no other:

    python3.11 -m venv ENV
    ENV/bin/pip install --no-deps nvidia-pytriton==0.7.0
    ENV/bin/pip install 'numpy<2' onnxruntime -e .

The repository is written by `nvembed triton`; tokenizer and ensemble are served unchanged. As there is no backend for
ONNX Runtime, the engine's model runs it in the Python backend, with the rest of its configuration unchanged. Compares
the answers with `Encoder`'s and writes benchmarks/results/triton_server.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import http.client
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.console import BUNDLE_HELP, echo, run
from nvembed_deploy.encoder import Encoder
from nvembed_deploy.errors import ConfigError, EngineError, ParityError
from nvembed_deploy.export.triton import ONNXRUNTIME, write_repository
from nvembed_deploy.files.atomic import write_file
from nvembed_deploy.system import describe_machine

RESULT = Path("benchmarks") / "results" / "triton_server.json"
START_SECONDS = 180.0
CLIENTS, REQUESTS = 200, 200
MAX_DIFFERENCE = 1e-5
"""Of a component, as another batch has another order of additions."""
INSTRUCTION = "Given a question, retrieve passages that answer the question"
TEXTS = ("the water over the bridge", "", "   ", "日本語の文です。", "a b c " * 1000, "Ünïcödé \u2028 👩‍👩‍👧", "word")
ENGINE = '''"""Runs the engine's graph on ONNX Runtime in Triton's Python backend."""

from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as backend


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]

    def execute(self, requests):
        arrays = [
            np.concatenate([backend.get_input_tensor_by_name(request, name).as_numpy() for request in requests])
            for name in self.inputs
        ]
        results = self.session.run(self.outputs, dict(zip(self.inputs, arrays)))
        responses, start = [], 0
        for request in requests:
            rows = backend.get_input_tensor_by_name(request, self.inputs[0]).as_numpy().shape[0]
            tensors = [backend.Tensor(n, r[start : start + rows]) for n, r in zip(self.outputs, results)]
            responses.append(backend.InferenceResponse(output_tensors=tensors))
            start += rows
        return responses
'''


class Client:
    """Sends requests to a Triton server in KServe's protocol over HTTP, texts as binary data."""

    def __init__(self, port: int) -> None:
        self.port = port

    def infer(self, texts: Sequence[bytes], **optional: str) -> NDArray[np.float32]:
        """Returns the embeddings of texts, float32 [N, D].

        Args:
            texts: The texts.
            optional: Instruction or prompt name of all texts.

        Raises:
            EngineError: The server refused the request; the message is its own.
        """
        columns = {"text": list(texts)} | {name: [value.encode()] * len(texts) for name, value in optional.items()}
        payloads = [b"".join(struct.pack("<I", len(text)) + text for text in column) for column in columns.values()]
        inputs = [
            {
                "name": name,
                "datatype": "BYTES",
                "shape": [len(texts), 1],
                "parameters": {"binary_data_size": len(payload)},
            }
            for name, payload in zip(columns, payloads, strict=True)
        ]
        header = json.dumps({"inputs": inputs}).encode()
        status, answer = self.request(
            "POST",
            "/v2/models/nvembed/infer",
            header + b"".join(payloads),
            {"Inference-Header-Content-Length": str(len(header))},
        )
        if status != 200:
            raise EngineError(answer["error"])
        output = answer["outputs"][0]
        return np.array(output["data"], dtype=np.float32).reshape(output["shape"])

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Returns the status and the JSON of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        return response.status, json.loads(content) if content else None


def free_ports(count: int) -> list[int]:
    """Returns ports that nothing listens on."""
    with contextlib.ExitStack() as sockets:
        bound = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in bound:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in bound]


def serve_with_python_engine(repository: Path) -> None:
    """Makes the engine's model run in the Python backend."""
    engine = repository / "nvembed_engine"
    config = (engine / "config.pbtxt").read_text(encoding="utf-8")
    for before, after in ((f'backend: "{ONNXRUNTIME}"', 'backend: "python"'), ("KIND_AUTO", "KIND_CPU")):
        assert config.count(before) == 1
        config = config.replace(before, after)
    (engine / "config.pbtxt").write_text(config, encoding="utf-8")
    (engine / "1" / "model.py").write_text(ENGINE, encoding="utf-8")


@contextlib.contextmanager
def server(repository: Path, python: Path, work: Path) -> Iterator[tuple[subprocess.Popen[bytes], Client, Path]]:
    """Starts a Triton server; yields its process, a client, and its log.

    Raises:
        ConfigError: The environment has no server.
    """
    question = (
        "import sys, sysconfig; from importlib.util import find_spec; print(sys.version_info[1], "
        "sysconfig.get_config_var('LIBDIR'), find_spec('pytriton').submodule_search_locations[0])"
    )
    told = subprocess.run([python, "-c", question], capture_output=True, text=True, check=False)
    if told.returncode:
        raise ConfigError(f"--python {python} has no nvidia-pytriton ({told.stderr.strip().splitlines()[-1]})")
    minor, libraries, package = told.stdout.split()
    root = Path(package) / "tritonserver"
    backends = work / "backends"
    shutil.copytree(root / "backends" / "python", backends / "python", dirs_exist_ok=True)
    stub = "triton_python_backend_stub"  # of the environment's Python
    shutil.copy(root / "python_backend_stubs" / f"3.{minor}" / stub, backends / "python" / stub)
    http_port, grpc_port, metrics_port = free_ports(3)
    log = work / "server.log"
    environment = os.environ | {
        "PATH": f"{python.parent}:{os.environ['PATH']}",  # the stub takes the first Python there
        "LD_LIBRARY_PATH": f"{libraries}:{Path(package).parent / 'nvidia_pytriton.libs'}",
    }
    environment.pop("PYTHONPATH", None)
    command = [
        str(root / "bin" / "tritonserver"), f"--model-repository={repository}", f"--backend-directory={backends}",
        "--http-address=127.0.0.1", f"--http-port={http_port}", f"--grpc-port={grpc_port}",
        f"--metrics-port={metrics_port}", "--exit-on-error=true", "--log-verbose=1",
    ]  # fmt: skip
    with log.open("wb") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process:
        try:
            yield process, Client(http_port), log
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_ready(process: subprocess.Popen[bytes], client: Client, log: Path) -> float:
    """Waits until all models are loaded, and returns the seconds.

    Raises:
        EngineError: The server ended, or took too long; the message has the last lines of its log.
    """
    started = time.monotonic()
    while time.monotonic() - started < START_SECONDS and process.poll() is None:
        with contextlib.suppress(OSError):
            if client.request("GET", "/v2/health/ready")[0] == 200:
                return time.monotonic() - started
        time.sleep(0.2)
    raise EngineError("the server did not start:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:]))


def refusal(call: Callable[[], object]) -> str:
    """Returns the message with which the server refuses a request.

    Raises:
        ParityError: It did not.
    """
    try:
        call()
    except EngineError as err:
        return str(err)
    raise ParityError("the server answered a request that it should refuse")


def compare(client: Client, encoder: Encoder) -> dict[str, Any]:
    """Sends the requests and returns how far the answers are from the encoder's."""
    encoded = [text.encode() for text in TEXTS]
    prompts: tuple[dict[str, str], ...] = (
        {},
        {"instruction": INSTRUCTION},
        {"instruction": ""},
        {"prompt_name": "query"},
        {"prompt_name": "document"},
    )

    def expected(texts: Sequence[str], **optional: str) -> NDArray[Any]:
        prompt = encoder.prompts.get(optional.get("prompt_name", ""))
        return encoder.encode(list(texts), prompt=prompt, instruction=optional.get("instruction"))

    single = max(
        float(np.abs(client.infer([data], **optional) - expected([text], **optional)).max())
        for optional in prompts
        for text, data in zip(TEXTS, encoded, strict=True)
    )
    together = float(np.abs(client.infer(encoded) - expected(TEXTS)).max())
    many = [f"text number {index} " + "over the water " * (index % 30) for index in range(REQUESTS)]
    before = _engine_counts(client)
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        concurrent_vectors = np.concatenate(list(pool.map(lambda text: client.infer([text.encode()]), many)))
    calls, rows = (after - count for after, count in zip(_engine_counts(client), before, strict=True))
    concurrently = float(np.abs(concurrent_vectors - expected(many)).max())
    differences = {"single": single, "one_request_of_seven": together, f"{REQUESTS}_concurrent": concurrently}
    if max(differences.values()) > MAX_DIFFERENCE:
        raise ParityError(f"the server's vectors differ by more than {MAX_DIFFERENCE}: {differences}")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        bad = pool.submit(refusal, lambda: client.infer([b"a \xff"]))
        good = [pool.submit(client.infer, [b"good"]) for _ in range(2)]
        refused = {"not_utf8": bad.result()}
        beside_bad = max(float(np.abs(future.result() - expected(["good"])).max()) for future in good)
    max_rows = encoder.manifest.profile.max.batch
    refused |= {
        "too_many_rows": refusal(lambda: client.infer([b"a"] * (max_rows + 1))),
        "unknown_prompt": refusal(lambda: client.infer([b"a"], prompt_name="xyz")),
        "two_prompts": refusal(lambda: client.infer([b"a"], prompt_name="query", instruction="x")),
    }
    return {
        "largest_difference": {name: float(f"{value:.2g}") for name, value in differences.items()},
        "beside_a_bad_request": float(f"{beside_bad:.2g}"),
        "engine_calls_for_concurrent_rows": [calls, rows],
        "refused": refused,
    }


def _engine_counts(client: Client) -> tuple[int, int]:
    """Returns the engine's calls and rows so far; they are counted shortly after an answer is sent."""
    time.sleep(0.5)
    stats = client.request("GET", "/v2/models/nvembed_engine/stats")[1]["model_stats"][0]
    return stats["execution_count"], stats["inference_count"]


def measure(bundle: Path, python: Path, numpy2_python: Path | None, work: Path) -> dict[str, Any]:
    """Serves the bundle, compares, and returns the record."""
    repository = work / "repository"
    write_repository(
        Bundle.open(bundle), repository, name="nvembed", platform=ONNXRUNTIME, instances=1, tokenizer_instances=2
    )
    serve_with_python_engine(repository)
    record: dict[str, Any] = {}
    with server(repository, python, work) as (process, client, log):
        record["seconds_to_ready"] = round(wait_until_ready(process, client, log), 1)
        status = client.request("GET", "/v2")[1]
        record["server"] = f"{status['name']} {status['version']}"
        record["warm_up_samples"] = sorted(
            set(re.findall(r"running warmup sample '(\w+)'", log.read_text(errors="replace")))
        )
        record |= compare(client, Encoder(bundle, device="cpu", backend="onnxruntime"))
        model = client.request("POST", "/v2/repository/index", b"{}")[1]
        record["models"] = {entry["name"]: entry["state"] for entry in model}
    if numpy2_python is not None:
        (work / "numpy2").mkdir()
        with server(repository, numpy2_python, work / "numpy2") as (process, client, log):
            try:
                wait_until_ready(process, client, log)
            except EngineError:
                lines = log.read_text(errors="replace").splitlines()
                notes = [line for line in lines if "numpy<2" in line]
                if not notes:
                    raise
                record["numpy_2"] = f"the tokenizer is not loaded; {notes[0]}"
            else:
                raise ParityError("the server loads the tokenizer in a Python whose NumPy it cannot use")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, in the root of a checkout."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.triton_server",
        description=__doc__.split(": ", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help=BUNDLE_HELP)
    parser.add_argument("--python", type=Path, required=True, help="the Python of the environment with the server")
    parser.add_argument("--numpy2", type=Path, metavar="PYTHON", help="that of one with NumPy 2, which must be refused")
    parser.add_argument("--out", type=Path, default=RESULT, help="record to write (default: %(default)s)")
    flags = parser.parse_args(argv)

    def command() -> None:
        with tempfile.TemporaryDirectory(prefix="nvembed-triton-") as work:
            result = measure(
                flags.bundle, flags.python.absolute(), flags.numpy2 and flags.numpy2.absolute(), Path(work)
            )
        record = {
            "command": "python -m benchmarks.triton_server BUNDLE --python ENV/bin/python --numpy2 ENV2/bin/python",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "precision": Bundle.open(flags.bundle).manifest.precision.value,
            **result,
        }
        write_file(flags.out, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
        echo(json.dumps(record, indent=1, ensure_ascii=False))
        sys.stdout.write(f"{flags.out}\n")

    return run(command)


if __name__ == "__main__":
    raise SystemExit(main())
