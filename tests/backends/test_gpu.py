"""The plan on a real device: the bundle that NVEMBED_BUNDLE names, or those of the tiny checkpoint."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy import BundleError, DeviceMismatchError, Encoder, MissingExtra
from nvembed_deploy.backends.cuda import CudaRuntime
from nvembed_deploy.backends.ort import OrtBackend
from nvembed_deploy.bundle.manifest import CPU_GRAPH, GRAPH
from nvembed_deploy.parity.compare import TOLERANCES, compare, compute_reference_outputs, require_passed
from nvembed_deploy.parity.probes import LONG_TEXT, PROBES
from nvembed_deploy.tokenization import TokenRow
from tests.conformance import check_encoder

pytestmark = pytest.mark.gpu
EDGES = (1, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 511, 512)
THREADS, CALLS = 16, 1000
NAMED = os.environ.get("NVEMBED_BUNDLE")


@pytest.fixture(scope="module", params=[NAMED] if NAMED else ["fp16", "bf16", "fp32"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    try:
        CudaRuntime.load().device(0)
        return Encoder(NAMED or request.getfixturevalue("bundles")[request.param] / "engine.plan", device="cuda")
    except (DeviceMismatchError, MissingExtra, BundleError) as err:
        if os.environ.get("NVEMBED_GPU") == "required":  # `make bench-gpu`: a skip would look like a pass
            raise
        pytest.skip(f"no plan can be run here: {err}")


def rows_of(encoder: Encoder, lengths: list[int]) -> list[TokenRow]:
    text = LONG_TEXT * (1 + max(lengths) // 40)
    return [encoder._text.tokenize([text[i:]], max_length=length)[0] for i, length in enumerate(lengths)]


def run(encoder: Encoder, rows: list[TokenRow]) -> np.ndarray:
    return encoder._backend.run(encoder._text.pad(rows)).embeddings


def test_the_plan_is_the_backend(encoder: Encoder) -> None:
    assert encoder.manifest.plan is not None
    assert encoder.backend.startswith(encoder.manifest.plan.runtime)
    tolerance = TOLERANCES[encoder.manifest.precision]
    check_encoder(encoder, tolerance=tolerance.max_difference / (encoder.dimension**0.5 if tolerance.scaled else 1))


def test_plan_against_onnx_runtime(encoder: Encoder) -> None:
    folder = encoder._bundle.folder
    graph = CPU_GRAPH if (folder / CPU_GRAPH).exists() else GRAPH
    manifest = encoder.manifest
    precision, largest, text = manifest.precision, manifest.profile.max, encoder._text
    reference_outputs = compute_reference_outputs(
        OrtBackend(folder / graph), text, precision=precision, max_shape=largest
    )
    report = compare(reference_outputs, encoder._backend, text, precision=precision, max_shape=largest)
    print(report.summary())  # noqa: T201
    require_passed(report)


def test_padding_and_other_rows_change_nothing(encoder: Encoder) -> None:
    """Lengths at and next to every bucket's edge: alone, together, shuffled, beside longer rows, in every size."""
    largest = encoder.manifest.profile.max
    lengths = sorted({edge + step for edge in EDGES for step in (-1, 0, 1)} & set(range(1, encoder.max_length + 1)))
    rows = rows_of(encoder, lengths)
    alone = np.concatenate([run(encoder, [row]) for row in rows])
    order = np.random.default_rng(0).permutation(len(rows))
    bound = TOLERANCES[encoder.manifest.precision].min_batch_cosine
    for size in sorted({size for size in (2, 3, 7, 8, 9, 31, largest.batch) if size <= largest.batch}):
        for start in range(0, len(rows), size):
            indices = order[start : start + size]
            together = run(encoder, [rows[index] for index in indices])
            assert (together * alone[indices]).sum(axis=1).min() >= bound, (size, [lengths[index] for index in indices])
    for index, row in enumerate(rows):
        padded = run(encoder, [row, rows[-1]])[0]
        assert padded @ alone[index] >= bound, lengths[index]


def test_every_token_of_the_vocabulary(encoder: Encoder) -> None:
    contract = encoder.manifest.text
    count = encoder.manifest.source.architecture.vocab_size
    rows = [
        TokenRow(ids=[*contract.prefix_ids, token, *contract.suffix_ids], prompt_tokens=0, truncated=False)
        for token in range(count)
    ]
    size = encoder.manifest.profile.max.batch
    vectors = np.concatenate([run(encoder, rows[start : start + size]) for start in range(0, count, size)])
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    bound = TOLERANCES[encoder.manifest.precision].min_batch_cosine
    for token in range(0, count, max(1, count // 1000)):
        assert run(encoder, [rows[token]])[0] @ vectors[token] >= bound, token


@pytest.mark.slow
def test_threads_return_the_vectors_of_one_thread(encoder: Encoder) -> None:
    """16 threads make 1,000 calls each; a mixed-up buffer would return another text's vector, far outside the bound."""
    texts = [text for _, text in PROBES]
    serial = np.stack([encoder.encode(text) for text in texts])
    bound = TOLERANCES[encoder.manifest.precision].min_batch_cosine

    def work(thread: int) -> float:
        picks = [(thread * 7 + call) % len(texts) for call in range(CALLS)]
        return min(float(encoder.encode(texts[pick]) @ serial[pick]) for pick in picks)

    with ThreadPoolExecutor(THREADS) as pool:
        assert min(pool.map(work, range(THREADS))) >= bound


def test_a_process_exits_without_errors(encoder: Encoder) -> None:
    """Contexts, streams and pinned memory of several threads are freed before CUDA shuts down."""
    code = (
        "import sys, threading; from nvembed_deploy import Encoder\n"
        "encoder = Encoder(sys.argv[1], device='cuda')\n"
        "threads = [threading.Thread(target=encoder.encode, args=('water',)) for _ in range(4)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "print(encoder.encode('water').shape)\n"
    )
    command = [sys.executable, "-c", code, str(encoder._bundle.folder / Path("engine.plan"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"({encoder.dimension},)\n")
