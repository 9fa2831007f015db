"""The manifest reads back as written, and invalid content is refused even if its hash matches."""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvembed_deploy.bundle.manifest import (
    CPU_GRAPH,
    FORMAT_VERSION,
    QUANTIZATION,
    REFERENCE_OUTPUTS,
    REQUIRED,
    Manifest,
)
from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.errors import BundleError
from nvembed_deploy.files.hashing import FileEntry
from nvembed_deploy.files.records import from_json, to_json
from nvembed_deploy.parity.compare import TOLERANCES
from nvembed_deploy.spec import Dialect, Precision, Shape, ShapeProfile
from nvembed_deploy.tokenization import TextContract
from tests.bundle.test_reader import FILES, make_manifest

fuzz = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def to_bytes_with_zero_hash(record: dict) -> bytes:
    return json.dumps(record | {"manifest_sha256": "0" * 64}, indent=1).encode()


def rehash(content: bytes) -> bytes:
    """Replaces the 64 zeros with the matching hash, so that the checks after the hash are reached."""
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


def full_manifest() -> Manifest:
    """Returns a manifest in which no field is empty."""
    report = ParityReport(
        reference="PyTorch",
        candidate="ONNX Runtime",
        precision=Precision.FP32,
        texts=26,
        longest_tokens=128,
        min_cosine=0.99999,
        mean_cosine=0.999995,
        overlap=0.99,
        worst_text="'a' (3 tokens)",
        max_difference=1e-4,
        max_scaled_difference=6e-4,
        min_batch_cosine=1.0,
        non_finite_rows=0,
        tolerance=TOLERANCES[Precision.FP32],
        failures=(),
    )
    files = {name: FileEntry(bytes=3, sha256="a" * 64) for name in (*FILES, REFERENCE_OUTPUTS)}
    return make_manifest(parity=(report,), versions={"torch": "2.13"}, files=files)


VALID = full_manifest().to_bytes()
RECORD = json.loads(VALID)


def put(record: dict, path: str, value: object) -> None:
    *parents, key = path.split("/")
    reduce(lambda node, name: node[int(name) if name.isdigit() else name], parents, record)[key] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "format_version",
            FORMAT_VERSION + 1,
            "format version 7, and .* reads format version 6; export .*: .* export --out",
        ),
        ("format_version", 5, "format version 5, and this version of nvembed-deploy reads format version 6"),
        ("format_version", None, "format version None"),
        ("format_version", True, "format version True"),
        ("hint", "of a newer version", "top level: unknown field 'hint'"),
        ("text/hint", 1, "text: unknown field 'hint'"),
        ("plan", None, "inconsistent: engine.plan is listed but has no plan record"),
        ("parity", [], "inconsistent: reference.npz is listed but has no parity report"),
        ("precision", "bf16", "inconsistent: model.cpu.onnx is not listed but has a precision that needs"),
        ("precision", "int8", "inconsistent: model.cpu.onnx is not listed but has a precision that needs"),
        ("precision", "int2", "precision: expected one of fp32, fp16, bf16, int8, fp8, int4, nvfp4, found 'int2'"),
        ("dimension", "32", "dimension: expected int, found '32'"),
        ("dimension", 31, "the vectors have 31 dimensions and the model has 32"),
        ("text/pad_id", 10**9, "has token id 10+, and the embedding table has 415 rows"),
        ("text/pad_id", 10**400, "text.pad_id: expected an integer of at most 64 bits, found '10{59}'"),
        ("text/prefix_ids", [1, -1], "has token id -1"),
        ("dimension", 32.0, "dimension: expected int"),
        ("folded", 1, "folded: expected bool"),
        ("text/prefix_ids", [1, "2"], r"text\.prefix_ids\[1\]: expected int"),
        ("text/instruction_template", "Query: ", "does not contain {instruction}"),
        ("profile/min", {"batch": 64, "tokens": 1}, "--min 64x1 is larger than --max 4x16"),
        ("profile/max", {"batch": 0, "tokens": 1}, "batch and tokens must be at least 1"),
        ("source/architecture/kv_heads", 3, "4 attention heads are not a multiple of 3 key/value heads"),
        ("source/architecture/rope_theta", float("inf"), "rope_theta: expected a finite number"),
        ("source/architecture/rope_theta", 10**400, "rope_theta: expected a finite number"),
        ("source/architecture/rope_theta", float("nan"), "rope_theta: expected a finite number"),
        ("files/model.onnx/bytes", None, r"files\.model\.onnx\.bytes: expected int"),
        ("files/model.onnx/bytes", -1, "files has 'model.onnx' with -1 bytes"),
        ("files/model.onnx/sha256", "x", "files has 'model.onnx' with 3 bytes and SHA-256 'x'"),
        (
            "source/files",
            {"config.json": {"bytes": 1, "sha256": "A" * 64}},
            "source.files has 'config.json' with 1 byte",
        ),
        ("text/max_tokens", 0, "texts have up to 0 tokens, and the model 2048 positions"),
        ("text/max_tokens", -1, "texts have up to -1 tokens"),
        ("text/max_tokens", 8, "the shapes go up to 4x16, and texts have up to 8 tokens"),
        ("source/architecture/max_positions", 100, "texts have up to 2048 tokens, and the model 100 positions"),
        ("source/architecture/layers", 2**31, "the model's layers is 2147483648"),
        ("source/architecture/layers", 10**300, "layers: expected an integer of at most 64 bits"),
        ("source/architecture/latent/heads", -1, "the latent attention has 8 latents and -1 heads"),
        ("source/architecture/latent/latents", 0, "the latent attention has 0 latents"),
        ("source/architecture/rope_theta", -1.0, "rope_theta -1.0; they must be"),
        ("source/architecture/rms_norm_eps", -1.0, "rms_norm_eps is -1.0"),
        ("source/architecture/matryoshka", {"min_dim": 0, "dims": []}, "the model's matryoshka.min_dim is 0"),
        ("source/architecture/matryoshka", {"min_dim": 8, "dims": [8, -1]}, r"matryoshka\.dims\[1\] is -1"),
        ("source/architecture/mask_instruction", False, "disagree on whether the prompt is pooled"),
        ("text/pool_last", True, "disagree on whether the last token is pooled"),
        ("opset", -1, "the graph has opset -1, and the fused dialect has 23"),
        ("dialect", "portable", "the graph has opset 23, and the portable dialect has 20"),
        ("pooling", "x", "the pooling is 'x', and the model's is 'latent attention, masked mean, L2'"),
        ("fp32_modules", ["embedding_model.norm"], "'embedding_model.norm' is in FP32 for FP16's limit, and .* fp32"),
        ("plan/runtime", "os", "the plan is for 'os', and runtimes are tensorrt and tensorrt_rtx"),
        ("plan/compute_capabilities", [], r"the plan's compute capabilities are \[\]"),
        ("plan/compute_capabilities", ["sm_90"], r"the plan's compute capabilities are \['sm_90'\]"),
        ("plan/profiles", [], "the plan's first profile is not that of the bundle, 1x1 .. 2x8 .. 4x16"),
        ("profile/max", {"batch": 4, "tokens": 17}, "the plan's first profile is not that of the bundle"),
        ("parity/0/precision", "fp16", "'ONNX Runtime' was compared as fp16, and is fp32"),
        ("parity/0/failures", ["one"], "'ONNX Runtime' did not pass the comparison"),
        ("parity/0/texts", 0, "was compared on 0 texts"),
        ("parity/0/non_finite_rows", 1, "was compared on 26 texts, 1 not finite"),
        ("parity/0/min_cosine", 1.5, "the cosines or the overlap of 'ONNX Runtime' are out of range"),
        ("parity/0/overlap", -0.1, "the cosines or the overlap of 'ONNX Runtime' are out of range"),
        ("parity/0/max_difference", -1e-3, "the difference of 'ONNX Runtime' is below 0"),
        ("target", "\ud800", r"a string in it has \\ud800, half of a surrogate pair"),
        ("files/..~passwd", {"bytes": 1, "sha256": "a" * 64}, "lists '../passwd', which is not a bundle file"),
        ("files/~etc~passwd", {"bytes": 1, "sha256": "a" * 64}, "lists '/etc/passwd', which is not a bundle file"),
        ("files/manifest.json", {"bytes": 1, "sha256": "a" * 64}, "lists 'manifest.json', which is not a bundle file"),
    ],
    ids=lambda parameter: str(parameter)[:40],
)
def test_an_invalid_manifest_is_refused(path: str, value: object, message: str) -> None:
    record = copy.deepcopy(RECORD)
    put(record, path, value)
    if "~" in path:
        record["files"][path.removeprefix("files/").replace("~", "/")] = record["files"].pop(
            path.removeprefix("files/")
        )
    with pytest.raises(BundleError, match=message):
        Manifest.from_bytes(rehash(to_bytes_with_zero_hash(record)))


def test_a_second_profile_beyond_the_first_is_refused() -> None:
    record = copy.deepcopy(RECORD)
    record["plan"]["profiles"].append(copy.deepcopy(record["profile"]) | {"max": {"batch": 8, "tokens": 8}})
    with pytest.raises(BundleError, match=r"the plan's profile 1x1 \.\. 2x8 \.\. 8x8 is not within 1x1 "):
        Manifest.from_bytes(rehash(to_bytes_with_zero_hash(record)))


def test_a_field_that_stands_twice_is_refused() -> None:
    content = to_bytes_with_zero_hash(RECORD).replace(b'"opset": 23', b'"opset": 22, "opset": 23')
    with pytest.raises(BundleError, match="field 'opset' is duplicated"):
        Manifest.from_bytes(rehash(content))


def test_a_linked_file_that_is_not_the_checkpoints_is_refused() -> None:
    record = copy.deepcopy(RECORD)
    record["referenced"] = ["model.safetensors"]
    record["files"]["model.safetensors"] = {"bytes": 3, "sha256": "b" * 64}
    with pytest.raises(BundleError, match=r"model\.safetensors is linked from the checkpoint, whose files do not"):
        Manifest.from_bytes(rehash(to_bytes_with_zero_hash(record)))
    record["source"]["files"]["model.safetensors"] = record["files"]["model.safetensors"]
    Manifest.from_bytes(rehash(to_bytes_with_zero_hash(record)))


def test_a_folded_pooler_that_the_model_does_not_have_is_refused() -> None:
    record = copy.deepcopy(RECORD)
    record["source"]["architecture"] |= {"pooling": "mean", "latent": None}
    record["pooling"] = "masked mean, L2"
    with pytest.raises(BundleError, match="the latent attention is folded, and the model has none"):
        Manifest.from_bytes(rehash(to_bytes_with_zero_hash(record)))


@pytest.mark.parametrize("name", sorted(RECORD.keys() - {"manifest_sha256", "format_version"}))
def test_a_missing_field_is_named(name: str) -> None:
    record = copy.deepcopy(RECORD)
    del record[name]
    with pytest.raises(BundleError, match=f"field '{name}' is missing"):
        Manifest.from_bytes(rehash(to_bytes_with_zero_hash(record)))


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_a_manifest_without_graph_weights_or_tokenizer_is_refused(name: str) -> None:
    record = copy.deepcopy(RECORD)
    del record["files"][name]
    with pytest.raises(BundleError, match=f"does not list {name}; export"):
        Manifest.from_bytes(rehash(to_bytes_with_zero_hash(record)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its own hash is missing"),
        (VALID.replace(b"manifest_sha256", b"manifest_sha255"), "its own hash is missing"),
        (VALID + VALID, "its own hash is missing"),
        (VALID + b" ", "its own hash does not match"),
        (VALID.replace(b'"fp32"', b'"bf16"'), "its own hash does not match"),
        (rehash(b'"manifest_sha256": "' + b"0" * 64 + b'"'), "is invalid"),
        (rehash(b'["manifest_sha256": "' + b"0" * 64 + b'"]'), "is invalid"),
        (rehash(b'{"manifest_sha256": "' + b"0" * 64 + b'", "x": ' + b"[" * 10**5), "is invalid"),
        (rehash(b'{"manifest_sha256": "' + b"0" * 64 + b'", "format_version": ' + b"9" * 10**4), "is invalid"),
    ],
)
def test_content_that_is_not_a_manifest_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Manifest.from_bytes(content)


# Fuzzing: 10,000 examples over the three


def with_edits(content: bytes, edits: list[tuple[int, bytes, int]]) -> bytes:
    for offset, new, removed in edits:
        content = content[:offset] + new + content[offset + removed :]
    return content


def check_refused_or_valid(content: bytes) -> None:
    try:
        manifest = Manifest.from_bytes(content)
    except BundleError as err:  # any other exception is a fault
        message = str(err)
    else:
        message = ""
    assert len(message) < 1000
    if message:
        return
    assert 1 <= manifest.text.max_tokens <= manifest.source.architecture.max_positions
    assert manifest.profile.max.tokens <= manifest.text.max_tokens
    assert all(entry.bytes >= 0 and len(entry.sha256) == 64 for entry in manifest.files.values())
    assert min(vars(manifest.source.architecture.latent).values()) >= 1
    assert manifest.plan is None or manifest.plan.profiles[0] == manifest.profile
    assert all(report.passed for report in manifest.parity)
    json.dumps(to_json(manifest), ensure_ascii=False).encode()
    assert replace(Manifest.from_bytes(manifest.to_bytes()), manifest_sha256="") == replace(
        manifest, manifest_sha256=""
    )


def paths(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Yields the path of every value of a JSON tree."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths(child, (*path, key))


byte_edits = st.lists(
    st.tuples(st.integers(0, len(VALID) - 1), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=4
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=5,
)
changes = st.lists(st.tuples(st.sampled_from(list(paths(RECORD))), st.none() | st.tuples(json_values)), max_size=3)


@given(byte_edits)
@settings(fuzz, max_examples=3000)
def test_any_change_of_bytes_is_refused(edits: list) -> None:
    content = with_edits(VALID, edits)
    if content != VALID:
        with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
            Manifest.from_bytes(content)


@given(byte_edits)
@settings(fuzz, max_examples=4000)
def test_changed_bytes_with_a_matching_hash_are_refused_or_valid(edits: list) -> None:
    check_refused_or_valid(rehash(with_edits(to_bytes_with_zero_hash(RECORD), edits)))


@given(changes, st.dictionaries(st.text(max_size=8), json_values, max_size=1))
@settings(fuzz, max_examples=3000)
def test_changed_fields_with_a_matching_hash_are_refused_or_valid(changes: list, more: dict) -> None:
    record = copy.deepcopy(RECORD) | more
    for (*parents, leaf), change in changes:
        try:
            parent = reduce(lambda value, key: value[key], parents, record)
            if change is None:
                del parent[leaf]
            else:
                parent[leaf] = change[0]
        except (LookupError, TypeError):
            continue  # removed by an earlier change
    check_refused_or_valid(rehash(to_bytes_with_zero_hash(record)))


@given(
    created=st.text(st.characters(codec="utf-8")),
    folded=st.booleans(),
    precision=st.sampled_from(Precision),
    dialect=st.sampled_from(Dialect),
    versions=st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))),
    profile=st.builds(
        lambda low, *more: ShapeProfile(
            min=low,
            opt=Shape(batch=low.batch + more[0], tokens=low.tokens + more[1]),
            max=Shape(batch=low.batch + more[0] + more[2], tokens=low.tokens + more[1] + more[2]),
        ),
        st.builds(Shape, batch=st.integers(1, 10**4), tokens=st.integers(1, 10**4)),
        *[st.integers(0, 10**4)] * 3,
    ),
    text=st.builds(
        TextContract,
        prefix_ids=st.lists(st.integers(0, 414)).map(tuple),
        suffix_ids=st.just(()),
        pad_id=st.integers(0, 414),
        mask_prompt=st.just(True),
        max_tokens=st.integers(3 * 10**4, 10**5),
        instruction_template=st.text(st.characters(codec="utf-8")).map(lambda text: text + "{instruction}"),
    ),
    epsilon=st.floats(min_value=1e-30, allow_nan=False, allow_infinity=False),
)
@settings(fuzz, max_examples=300)
def test_round_trip(epsilon: float, **changes) -> None:
    valid = full_manifest()
    architecture = replace(valid.source.architecture, rms_norm_eps=epsilon, max_positions=10**5)
    precision, profile = changes["precision"], changes["profile"]
    extra_files = [CPU_GRAPH] * precision.has_cpu_graph + [QUANTIZATION] * precision.quantized
    consistent = {
        "source": replace(valid.source, architecture=architecture),
        "opset": changes["dialect"].opset_for(precision),
        "plan": replace(valid.plan, profiles=(profile,)),
        "parity": tuple(replace(report, precision=precision) for report in valid.parity),
        "files": {name: FileEntry(bytes=3, sha256="a" * 64) for name in (*FILES, REFERENCE_OUTPUTS, *extra_files)},
    }
    manifest = replace(valid, **consistent, **changes)
    assert from_json(Manifest, json.loads(json.dumps(to_json(manifest)))) == manifest
    content = manifest.to_bytes()
    read = Manifest.from_bytes(content)
    assert replace(read, manifest_sha256="") == manifest
    assert read.to_bytes() == content
