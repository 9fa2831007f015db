"""Triton repositories: parsed by Triton's own protobuf, cross-checked, and run with a fake Python backend."""

import importlib.util
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvembed_deploy import ConfigError, Encoder
from nvembed_deploy.bundle.manifest import PLAN, PlanInfo
from nvembed_deploy.bundle.reader import Bundle
from nvembed_deploy.export.triton import MARKER, buckets, ensemble_config, main, write_repository
from nvembed_deploy.select_backend import open_parts
from nvembed_deploy.spec import Shape, ShapeProfile
from nvembed_deploy.tokenization import TokenBatch
from nvembed_deploy.vectors import OutputDtype

NAMES = ("nvembed", "nvembed_tokenizer", "nvembed_engine")
TYPES = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32, "TYPE_STRING": object}


@pytest.fixture(scope="module", params=["fp32", "int8"])
def repository(request: pytest.FixtureRequest, bundles: dict[str, Path], tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "repository"
    assert main([str(bundles[request.param]), "--out", str(out), "--platform", "onnxruntime"]) == 0
    return out


@pytest.fixture(scope="module")
def bundle(repository: Path, bundles: dict[str, Path]) -> Bundle:
    sha256 = json.loads((repository / MARKER).read_text())["bundle"]
    return next(bundle for bundle in map(Bundle.open, bundles.values()) if bundle.manifest.manifest_sha256 == sha256)


@pytest.fixture(scope="module")
def configs(repository: Path) -> dict:
    """Reads each configuration with Triton's own message types."""
    if importlib.util.find_spec("tritonclient") is None or importlib.util.find_spec("google.protobuf") is None:
        pytest.skip("tritonclient is not installed: pip install --no-deps tritonclient")
    return parsed(repository, NAMES)


def parsed(repository: Path, names: tuple[str, ...]) -> dict:
    from google.protobuf import text_format

    spec = importlib.util.find_spec("tritonclient")
    # Its package imports grpc, which is not needed here.
    path = Path(next(iter(spec.submodule_search_locations))) / "grpc" / "model_config_pb2.py"
    message = runpy.run_path(str(path))["ModelConfig"]
    return {name: text_format.Parse((repository / name / "config.pbtxt").read_text(), message()) for name in names}


def test_configurations_parse_as_tritons_messages(configs: dict, repository: Path) -> None:
    assert {config.name for config in configs.values()} == set(NAMES)
    for name in NAMES:
        assert (repository / name / "1").is_dir()  # a version, without which Triton loads nothing


def test_names_shapes_and_limits_fit_together(configs: dict, bundle: Bundle) -> None:
    ensemble, tokenizer, engine = (configs[name] for name in NAMES)
    manifest = bundle.manifest
    assert {config.max_batch_size for config in configs.values()} == {manifest.profile.max.batch}
    steps = list(ensemble.ensemble_scheduling.step)
    available = {tensor.name for tensor in ensemble.input}
    for step in steps:
        model = configs[step.model_name]
        assert set(step.input_map) == {tensor.name for tensor in model.input}
        assert set(step.output_map) <= {tensor.name for tensor in model.output}
        assert set(step.input_map.values()) <= available
        available |= set(step.output_map.values())
    assert {tensor.name for tensor in ensemble.output} <= available
    types = {tensor.name: tensor.data_type for tensor in tokenizer.output}
    assert types == {tensor.name: tensor.data_type for tensor in engine.input}
    assert list(ensemble.output[0].dims) == [manifest.dimension] == list(engine.output[0].dims)
    assert [tensor.optional for tensor in ensemble.input] == [False, True, True]
    # A lone request waits once, at the engine.
    delays = [config.dynamic_batching.max_queue_delay_microseconds for config in (tokenizer, engine)]
    assert (delays[0], delays[1] > 0) == (0, True)
    warmup = engine.model_warmup[0]
    usual = manifest.profile.opt
    assert warmup.batch_size == usual.batch
    assert {tuple(tensor.dims) for tensor in warmup.inputs.values()} == {(usual.tokens,)}


def test_the_engine_matches_its_configuration(repository: Path, bundle: Bundle, configs: dict) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(repository / "nvembed_engine" / "1" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    engine = configs["nvembed_engine"]
    assert {tensor.name for tensor in session.get_inputs()} == {tensor.name for tensor in engine.input}
    assert {tensor.name for tensor in session.get_outputs()} == {tensor.name for tensor in engine.output}
    usual = bundle.manifest.profile.opt
    ones = np.fromfile(repository / "nvembed_engine" / "warmup" / "ones", dtype=np.int64)
    ones = ones.reshape(usual.batch, usual.tokens)
    outputs = session.run(None, {tensor.name: ones for tensor in session.get_inputs()})
    assert [output.shape for output in outputs] == [(usual.batch, bundle.manifest.dimension), (usual.batch,)]
    assert all(np.isfinite(output).all() for output in outputs)


class Backend:
    """Fake of `triton_python_backend_utils`."""

    class Tensor:
        def __init__(self, name: str, array: np.ndarray) -> None:
            self.name, self.array = name, array

        def as_numpy(self) -> np.ndarray:
            return self.array

    class TritonError:
        def __init__(self, message: str) -> None:
            self.message = message

    class InferenceResponse:
        def __init__(self, output_tensors: list | None = None, error: object = None) -> None:
            self.output_tensors, self.error = output_tensors, error

    @staticmethod
    def get_input_tensor_by_name(request: SimpleNamespace, name: str) -> "Backend.Tensor":
        array = getattr(request, name, None)
        return None if array is None else Backend.Tensor(name, array)


def request(texts: list[str], **optional: str) -> SimpleNamespace:
    """Makes a request as Triton does: bytes in arrays of shape [batch, 1]."""
    shape = (len(texts), 1)
    text = np.array([text.encode() for text in texts], dtype=object).reshape(shape)
    return SimpleNamespace(
        text=text, **{name: np.full(shape, value.encode(), dtype=object) for name, value in optional.items()}
    )


@pytest.fixture
def model(repository: Path, monkeypatch: pytest.MonkeyPatch):
    """Loads model.py as Triton does."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Backend)
    folder = repository / "nvembed_tokenizer"
    loaded = runpy.run_path(str(folder / "1" / "model.py"))["TritonPythonModel"]()
    loaded.initialize({"model_repository": str(folder), "model_version": "1"})
    return loaded


def test_embeddings_equal_the_encoders(model, bundle: Bundle) -> None:
    encoder = Encoder(bundle.folder, device="cpu")
    _, _, backend = open_parts(bundle.folder, "cpu")
    queries = [
        (["the water"], {"instruction": "Find it"}),
        (["a", "passage over the water " * 9], {"instruction": "", "prompt_name": ""}),
        (["question", "a", "b"], {}),
        (["question"], {"prompt_name": "query"}),
    ]
    responses = model.execute([request(texts, **optional) for texts, optional in queries])
    for (texts, optional), response in zip(queries, responses, strict=True):
        assert response.error is None
        prompt = encoder.prompts["query"] if optional.get("prompt_name") else None
        arrays = {tensor.name: tensor.array for tensor in response.output_tensors}
        assert arrays["input_ids"].shape[1] in buckets(bundle.manifest.profile)
        vectors = backend.run(TokenBatch(**arrays)).embeddings
        np.testing.assert_allclose(
            vectors, encoder.encode(texts, instruction=optional.get("instruction"), prompt=prompt), atol=2e-3
        )


def test_a_bad_request_does_not_affect_others(model) -> None:
    invalid = request(["x"])
    invalid.text[0, 0] = b"\xff\xfe"
    responses = model.execute(
        [
            request(["the water"]),
            request(["x"], instruction="long words " * 90),
            request(["in"]),
            invalid,
            request(["x"], prompt_name="xyz"),
            request(["x"], prompt_name="query", instruction="Find it"),
        ]
    )
    assert [response.error is None for response in responses] == [True, False, True, False, False, False]
    assert "prompt_name is 'xyz'; this model's prompts are: 'query', 'document'" in responses[4].error.message
    assert "instruction and prompt_name are mutually exclusive" in responses[5].error.message
    assert "a text is not UTF-8" in responses[3].error.message
    assert "no token of text 0 is left to pool" in responses[1].error.message


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float16"])
def test_smaller_vectors_are_converted_behind_the_engine(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    out = tmp_path / "repository"
    assert main([str(bundles["fp32"]), "--out", str(out), "--platform", "onnxruntime", "--output-dtype", dtype]) == 0
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Backend)
    folder = out / "nvembed_vectors"
    model = runpy.run_path(str(folder / "1" / "model.py"))["TritonPythonModel"]()
    model.initialize({"model_repository": str(folder), "model_version": "1"})
    encoder = Encoder(bundles["fp32"], device="cpu")
    floats = encoder.encode(["the water", "a", ""])
    (response,) = model.execute([SimpleNamespace(embedding=floats)])
    vectors = response.output_tensors[0].array
    np.testing.assert_array_equal(vectors, encoder.encode(["the water", "a", ""], output_dtype=dtype))

    if importlib.util.find_spec("tritonclient") is None or importlib.util.find_spec("google.protobuf") is None:
        return  # Triton's own message types are not here
    configs = parsed(out, (*NAMES, "nvembed_vectors"))
    ensemble, converter = configs["nvembed"], configs["nvembed_vectors"]
    assert list(ensemble.output[0].dims) == list(converter.output[0].dims) == [vectors.shape[1]]
    assert ensemble.output[0].data_type == converter.output[0].data_type
    names = {"int8": "TYPE_INT8", "uint8": "TYPE_UINT8", "float16": "TYPE_FP16"}
    assert type(converter).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name[names[dtype]].number == (
        converter.output[0].data_type
    )
    step = list(ensemble.ensemble_scheduling.step)[-1]
    assert (step.model_name, dict(step.input_map), dict(step.output_map)) == (
        "nvembed_vectors",
        {"embedding": "floats"},
        {"converted": "embedding"},
    )
    assert list(ensemble.ensemble_scheduling.step)[-2].output_map["sentence_embedding"] == "floats"


def test_a_format_that_the_bundle_does_not_offer_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = Bundle.open(bundles["fp32"])
    bits = ensemble_config(bundle.manifest, "n", OutputDtype.UBINARY)["output"][0]
    assert (bits["data_type"], bits["dims"]) == ("TYPE_UINT8", [bundle.manifest.dimension // 8])
    bundle = replace(bundle, manifest=replace(bundle.manifest, vectors=None))
    with pytest.raises(ConfigError, match="int8"):
        write_repository(
            bundle, tmp_path / "out", name="n", platform="onnxruntime", instances=1, output_dtype=OutputDtype.INT8
        )
    assert not (tmp_path / "out").exists()


def test_a_new_numpy_is_named_and_the_warm_up_sends_a_text(
    model, repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With NumPy 2, Triton 2.51 loads the model and ends its process at the first text."""
    folder = repository / "nvembed_tokenizer"
    for version, is_named in (("1.26.4", False), ("2.1.0", True)):
        monkeypatch.setattr(np, "__version__", version)
        model.initialize({"model_repository": str(folder), "model_version": "1"})
        assert ("supports only NumPy 1, as 2.51 does: install 'numpy<2'" in capfd.readouterr().err) == is_named
    assert (folder / "warmup" / "text").read_bytes() == b"\x06\0\0\0a text"
    assert 'input_data_file: "text"' in (folder / "config.pbtxt").read_text()


def test_buckets_cover_the_longest_input() -> None:
    def buckets_between(shortest: int, longest: int) -> tuple[int, ...]:
        low, high = Shape(batch=1, tokens=shortest), Shape(batch=1, tokens=longest)
        return buckets(ShapeProfile(min=low, opt=low, max=high))

    assert buckets_between(1, 512) == (16, 32, 64, 128, 256, 512)
    assert buckets_between(1, 100) == (16, 32, 64, 100)
    assert buckets_between(1, 8) == (8,)
    assert buckets_between(33, 512) == (64, 128, 256, 512)


def test_a_tensorrt_plan_is_served_by_the_tensorrt_backend(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is fake; the files and the configuration around it are checked."""
    onnx_bundle = Bundle.open(bundles["fp32"])
    plan = PlanInfo(
        runtime="tensorrt",
        version="11.4.0",
        platform="linux_x86_64",
        compute_capabilities=("9.0",),
        profiles=(onnx_bundle.manifest.profile, onnx_bundle.manifest.profile),
    )
    bundle = replace(onnx_bundle, manifest=replace(onnx_bundle.manifest, plan=plan))
    monkeypatch.setattr(
        Bundle, "read", lambda self, name: b"plan" if name == PLAN else (self.folder / name).read_bytes()
    )
    write_repository(
        bundle, tmp_path / "models", name="nvembed", platform="tensorrt", instances=2, tokenizer_instances=3
    )
    assert "count: 3" in (tmp_path / "models" / "nvembed_tokenizer" / "config.pbtxt").read_text()
    config = (tmp_path / "models" / "nvembed_engine" / "config.pbtxt").read_text()
    assert 'platform: "tensorrt_plan"' in config
    assert 'profile: ["0", "1"]' in config
    assert (tmp_path / "models" / "nvembed_engine" / "1" / "model.plan").read_bytes() == b"plan"
    if importlib.util.find_spec("tritonclient") is not None:
        group = parsed(tmp_path / "models", ("nvembed_engine",))["nvembed_engine"].instance_group[0]
        assert (group.count, list(group.profile)) == (2, ["0", "1"])
    stripped = replace(bundle, manifest=replace(bundle.manifest, plan=replace(plan, stripped=True)))
    with pytest.raises(ConfigError, match="a plan without weights"):
        write_repository(stripped, tmp_path / "other", name="nvembed", platform="tensorrt", instances=1)
    profile = replace(onnx_bundle.manifest.profile, min=Shape(batch=2, tokens=1))
    batched = replace(onnx_bundle, manifest=replace(onnx_bundle.manifest, profile=profile))
    with pytest.raises(ConfigError, match="takes batches of at least 2 texts"):
        write_repository(batched, tmp_path / "other", name="nvembed", platform="onnxruntime", instances=1)


def test_a_repository_is_replaced_and_nothing_else_is(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "repository"
    for name in ("first", "second"):
        assert main([str(bundles["fp32"]), "--out", str(out), "--name", name]) == 0
    assert sorted(path.name for path in out.iterdir()) == [MARKER, "second", "second_engine", "second_tokenizer"]
    (tmp_path / "mine").mkdir()
    assert main([str(bundles["fp32"]), "--out", str(tmp_path / "mine")]) == 1
    assert "was not written by this command" in capsys.readouterr().err
    assert main([str(bundles["fp16"]), "--out", str(out), "--platform", "tensorrt"]) == 1
    assert "Build one on the GPU itself" in capsys.readouterr().err
    assert main([str(bundles["fp32"]), "--out", str(out), "--name", "a/b"]) == 1
    assert "is not a valid name" in capsys.readouterr().err
