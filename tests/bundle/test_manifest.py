"""The manifest: read back as written; whatever it should not say is refused, also behind a hash that fits."""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvembed_deploy.bundle.manifest import CPU_GRAPH, FORMAT_VERSION, QUANTIZATION, REQUIRED, TRUTH, Manifest
from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.errors import BundleError
from nvembed_deploy.files.hashing import FileEntry
from nvembed_deploy.files.records import from_json, to_json
from nvembed_deploy.parity.compare import TOLERANCES
from nvembed_deploy.spec import Dialect, Precision, Shape, ShapeProfile
from nvembed_deploy.tokenization import TextContract
from tests.bundle.test_reader import FILES, make_manifest

fuzz = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def zeroed(record: dict) -> bytes:
    return json.dumps(record | {"manifest_sha256": "0" * 64}, indent=1).encode()


def rehash(content: bytes) -> bytes:
    """Puts the hash that fits where 64 zeros are, so that what lies behind the hash is reached."""
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


def full_manifest() -> Manifest:
    """A manifest in which nothing is empty."""
    report = ParityReport(
        reference="PyTorch",
        candidate="ONNX Runtime",
        precision=Precision.FP16,
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
        tolerance=TOLERANCES[Precision.FP16],
        failures=("one",),
    )
    files = {name: FileEntry(bytes=3, sha256="a" * 64) for name in (*FILES, TRUTH)}
    return make_manifest(parity=(report,), versions={"torch": "2.13"}, files=files)


VALID = full_manifest().to_bytes()
RECORD = json.loads(VALID)


def put(record: dict, path: str, value: object) -> None:
    *parents, last = path.split("/")
    reduce(dict.__getitem__, parents, record)[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", FORMAT_VERSION + 1, "format version 4, this library reads 3; make the bundle again"),
        ("format_version", 0, "format version 0, this library reads 3"),
        ("format_version", None, "format version None"),
        ("format_version", True, "format version True"),
        ("hint", "of a newer version", "top level: unknown field 'hint'"),
        ("text/hint", 1, "text: unknown field 'hint'"),
        ("plan", None, "two minds about engine.plan"),
        ("parity", [], "two minds about truth.npz"),
        ("precision", "bf16", "two minds about model.cpu.onnx"),
        ("precision", "int8", "two minds about model.cpu.onnx"),
        ("precision", "int2", "precision: expected one of fp32, fp16, bf16, int8, fp8, int4, found 'int2'"),
        ("dimension", "32", "dimension: expected int, found '32'"),
        ("dimension", 31, "gives the vectors 31 dimensions and the model 32"),
        ("text/pad_id", 10**30, "has token id 10+, the embedding table 415 rows"),
        ("text/prefix_ids", [1, -1], "has token id -1"),
        ("dimension", 32.0, "dimension: expected int"),
        ("folded", 1, "folded: expected bool"),
        ("text/prefix_ids", [1, "2"], r"text\.prefix_ids\[1\]: expected int"),
        ("text/instruction_template", "Query: ", "no place {instruction}"),
        ("profile/min", {"batch": 64, "tokens": 1}, "--opt 2x8 is smaller than 64x1"),
        ("profile/max", {"batch": 0, "tokens": 1}, "batch and tokens must be at least 1"),
        ("source/architecture/kv_heads", 3, "cannot share 3 key/value heads"),
        ("source/architecture/rope_theta", float("inf"), "rope_theta: expected a finite number"),
        ("source/architecture/rope_theta", 10**400, "rope_theta: expected a finite number"),
        ("source/architecture/rope_theta", float("nan"), "rope_theta: expected a finite number"),
        ("files/model.onnx/bytes", None, r"files\.model\.onnx\.bytes: expected int"),
        ("files/..~passwd", {"bytes": 1, "sha256": "a" * 64}, "lists '../passwd', which is no file of a bundle"),
        ("files/~etc~passwd", {"bytes": 1, "sha256": "a" * 64}, "lists '/etc/passwd', which is no file of a bundle"),
        ("files/manifest.json", {"bytes": 1, "sha256": "a" * 64}, "lists 'manifest.json', which is no file"),
    ],
    ids=lambda item: str(item)[:40],
)
def test_a_manifest_that_says_what_cannot_be_is_refused(path: str, value: object, message: str) -> None:
    record = copy.deepcopy(RECORD)
    put(record, path, value)
    if "~" in path:
        record["files"][path.removeprefix("files/").replace("~", "/")] = record["files"].pop(
            path.removeprefix("files/")
        )
    with pytest.raises(BundleError, match=message):
        Manifest.from_bytes(rehash(zeroed(record)))


@pytest.mark.parametrize("name", sorted(RECORD.keys() - {"manifest_sha256", "format_version"}))
def test_a_missing_field_is_named(name: str) -> None:
    record = copy.deepcopy(RECORD)
    del record[name]
    with pytest.raises(BundleError, match=f"field '{name}' is missing"):
        Manifest.from_bytes(rehash(zeroed(record)))


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_a_bundle_without_its_graph_weights_or_tokenizer_is_none(name: str) -> None:
    record = copy.deepcopy(RECORD)
    del record["files"][name]
    with pytest.raises(BundleError, match=f"does not list {name}; make"):
        Manifest.from_bytes(rehash(zeroed(record)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not carry its own hash"),
        (VALID.replace(b"manifest_sha256", b"manifest_sha255"), "does not carry its own hash"),
        (VALID + VALID, "does not carry its own hash"),
        (VALID + b" ", "its own hash does not fit"),
        (VALID.replace(b'"fp32"', b'"bf16"'), "its own hash does not fit"),
        (rehash(b'"manifest_sha256": "' + b"0" * 64 + b'"'), "cannot be used"),
        (rehash(b'["manifest_sha256": "' + b"0" * 64 + b'"]'), "cannot be used"),
        (rehash(b'{"manifest_sha256": "' + b"0" * 64 + b'", "x": ' + b"[" * 10**5), "cannot be used"),
        (rehash(b'{"manifest_sha256": "' + b"0" * 64 + b'", "format_version": ' + b"9" * 10**4), "cannot be used"),
    ],
)
def test_what_is_no_manifest_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Manifest.from_bytes(content)


# Fuzzing: 10,000 examples over the three


def edited(content: bytes, edits: list[tuple[int, bytes, int]]) -> bytes:
    for offset, new, removed in edits:
        content = content[:offset] + new + content[offset + removed :]
    return content


def check_refused_or_sound(content: bytes) -> None:
    try:
        manifest = Manifest.from_bytes(content)
    except BundleError:  # any other exception is a fault
        return
    assert replace(Manifest.from_bytes(manifest.to_bytes()), manifest_sha256="") == replace(
        manifest, manifest_sha256=""
    )


def paths(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Where every value of a JSON tree is."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*path, key))


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
    content = edited(VALID, edits)
    if content != VALID:
        with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
            Manifest.from_bytes(content)


@given(byte_edits)
@settings(fuzz, max_examples=4000)
def test_changed_bytes_behind_a_hash_that_fits_are_refused_or_sound(edits: list) -> None:
    check_refused_or_sound(rehash(edited(zeroed(RECORD), edits)))


@given(changes, st.dictionaries(st.text(max_size=8), json_values, max_size=1))
@settings(fuzz, max_examples=3000)
def test_changed_fields_behind_a_hash_that_fits_are_refused_or_sound(changes: list, more: dict) -> None:
    record = copy.deepcopy(RECORD) | more
    for (*parents, last), change in changes:
        try:
            parent = reduce(lambda value, key: value[key], parents, record)
            if change is None:
                del parent[last]
            else:
                parent[last] = change[0]
        except (LookupError, TypeError):
            continue  # an earlier change took it away
    check_refused_or_sound(rehash(zeroed(record)))


@given(
    created=st.text(),
    opset=st.integers(),
    folded=st.booleans(),
    precision=st.sampled_from(Precision),
    dialect=st.sampled_from(Dialect),
    versions=st.dictionaries(st.text(), st.text()),
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
        mask_prompt=st.booleans(),
        max_tokens=st.integers(),
        instruction_template=st.text().map(lambda text: text + "{instruction}"),
    ),
    epsilon=st.floats(allow_nan=False, allow_infinity=False),
)
@settings(fuzz, max_examples=300)
def test_what_is_written_is_what_is_read(epsilon: float, **changes) -> None:
    source = full_manifest().source
    source = replace(source, architecture=replace(source.architecture, rms_norm_eps=epsilon))
    precision = changes["precision"]
    own = [CPU_GRAPH] * precision.has_cpu_graph + [QUANTIZATION] * precision.quantized
    files = {name: FileEntry(bytes=3, sha256="a" * 64) for name in (*FILES, TRUTH, *own)}
    manifest = replace(full_manifest(), source=source, files=files, **changes)
    assert from_json(Manifest, json.loads(json.dumps(to_json(manifest)))) == manifest
    content = manifest.to_bytes()
    read = Manifest.from_bytes(content)
    assert replace(read, manifest_sha256="") == manifest
    assert read.to_bytes() == content
