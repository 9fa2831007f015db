"""The gate lets sound engines through and no others."""

import io
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy.backends.base import Backend, Output
from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.encoder import open_parts
from nvembed_deploy.errors import BundleError, ParityError
from nvembed_deploy.model.config import Mask
from nvembed_deploy.parity.compare import TOLERANCES, compare, observe, require, require_mask
from nvembed_deploy.parity.probes import Truth, probe_rows
from nvembed_deploy.spec import Precision, Shape, ShapeProfile
from nvembed_deploy.tokenization import TextEncoder, TokenBatch

LARGEST = Shape(batch=32, tokens=512)


def judge(
    reference: Backend,
    candidate: Backend,
    text: TextEncoder,
    *,
    precision: Precision = Precision.FP32,
    largest: Shape = LARGEST,
) -> ParityReport:
    truth = observe(reference, text, precision=precision, largest=largest)
    return compare(truth, candidate, text, precision=precision, largest=largest)


class Faulty:
    """A sound backend with one fault behind it."""

    name = "faulty"
    profile: ShapeProfile | None = None
    in_flight: int = 1

    def __init__(self, backend: Backend, fault: object) -> None:
        self.backend, self.fault = backend, fault

    def run(self, batch: TokenBatch) -> Output:
        return self.fault(self.backend, batch)  # type: ignore[operator]


@pytest.fixture(scope="module")
def sound(bundles: dict[str, Path]) -> tuple[TextEncoder, Backend]:
    _, text, backend = open_parts(bundles["fp32"], "cpu")
    return text, backend


def turned(vectors: np.ndarray, angle: float) -> np.ndarray:
    """Unit rows turned by an angle in the plane of the first two components."""
    out = vectors.copy()
    out[:, 0] = np.cos(angle) * vectors[:, 0] - np.sin(angle) * vectors[:, 1]
    out[:, 1] = np.sin(angle) * vectors[:, 0] + np.cos(angle) * vectors[:, 1]
    return out


def pools_the_prompt(backend: Backend, batch: TokenBatch) -> Output:
    return backend.run(
        TokenBatch(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pool_mask=batch.attention_mask)
    )


def attends_to_padding(backend: Backend, batch: TokenBatch) -> Output:
    return backend.run(
        TokenBatch(
            input_ids=batch.input_ids, attention_mask=np.ones_like(batch.attention_mask), pool_mask=batch.pool_mask
        )
    )


def one_row_nan(backend: Backend, batch: TokenBatch) -> Output:
    output = backend.run(batch)
    output.embeddings[-1] = np.nan
    return output


def one_row_inf(backend: Backend, batch: TokenBatch) -> Output:
    output = backend.run(batch)
    output.embeddings[0, 3] = np.inf
    return output


def zeros(backend: Backend, batch: TokenBatch) -> Output:
    output = backend.run(batch)
    output.embeddings[0] = 0
    return output


def batch_one_is_another_path(backend: Backend, batch: TokenBatch) -> Output:
    output = backend.run(batch)
    return Output(turned(output.embeddings, 0.1), output.norms) if len(batch.input_ids) == 1 else output


@pytest.mark.parametrize(
    "fault", [pools_the_prompt, attends_to_padding, one_row_nan, one_row_inf, zeros, batch_one_is_another_path]
)
@pytest.mark.parametrize("precision", list(Precision))
def test_faults_are_found(sound: tuple[TextEncoder, Backend], fault: object, precision: Precision) -> None:
    text, backend = sound
    report = judge(backend, Faulty(backend, fault), text, precision=precision)
    assert not report.passed
    with pytest.raises(ParityError, match="faulty differs from onnxruntime"):
        require(report)


@pytest.mark.parametrize("precision", list(Precision))
def test_table(sound: tuple[TextEncoder, Backend], precision: Precision) -> None:
    """Just inside a row's cosine passes, just outside fails."""
    text, backend = sound
    limit = np.arccos(TOLERANCES[precision].min_cosine)

    def fault(angle: float) -> object:
        def run(inner: Backend, batch: TokenBatch) -> Output:
            output = inner.run(batch)
            # All of the difference in one plane: the length of a row's part in it varies, so scale the angle to it.
            part = np.linalg.norm(output.embeddings[:, :2], axis=1).max()
            return Output(turned(output.embeddings, angle / part), output.norms)

        return run

    outside = judge(backend, Faulty(backend, fault(limit * 1.2)), text, precision=precision)
    assert any("cosine" in failure for failure in outside.failures)
    if precision is not Precision.FP32:  # in FP32 the element-wise bound is the stricter one
        inside = judge(backend, Faulty(backend, fault(limit * 0.5)), text, precision=precision)
        assert not any(failure.startswith("cosine") for failure in inside.failures)


def test_same_backend_passes(sound: tuple[TextEncoder, Backend]) -> None:
    text, backend = sound
    report = require(judge(backend, backend, text))
    assert report.longest_tokens == 512
    assert report.texts > 20
    assert "passed" in report.summary()


def test_longest_probe_fills_the_profile(sound: tuple[TextEncoder, Backend]) -> None:
    text, backend = sound
    for largest, tokens in ((Shape(batch=1, tokens=40), 40), (Shape(batch=2, tokens=900), 900)):
        report = judge(backend, backend, text, largest=largest)
        assert (report.longest_tokens, report.passed) == (tokens, True)


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_an_overflow_is_no_lost_mask(sound: tuple[TextEncoder, Backend], value: float) -> None:
    text, backend = sound

    def spoilt(inner: Backend, batch: TokenBatch) -> Output:
        output = inner.run(batch)
        output.embeddings[:] = value
        return output

    require_mask(Faulty(backend, spoilt), text, Mask.BIDIRECTIONAL)


def test_other_width_is_named(sound: tuple[TextEncoder, Backend]) -> None:
    text, backend = sound

    def narrow(inner: Backend, batch: TokenBatch) -> Output:
        output = inner.run(batch)
        return Output(output.embeddings[:, :7], output.norms)

    with pytest.raises(ParityError, match="gives vectors of width 7"):
        judge(backend, Faulty(backend, narrow), text)


def test_probes_have_every_shape_that_hurts(sound: tuple[TextEncoder, Backend]) -> None:
    text, _ = sound
    names, rows = probe_rows(text, 128)
    assert any(row.prompt_tokens for row in rows)
    assert min(len(row) for row in rows) == 3  # <s>, one token, </s>
    assert [len(row) for row in rows[:2]] == [128, 128]
    assert any("</s>" in name for name in names)
    assert any(not name.isascii() for name in names)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_the_truth_travels(sound: tuple[TextEncoder, Backend], precision: Precision) -> None:
    text, backend = sound
    truth = observe(backend, text, precision=precision, largest=LARGEST)
    read = Truth.from_bytes(truth.to_bytes())
    assert (read.reference, read.names) == (truth.reference, truth.names)
    assert [(row.ids, row.prompt_tokens) for row in read.rows] == [(row.ids, row.prompt_tokens) for row in truth.rows]
    np.testing.assert_array_equal(read.vectors, truth.vectors)
    assert (read.ranking is None) == (precision is Precision.FP32)
    reports = [compare(item, backend, text, precision=precision, largest=LARGEST) for item in (truth, read)]
    assert reports[0] == reports[1]
    assert reports[0].overlap == (None if precision is Precision.FP32 else 1.0)


def test_an_engine_for_shorter_inputs_is_judged_by_those_that_fit(sound: tuple[TextEncoder, Backend]) -> None:
    text, backend = sound
    truth = observe(backend, text, precision=Precision.INT8, largest=LARGEST)
    report = compare(truth, backend, text, precision=Precision.INT8, largest=Shape(batch=2, tokens=90))
    assert report.passed
    assert report.overlap is None  # its passages are longer
    assert "overlap not measured (its passages are longer" in report.summary()
    assert (report.longest_tokens <= 90, report.texts >= 10) == (True, True)
    with pytest.raises(ParityError, match="no probe is as short as 2 tokens"):
        compare(truth, backend, text, precision=Precision.INT8, largest=Shape(batch=2, tokens=2))


def test_a_damaged_truth_is_named(sound: tuple[TextEncoder, Backend]) -> None:
    text, backend = sound
    content = observe(backend, text, precision=Precision.FP32, largest=Shape(batch=1, tokens=16)).to_bytes()
    for wrong in (b"", content[:100], content[:-40], b"PK" + content):
        with pytest.raises(BundleError, match=r"truth\.npz is damaged"):
            Truth.from_bytes(wrong)
    with np.load(io.BytesIO(content)) as arrays:
        parts = dict(arrays)
    for changed in ({"probe_lengths": parts["probe_lengths"] + 1}, {"vectors": parts["vectors"][1:]}):
        file = io.BytesIO()
        np.savez(file, **(parts | changed))
        with pytest.raises(BundleError, match="damaged"):
            Truth.from_bytes(file.getvalue())
