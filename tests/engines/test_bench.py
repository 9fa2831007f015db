"""The arithmetic of `nvembed bench`, and one small run."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvembed_deploy.backends.cuda import CudaDevice
from nvembed_deploy.batching import plan_batches
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.engines.bench import flops, main, on_gpu, padding_waste, peak_gflops, percentiles, time_interleaved
from nvembed_deploy.engines.power import PowerMeter, Reading, read_line
from nvembed_deploy.engines.targets import TARGETS


def test_percentiles_equal_numpys() -> None:
    times = list(range(1, 101))
    latency = percentiles(times, texts=3, tokens=7)
    assert (latency.p50, latency.p95, latency.p99) == (50.5, 95.05, 99.01)
    assert (latency.texts, latency.tokens) == (3, 7)


def test_actions_are_interleaved() -> None:
    calls: list[str] = []
    times = time_interleaved([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert calls == list("abababab")
    assert [len(action_times) for action_times in times] == [3, 3]


def test_flops_count_two_for_each_weight_and_attention(bundles: dict[str, Path]) -> None:
    config = Bundle.open(bundles["fp32"]).manifest.source.architecture
    parameters = config.parameters(fold=True)
    weights = sum(parameters.values()) - config.vocab_size * config.hidden_size
    attention = config.layers * 4 * config.heads * config.head_dim
    assert flops(config, [1]) == 2 * weights + attention
    assert flops(config, [3, 5]) == 8 * 2 * weights + (9 + 25) * attention


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 datasheet"),
        ("NVIDIA A100-SXM4-80GB", "A100 datasheet"),
        ("NVIDIA L4", "L4 datasheet"),
        ("NVIDIA L40S", "unknown"),
        ("NVIDIA GeForce RTX 4090", "unknown"),
        ("Orin", "unknown"),
    ],
)
def test_the_peak_is_that_of_the_gpu(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, source: str
) -> None:
    device = CudaDevice(index=1, name=name, compute_capability="8.9", bus="00000000:66:00.0")
    indices: list[int] = []
    cuda = SimpleNamespace(device=lambda index: indices.append(index) or device)
    monkeypatch.setattr("nvembed_deploy.engines.bench.CudaRuntime", SimpleNamespace(load=lambda: cuda))
    encoder = SimpleNamespace(backend="tensorrt 11", manifest=Bundle.open(bundles["fp16"]).manifest)
    peak, peak_source = peak_gflops(encoder, "cuda:1")
    assert source in peak_source
    assert (peak == 0) == (source == "unknown")
    assert indices == [1]


@pytest.mark.parametrize(
    ("backend", "is_gpu"),
    [
        ("tensorrt 11.0 on NVIDIA L4", True),
        ("tensorrt_rtx 1.7 on NVIDIA L4", True),
        ("onnxruntime 1.32.0 CUDAExecutionProvider", True),
        ("onnxruntime 1.32.0 TensorrtExecutionProvider", True),
        ("PyTorch 2.13.0 fp16 (CUDA:1)", True),
        ("PyTorch 2.13.0 fp32 (CPU)", False),
        ("onnxruntime 1.32.0 CPUExecutionProvider", False),
        ("openvino 2026.4.1 CPU bf16", False),
    ],
)
def test_backends_on_a_gpu_are_recognized_by_name(backend: str, is_gpu: bool) -> None:
    assert on_gpu(SimpleNamespace(backend=backend)) is is_gpu


def test_every_peak_names_its_gpu() -> None:
    assert all(bool(target.tflops) == bool(target.card) for target in TARGETS.values())


def test_padding_waste() -> None:
    assert padding_waste([4, 4, 4], rows=2, tokens=100) == 0
    # Longest first: (4, 2) pads 2 of 8, (1) none.
    assert np.isclose(padding_waste([4, 1, 2], rows=2, tokens=100), 1 - 7 / 9)


def test_one_run(
    bundles: dict[str, Path], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = [f"{bundles['fp32']}@onnxruntime", f"{bundles['int8']}@onnxruntime", f"reference@{checkpoint}"]
    out = tmp_path / "new" / "bench.json"
    assert main([*sides, "--device", "cpu", "--texts", "5", "--repeats", "4", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    first_engine, second, third = report["sides"]
    assert first_engine["min_cosine"] == pytest.approx(1, abs=1e-6)
    assert 0.98 < second["min_cosine"] < 1
    assert third["min_cosine"] > 0.99999
    assert third["start_seconds"] is None
    assert first_engine["start_peak_mib"] > 20
    for side in report["sides"]:
        assert side["tokens_per_second"] / side["texts_per_second"] == pytest.approx(report["tokens"] / 5, rel=0.01)
        assert side["query_ms"]["p50"] <= side["query_ms"]["p99"]
        assert (side["joules_per_text"], side["device_peak_mib"]) == (None, None)  # not measured on a CPU
    assert report["peak_source"] == "FP32 GEMM"
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("tool", "line", "watts", "mib"),
    [
        ("nvidia-smi", "250.50, 1024", 250.5, 1024),
        (
            "tegrastats",
            "RAM 2048/7620MB (lfb 4x4MB) CPU [1%@729] VDD_IN 4852mW/4852mW VDD_CPU 5mW/5mW",
            4.852,
            2048,
        ),
        (
            "tegrastats",
            "RAM 9000/62800MB (lfb 4x4MB) VDD_GPU_SOC 20300mW/9000mW VDD_CPU_CV 5200mW/5000mW VIN_SYS_5V0 4400mW/40mW "
            "VDDQ_VDD2_1V8AO 1100mW/1000mW",  # AGX Orin: the board is all of its rails
            31.0,
            9000,
        ),
    ],
)
def test_power_is_read_from_the_vendors_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, line: str, watts: float, mib: float
) -> None:
    assert read_line(line) == Reading(watts, mib)
    script = tmp_path / tool
    script.write_text(f"#!/bin/sh\nwhile true; do echo '{line}'; echo '[N/A], [N/A]'; sleep 0.02; done\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with PowerMeter("00000000:65:00.0") as meter:
        time.sleep(0.3)
    assert len(meter.readings) > 3
    assert meter.joules == pytest.approx(watts * meter.seconds)
    assert meter.peak_memory_mib == mib


def test_devices_that_report_only_power_or_only_energy() -> None:
    assert read_line("35.20, [N/A]") == Reading(35.2, None)  # DGX Spark
    assert read_line("[N/A], 1024") == Reading(None, 1024.0)
    assert read_line("[N/A], [N/A]") is None
    assert read_line("no such device") is None


def test_a_jetson_is_read_by_tegrastats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JetPack has nvidia-smi as well, which reports nothing there."""
    for tool, line in (("nvidia-smi", "[N/A], [N/A]"), ("tegrastats", "RAM 2048/7620MB VDD_IN 4852mW/4852mW")):
        (tmp_path / tool).write_text(f"#!/bin/sh\nwhile true; do echo '{line}'; sleep 0.02; done\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with PowerMeter("00000000:65:00.0") as meter:
        time.sleep(0.3)
    assert meter.joules == pytest.approx(4.852 * meter.seconds)


def test_without_a_tool_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with PowerMeter("00000000:65:00.0") as meter:
        pass
    assert (meter.joules, meter.peak_memory_mib) == (None, None)


def test_the_reference_must_follow_a_bundle(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"reference@{checkpoint}"]) == 1
    assert "reference needs a checkpoint and must follow a bundle" in capsys.readouterr().err


def test_large_batches_are_split_where_padding_would_grow() -> None:
    lengths = [100] * 11 + [60] * 3 + [5] * 4
    batches = list(plan_batches(lengths, max_rows=32, max_tokens=4096))
    assert [len(batch) for batch in batches] == [12, 6]  # 60 beside eleven of 100 is little; a small batch goes on
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    mixed = np.random.default_rng(0).lognormal(4, 1, 3000).astype(int).clip(1, 512).tolist()
    assert padding_waste(mixed, rows=32, tokens=4096) < 0.05
