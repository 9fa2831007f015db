"""OpenVINO: the same checks as every backend, and the choice between it and ONNX Runtime."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install nvembed-deploy[openvino]")

from nvembed_deploy import ConfigError, Encoder, EngineError, cpu_runtime, select_backend
from nvembed_deploy.backends import ov
from nvembed_deploy.backends.base import Output
from nvembed_deploy.backends.ov import OvBackend
from nvembed_deploy.tokenization import TokenBatch
from tests.conformance import TEXTS, check_encoder
from tests.conftest import MEASURED_CHOICE

pytestmark = pytest.mark.whole_machine


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(select_backend, "fastest_cpu_runtime", MEASURED_CHOICE)
    return tmp_path / "cache" / "nvembed-deploy"


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-6), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_conformance(bundles: dict[str, Path], precision: str, tolerance: float) -> None:
    encoder = Encoder(bundles[precision], backend="openvino")
    assert encoder.backend.startswith("openvino ")
    check_encoder(encoder, tolerance=tolerance)


def test_fp32_equals_onnx_runtime(bundles: dict[str, Path]) -> None:
    vectors = Encoder(bundles["fp32"], backend="openvino").encode(TEXTS)
    expected = Encoder(bundles["fp32"], device="cpu", backend="onnxruntime").encode(TEXTS)
    assert np.abs(vectors - expected).max() <= 5e-6


def test_memory_does_not_grow_with_each_new_shape(bundles: dict[str, Path]) -> None:
    """Each shape compiles kernels of 1.5 MiB, of which OpenVINO by itself keeps those of hundreds of shapes."""
    encoder = Encoder(bundles["fp16"], backend="openvino")

    def embed(token_counts: range) -> float:
        for tokens in token_counts:
            for rows in range(1, 17):
                ids, mask = np.full((rows, tokens), 7, dtype=np.int64), np.ones((rows, tokens), dtype=np.int64)
                encoder._backend.run(TokenBatch(input_ids=ids, attention_mask=mask, pool_mask=mask))
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    before = embed(range(8, 18))
    assert embed(range(18, 22)) - before < 40  # MiB; 95 without a limit


def test_bf16_is_rounded_by_openvino_only(bundles: dict[str, Path]) -> None:
    """A BF16 bundle's CPU graph rounds every result for ONNX Runtime; with OpenVINO the rounding is removed."""
    core = ov._openvino().Core()
    graph = core.read_model(str(bundles["bf16"] / "model.cpu.onnx"))
    before = _bf16_results(graph)
    ov._remove_rounding(graph, ov._openvino().Type)
    assert before - {"Constant"}
    assert _bf16_results(graph) <= {"Constant"}
    reference, rounded, vectors = (
        Encoder(bundles[precision], device="cpu", backend=backend).encode(TEXTS)
        for precision, backend in (("fp32", "onnxruntime"), ("bf16", "onnxruntime"), ("bf16", "openvino"))
    )
    assert np.abs(vectors - reference).max() <= np.abs(rounded - reference).max()


def _bf16_results(graph: Any) -> set[str]:
    """Returns the types of the operators whose output is BF16."""
    return {
        op.get_type_name() for op in graph.get_ordered_ops() if op.get_output_element_type(0).get_type_name() == "bf16"
    }


def test_unsuitable_graphs_are_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match="cannot be loaded by OpenVINO"):
        OvBackend(tmp_path / "model.onnx", dimension=8, exact=True)
    with pytest.raises(EngineError, match="returned vectors of shape"):
        OvBackend(bundles["fp32"] / "model.onnx", dimension=7, exact=True).run(
            TokenBatch(**{name: np.ones((1, 3), np.int64) for name in ("input_ids", "attention_mask", "pool_mask")})
        )


def test_the_choice_is_measured_once(
    bundles: dict[str, Path], own_cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    encoder = Encoder(bundles["fp32"], device="cpu")
    (choice_file,) = own_cache.iterdir()
    choice = json.loads(choice_file.read_text())
    assert choice["backend"] in ("onnxruntime", "openvino")
    assert choice["backend"] == encoder.backend.split()[0]
    assert choice["min_cosine"] >= 0.999999
    assert "one query and a batch of" in caplog.text
    monkeypatch.setattr(cpu_runtime, "measure_cpu_runtimes", None)  # a call would fail
    assert Encoder(bundles["fp32"], device="cpu").backend == encoder.backend
    slower = {"onnxruntime": "openvino", "openvino": "onnxruntime"}[choice["backend"]]
    choice_file.write_text(json.dumps(choice | {"backend": slower}))
    assert Encoder(bundles["fp32"], device="cpu").backend.startswith(slower)


def test_a_damaged_choice_is_measured_again(bundles: dict[str, Path], own_cache: Path) -> None:
    Encoder(bundles["fp32"], device="cpu")
    (choice_file,) = own_cache.iterdir()
    for damage in (b"", b"[]", b'{"backend": 3}', b"\xff"):
        choice_file.write_bytes(damage)
        Encoder(bundles["fp32"], device="cpu")
        assert json.loads(choice_file.read_text())["backend"]


def test_a_faster_runtime_with_different_vectors_is_not_chosen(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OvBackend.run

    def rolled(self: OvBackend, batch: TokenBatch) -> Output:
        output = run(self, batch)
        return Output(np.roll(output.embeddings, 1, axis=1), output.norms)

    monkeypatch.setattr(OvBackend, "run", rolled)
    monkeypatch.setattr(cpu_runtime, "_run_ms", lambda backend, _: 1.0 if isinstance(backend, OvBackend) else 9.0)
    assert Encoder(bundles["fp32"], device="cpu").backend.startswith("onnxruntime")
    monkeypatch.setattr(OvBackend, "run", run)


def test_the_faster_runtime_is_chosen(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_runtime, "_run_ms", lambda backend, _: 1.0 if isinstance(backend, OvBackend) else 9.0)
    assert Encoder(bundles["fp32"], device="cpu").backend.startswith("openvino")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorflow"}, "backend is 'tensorflow'; pass 'auto', 'tensorrt', 'onnxruntime', 'openvino'"),
        ({"backend": "openvino", "device": "cuda"}, "runs on CPUs, but device is 'cuda'"),
        ({"backend": "tensorrt", "device": "cpu"}, "runs on GPUs, but device is 'cpu'"),
        ({"threads": 0}, "threads is 0; pass a whole number from 1 to 1024"),
    ],
)
def test_incompatible_options_are_refused(bundles: dict[str, Path], options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Encoder(bundles["fp32"], **options)


def test_a_path_to_the_graph_selects_onnx_runtime(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvembed_deploy.select_backend.fastest_cpu_runtime", lambda *_, **__: ("openvino", None))
    assert Encoder(bundles["fp32"], device="cpu").backend.startswith("openvino")
    assert Encoder(bundles["fp32"] / "model.onnx", device="cpu").backend.startswith("onnxruntime")
    assert Encoder(bundles["fp32"] / "model.onnx", device="cpu", backend="openvino").backend.startswith("openvino")


def test_the_number_of_threads_does_not_change_vectors(bundles: dict[str, Path]) -> None:
    for backend in ("onnxruntime", "openvino"):
        one_thread = Encoder(bundles["fp32"], device="cpu", backend=backend, threads=1).encode(TEXTS)
        two_threads = Encoder(bundles["fp32"], device="cpu", backend=backend, threads=2).encode(TEXTS)
        assert np.abs(one_thread - two_threads).max() <= 2e-6


def test_threads_of_several_processes_do_not_share_a_core(bundles: dict[str, Path]) -> None:
    """OpenVINO binds threads to cores from the first one on, in every process alike."""
    backend = Encoder(bundles["fp32"], device="cpu", backend="openvino", threads=1)._backend
    assert isinstance(backend, OvBackend)
    assert backend._single_model.get_property("ENABLE_CPU_PINNING") is False


def _in_two_streams(bundle: Path) -> Encoder:
    encoder = Encoder(bundle, device="cpu", backend="openvino", threads=2)
    if encoder._backend.in_flight < 2:
        pytest.skip("OpenVINO has one core here, and computes one batch at a time")
    return encoder


def _token_batches(encoder: Encoder) -> list[TokenBatch]:
    rows = encoder.tokenize(TEXTS)
    return [encoder._text.pad([row]) for row in rows]


def test_concurrent_batches_return_the_same_vectors(bundles: dict[str, Path]) -> None:
    encoder = _in_two_streams(bundles["fp32"])
    backend = encoder._backend
    assert isinstance(backend, OvBackend)
    batches = _token_batches(encoder)
    alone = [backend.run(batch).embeddings for batch in batches]
    assert backend._streams_compiled is None  # a service that never has two pays nothing
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            outputs = pool.map(backend.run, batches)
            assert all(
                np.abs(output.embeddings - expected).max() <= 2e-6
                for output, expected in zip(outputs, alone, strict=True)
            )
    assert backend._streams_compiled is not None
    assert backend._running == 0
    again = [backend.run(batch).embeddings for batch in batches]
    assert all(np.array_equal(vectors, expected) for vectors, expected in zip(again, alone, strict=True))


def test_many_batches_of_one_call_use_streams(bundles: dict[str, Path]) -> None:
    encoder = _in_two_streams(bundles["fp32"])
    vectors = encoder.encode(TEXTS * 20, batch_size=2)
    assert encoder._backend._streams_compiled is not None  # type: ignore[attr-defined]
    assert np.abs(vectors - np.tile(encoder.encode(TEXTS), (20, 1))).max() <= 2e-6


def test_without_a_second_compiled_model_batches_run_one_at_a_time(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ov, "MAX_STREAMED_BYTES", 1000)
    assert Encoder(bundles["fp32"], device="cpu", backend="openvino", threads=2)._backend.in_flight == 1
    monkeypatch.undo()
    encoder = _in_two_streams(bundles["fp32"])

    class NoMemory:
        def compile_model(self, *_: object) -> None:
            raise RuntimeError("bad allocation")

    monkeypatch.setattr(encoder._backend, "_core", NoMemory())
    vectors = encoder.encode(TEXTS * 20, batch_size=2)
    assert np.abs(vectors - np.tile(encoder.encode(TEXTS), (20, 1))).max() <= 2e-6
    assert encoder._backend.in_flight == 1
    assert caplog.text.count("one batch at a time") == 1
    assert "bad allocation" in caplog.text


def test_a_failure_leaves_nothing_running(bundles: dict[str, Path]) -> None:
    backend = Encoder(bundles["fp32"], device="cpu", backend="openvino")._backend
    assert isinstance(backend, OvBackend)
    wrong = TokenBatch(
        input_ids=np.ones((1, 3), np.int64),
        attention_mask=np.ones((1, 4), np.int64),
        pool_mask=np.ones((1, 5), np.int64),
    )
    with pytest.raises(EngineError, match=r"OpenVINO failed on a batch of 1x3 tokens|its bundle says"):
        backend.run(wrong)
    assert backend._running == 0
