"""Where PyTorch computes during an export: the choice, and a model that is not on its device as a whole."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nvembed_deploy.backends.pytorch import PyTorchBackend
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.errors import ConfigError, ExportError
from nvembed_deploy.export import pipeline, to_onnx
from nvembed_deploy.export.device import ON_CPU, Placement, place
from nvembed_deploy.export.forecast import Forecast
from nvembed_deploy.export.layerwise import LayerwiseBackend, LayerwiseModel
from nvembed_deploy.model.config_json import read_checkpoint_architecture
from nvembed_deploy.model.text_contract import text_contract
from nvembed_deploy.parity.compare import compute_reference_outputs
from nvembed_deploy.spec import Precision, Shape
from nvembed_deploy.tokenization import TextEncoder

NEEDS = Forecast(weights=1, memory=1, disk=1, gpu=1, cpu=1, device_whole=30 * 2**30, device_layerwise=5 * 2**30)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """GPUs that PyTorch seems to have: free bytes by index."""
    free = {0: 8 * 2**30, 1: 80 * 2**30}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index or 0], 2**40))
    return free


def test_a_gpu_takes_the_whole_model_or_its_blocks(gpus: dict[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    assert place("cpu", NEEDS) == ON_CPU
    assert place("cuda:1", NEEDS) == Placement(device=torch.device("cuda:1"), whole=True)
    for requested in ("auto", "cuda"):
        assert place(requested, NEEDS) == Placement(device=torch.device("cuda"), whole=False)
    message = "cuda has 8.0 GiB free and the whole model needs 30.0: computing layer by layer, in 5.0"
    assert message in capsys.readouterr().err
    gpus[0] = 2 * 2**30
    assert place("auto", NEEDS) == ON_CPU
    assert "computing on the CPU: cuda has less than 5.0 GiB free" in capsys.readouterr().err
    with pytest.raises(ExportError, match=r"--device cuda has 2.0 GiB .* needs 5.0; free some, pass --device cpu, or"):
        place("cuda", NEEDS)
    assert place("cuda", NEEDS, force=True) == Placement(device=torch.device("cuda"), whole=False)
    with pytest.raises(ConfigError, match="--device cuda:2: PyTorch finds 2 GPUs, numbered from 0"):
        place("cuda:2", NEEDS)


@pytest.mark.parametrize("by_blocks", [False, True])
def test_the_reference_is_never_in_tf32(checkpoint: Path, by_blocks: bool) -> None:
    """NVIDIA's containers turn TF32 on for every process."""
    whole = PyTorchBackend(checkpoint)
    seen = []
    whole.model.embedding_model.norm.register_forward_pre_hook(
        lambda *_: seen.append(torch.get_float32_matmul_precision())
    )
    backend = LayerwiseBackend(LayerwiseModel(whole.model)) if by_blocks else whole
    text = TextEncoder(
        (checkpoint / "tokenizer.json").read_bytes(),
        text_contract(checkpoint, read_checkpoint_architecture(checkpoint)),
    )
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        backend.run(text.pad(text.tokenize(["a text"], prompt=text.prompt(None, None), max_length=32)))
        assert seen == ["highest"]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(chosen)


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has a GPU")
def test_without_a_gpu(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert place("auto", NEEDS) == ON_CPU
    flags = ["--model", str(checkpoint), "--precision", "int8", "--out", str(tmp_path / "b"), "--device", "cuda:0"]
    assert to_onnx.main(flags) == 1
    assert "--device cuda:0: PyTorch" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        to_onnx.main(["--device", "gpu"])
    assert "'gpu' is none of auto, cpu, cuda and cuda:N" in capsys.readouterr().err


def test_a_reference_that_computes_block_by_block_is_the_same(checkpoint: Path) -> None:
    text = TextEncoder(
        (checkpoint / "tokenizer.json").read_bytes(),
        text_contract(checkpoint, read_checkpoint_architecture(checkpoint)),
    )
    whole = PyTorchBackend(checkpoint)
    by_blocks = LayerwiseBackend(LayerwiseModel(whole.model))
    outputs = [
        compute_reference_outputs(backend, text, precision=Precision.INT8, max_shape=Shape(batch=4, tokens=48))
        for backend in (whole, by_blocks)
    ]
    assert np.abs(outputs[0].vectors - outputs[1].vectors).max() < 1e-6
    assert outputs[0].ranking is not None
    assert outputs[1].ranking is not None
    same = outputs[0].ranking.top_passages == outputs[1].ranking.top_passages
    assert same.mean() > 0.99
    assert outputs[1].reference.endswith("fp32 (CPU, block by block)")


def test_an_export_whose_model_is_not_on_the_device_as_a_whole(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a small GPU, on the CPU."""
    monkeypatch.setattr(pipeline, "place", lambda *_, **__: replace(ON_CPU, whole=False))
    out = tmp_path / "bundle"
    flags = ["--model", str(checkpoint), "--precision", "fp16", "--max", "8x64", "--out", str(out)]
    assert to_onnx.main(flags) == 0
    report = Bundle.open(out).manifest.parity[0]
    assert report.passed
    assert report.reference.endswith("block by block)")


def test_only_the_block_that_computes_is_on_the_device(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PyTorchBackend(checkpoint).model
    moves: list[tuple[str, str]] = []
    layer = model.embedding_model.layers[1]
    monkeypatch.setattr(layer, "to", lambda device: moves.append(("layer 1", str(device))))
    layerwise = LayerwiseModel(model, device=torch.device("meta"))  # a device that every machine has
    with layerwise.block("embedding_model.layers.1"), layerwise.block("embedding_model.layers.1"):
        assert moves == [("layer 1", "meta")]
    assert moves == [("layer 1", "meta"), ("layer 1", "cpu")]
