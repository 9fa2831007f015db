"""The parity gate passes correct engines and refuses faulty ones."""

import io
from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy.backends.base import Backend, Output
from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.errors import BundleError, ConfigError, MaskError, ParityError
from nvembed_deploy.model.config import Mask
from nvembed_deploy.parity.compare import TOLERANCES, compare, compute_reference_outputs, require_mask, require_passed
from nvembed_deploy.parity.everyday_probes import EVERYDAY_PROBES
from nvembed_deploy.parity.probes import PROBES, ReferenceOutputs, probe_rows
from nvembed_deploy.select_backend import open_parts
from nvembed_deploy.spec import Precision, Shape, ShapeProfile
from nvembed_deploy.tokenization import TextEncoder, TokenBatch

MAX_SHAPE = Shape(batch=32, tokens=512)


def judge(
    reference: Backend,
    candidate: Backend,
    text: TextEncoder,
    *,
    precision: Precision = Precision.FP32,
    max_shape: Shape = MAX_SHAPE,
) -> ParityReport:
    outputs = compute_reference_outputs(reference, text, precision=precision, max_shape=max_shape)
    return compare(outputs, candidate, text, precision=precision, max_shape=max_shape)


class Faulty:
    """A correct backend whose inputs or outputs are altered by one fault."""

    name = "faulty"
    profile: ShapeProfile | None = None
    in_flight: int = 1

    def __init__(self, backend: Backend, fault: object) -> None:
        self.backend, self.fault = backend, fault

    def run(self, batch: TokenBatch) -> Output:
        return self.fault(self.backend, batch)  # type: ignore[operator]


@pytest.fixture(scope="module")
def correct_backend(bundles: dict[str, Path]) -> tuple[TextEncoder, Backend]:
    _, text, backend = open_parts(bundles["fp32"], "cpu")
    return text, backend


def rotated(vectors: np.ndarray, angle: float) -> np.ndarray:
    """Rotates unit rows by an angle in the plane of the first two components."""
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
    return Output(rotated(output.embeddings, 0.1), output.norms) if len(batch.input_ids) == 1 else output


@pytest.mark.parametrize(
    "fault", [pools_the_prompt, attends_to_padding, one_row_nan, one_row_inf, zeros, batch_one_is_another_path]
)
@pytest.mark.parametrize("precision", list(Precision))
def test_faults_are_detected(correct_backend: tuple[TextEncoder, Backend], fault: object, precision: Precision) -> None:
    text, backend = correct_backend
    report = judge(backend, Faulty(backend, fault), text, precision=precision)
    assert not report.passed
    with pytest.raises(ParityError, match="faulty differs from onnxruntime"):
        require_passed(report)


@pytest.mark.parametrize("precision", list(Precision))
def test_the_cosine_bound_is_sharp(correct_backend: tuple[TextEncoder, Backend], precision: Precision) -> None:
    """A difference just inside the cosine bound passes, one just outside fails."""
    text, backend = correct_backend
    limit = np.arccos(TOLERANCES[precision].min_cosine)

    def fault(angle: float) -> object:
        def run(inner: Backend, batch: TokenBatch) -> Output:
            output = inner.run(batch)
            # All of the difference is in one plane; scale the angle by the largest length of a row in that plane.
            length_in_plane = np.linalg.norm(output.embeddings[:, :2], axis=1).max()
            return Output(rotated(output.embeddings, angle / length_in_plane), output.norms)

        return run

    failed = judge(backend, Faulty(backend, fault(limit * 1.2)), text, precision=precision)
    assert any("cosine" in failure for failure in failed.failures)
    if precision is not Precision.FP32:  # in FP32 the element-wise bound is the stricter one
        passed = judge(backend, Faulty(backend, fault(limit * 0.5)), text, precision=precision)
        assert not any(failure.startswith("cosine") for failure in passed.failures)


def test_same_backend_passes(correct_backend: tuple[TextEncoder, Backend]) -> None:
    text, backend = correct_backend
    report = require_passed(judge(backend, backend, text))
    assert report.longest_tokens == 512
    assert report.texts > 20
    assert "passed" in report.summary()


def test_longest_probe_fills_the_profile(correct_backend: tuple[TextEncoder, Backend]) -> None:
    text, backend = correct_backend
    for max_shape, tokens in ((Shape(batch=1, tokens=40), 40), (Shape(batch=2, tokens=900), 900)):
        report = judge(backend, backend, text, max_shape=max_shape)
        assert (report.longest_tokens, report.passed) == (tokens, True)


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_an_overflow_is_not_reported_as_a_wrong_mask(
    correct_backend: tuple[TextEncoder, Backend], value: float
) -> None:
    text, backend = correct_backend

    def spoilt(inner: Backend, batch: TokenBatch) -> Output:
        output = inner.run(batch)
        output.embeddings[:] = value
        return output

    require_mask(Faulty(backend, spoilt), text, Mask.BIDIRECTIONAL)


def test_another_dimension_is_named(correct_backend: tuple[TextEncoder, Backend]) -> None:
    text, backend = correct_backend

    def narrow(inner: Backend, batch: TokenBatch) -> Output:
        output = inner.run(batch)
        return Output(output.embeddings[:, :7], output.norms)

    with pytest.raises(ParityError, match="returns vectors of 7 dimensions"):
        judge(backend, Faulty(backend, narrow), text)


def test_probes_cover_prompts_short_and_long_texts(correct_backend: tuple[TextEncoder, Backend]) -> None:
    text, _ = correct_backend
    names, rows = probe_rows(text, 128)
    assert any(row.prompt_tokens for row in rows)
    assert min(len(row) for row in rows) == 3  # <s>, one token, </s>
    assert [len(row) for row in rows[:2]] == [128, 128]
    assert any("</s>" in name for name in names)
    assert any(not name.isascii() for name in names)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_reference_outputs_are_read_as_written(
    correct_backend: tuple[TextEncoder, Backend], precision: Precision
) -> None:
    text, backend = correct_backend
    reference = compute_reference_outputs(backend, text, precision=precision, max_shape=MAX_SHAPE)
    read = ReferenceOutputs.from_bytes(reference.to_bytes())
    assert (read.reference, read.names) == (reference.reference, reference.names)
    assert [(row.ids, row.prompt_tokens) for row in read.rows] == [
        (row.ids, row.prompt_tokens) for row in reference.rows
    ]
    np.testing.assert_array_equal(read.vectors, reference.vectors)
    assert (read.ranking is None) == (precision is Precision.FP32)
    reports = [
        compare(outputs, backend, text, precision=precision, max_shape=MAX_SHAPE) for outputs in (reference, read)
    ]
    assert reports[0] == reports[1]
    assert reports[0].overlap == (None if precision is Precision.FP32 else 1.0)


def test_an_engine_for_short_inputs_is_checked_with_the_probes_that_fit(
    correct_backend: tuple[TextEncoder, Backend],
) -> None:
    text, backend = correct_backend
    reference = compute_reference_outputs(backend, text, precision=Precision.INT8, max_shape=MAX_SHAPE)
    report = compare(reference, backend, text, precision=Precision.INT8, max_shape=Shape(batch=2, tokens=90))
    assert report.passed
    assert report.overlap is None  # the passages are longer
    assert "overlap not measured" in report.summary()
    assert (report.longest_tokens <= 90, report.texts >= 10) == (True, True)


class Short(Faulty):
    """A plan that takes texts of at most some tokens."""

    def __init__(self, backend: Backend, max_tokens: int) -> None:
        super().__init__(backend, self.run_short)
        self.max_tokens = max_tokens

    def run_short(self, backend: Backend, batch: TokenBatch) -> Output:
        if batch.input_ids.shape[1] > self.max_tokens:
            raise ConfigError(f"a batch of {batch.input_ids.shape} tokens is larger than the plan takes")
        return backend.run(batch)


@pytest.mark.parametrize("tokens", [*range(1, 13), 16])
def test_the_mask_of_a_short_plan_is_checked(correct_backend: tuple[TextEncoder, Backend], tokens: int) -> None:
    text, backend = correct_backend
    short, max_shape = Short(backend, tokens), Shape(batch=4, tokens=tokens)
    require_mask(short, text, Mask.BIDIRECTIONAL, max_shape=max_shape)
    if tokens > 1:
        with pytest.raises(MaskError, match="attends to the tokens after it, but the model is causal"):
            require_mask(short, text, Mask.CAUSAL, max_shape=max_shape)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8])
def test_a_short_plan_is_compared_on_enough_texts_or_refused(
    correct_backend: tuple[TextEncoder, Backend], tokens: int, precision: Precision
) -> None:
    text, backend = correct_backend
    max_shape = Shape(batch=4, tokens=tokens)
    probes = len(PROBES) + 2 + (len(EVERYDAY_PROBES) if precision.quantized else 0)
    if tokens < 3:
        message = (
            f"--max BATCHx{tokens} truncates the {probes} texts .* a comparison needs 10; pass more tokens with --max"
        )
        with pytest.raises(ConfigError, match=message):
            compute_reference_outputs(backend, text, precision=precision, max_shape=max_shape)
    else:
        report = judge(backend, Short(backend, tokens), text, precision=precision, max_shape=max_shape)
        assert (report.passed, report.longest_tokens) == (True, tokens)
        assert report.texts >= 10
        rows = probe_rows(text, tokens, everyday=precision.quantized)[1]
        assert len({tuple(row.ids) for row in rows}) == report.texts
    long_reference = compute_reference_outputs(backend, text, precision=precision, max_shape=Shape(batch=2, tokens=128))
    message = rf"only . of the {probes} reference texts have at most {tokens} tokens.* with --max BATCHx{tokens}$"
    with pytest.raises(ParityError, match=message):
        compare(long_reference, Short(backend, tokens), text, precision=precision, max_shape=max_shape)


def test_passages_that_became_alike_are_not_ranked(correct_backend: tuple[TextEncoder, Backend]) -> None:
    text, backend = correct_backend
    report = judge(backend, backend, text, precision=Precision.INT8, max_shape=Shape(batch=4, tokens=4))
    assert report.overlap is None
    assert "overlap not measured" in report.summary()


def test_damaged_reference_outputs_are_refused(correct_backend: tuple[TextEncoder, Backend]) -> None:
    text, backend = correct_backend
    content = compute_reference_outputs(
        backend, text, precision=Precision.FP32, max_shape=Shape(batch=1, tokens=16)
    ).to_bytes()
    for wrong in (b"", content[:100], content[:-40], b"PK" + content):
        with pytest.raises(BundleError, match=r"reference\.npz is damaged"):
            ReferenceOutputs.from_bytes(wrong)
    with np.load(io.BytesIO(content)) as file:
        arrays = dict(file)
    for changed in ({"probe_lengths": arrays["probe_lengths"] + 1}, {"vectors": arrays["vectors"][1:]}):
        buffer = io.BytesIO()
        np.savez(buffer, **(arrays | changed))
        with pytest.raises(BundleError, match="damaged"):
            ReferenceOutputs.from_bytes(buffer.getvalue())
