"""The gate lets sound engines through and no others."""

from pathlib import Path

import numpy as np
import pytest

from nvembed_deploy.backends import Backend, Output
from nvembed_deploy.config import Precision, Shape, ShapeProfile
from nvembed_deploy.encoder import open_parts
from nvembed_deploy.errors import ParityError
from nvembed_deploy.parity import TOLERANCES, compare, probe_rows, require
from nvembed_deploy.text import TextEncoder, TokenBatch

LARGEST = Shape(batch=32, tokens=512)


class Faulty:
    """A sound backend with one fault behind it."""

    name = "faulty"
    profile: ShapeProfile | None = None

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
    report = compare(backend, Faulty(backend, fault), text, precision=precision, largest=LARGEST)
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

    outside = compare(backend, Faulty(backend, fault(limit * 1.2)), text, precision=precision, largest=LARGEST)
    assert any("cosine" in failure for failure in outside.failures)
    if precision is not Precision.FP32:  # in FP32 the element-wise bound is the stricter one
        inside = compare(backend, Faulty(backend, fault(limit * 0.5)), text, precision=precision, largest=LARGEST)
        assert not any(failure.startswith("cosine") for failure in inside.failures)


def test_same_backend_passes(sound: tuple[TextEncoder, Backend]) -> None:
    text, backend = sound
    report = require(compare(backend, backend, text, precision=Precision.FP32, largest=LARGEST))
    assert report.longest_tokens == 512
    assert report.texts > 20
    assert "passed" in report.summary()


def test_longest_probe_fills_the_profile(sound: tuple[TextEncoder, Backend]) -> None:
    text, backend = sound
    for largest, tokens in ((Shape(batch=1, tokens=40), 40), (Shape(batch=2, tokens=900), 900)):
        report = compare(backend, backend, text, precision=Precision.FP32, largest=largest)
        assert (report.longest_tokens, report.passed) == (tokens, True)


def test_other_width_is_named(sound: tuple[TextEncoder, Backend]) -> None:
    text, backend = sound

    def narrow(inner: Backend, batch: TokenBatch) -> Output:
        output = inner.run(batch)
        return Output(output.embeddings[:, :7], output.norms)

    with pytest.raises(ParityError, match="gives vectors of width 7"):
        compare(backend, Faulty(backend, narrow), text, precision=Precision.FP32, largest=LARGEST)


def test_probes_have_every_shape_that_hurts(sound: tuple[TextEncoder, Backend]) -> None:
    text, _ = sound
    names, rows = probe_rows(text, 128)
    assert any(row.prompt_tokens for row in rows)
    assert min(len(row) for row in rows) == 3  # <s>, one token, </s>
    assert [len(row) for row in rows[:2]] == [128, 128]
    assert any("</s>" in name for name in names)
    assert any(not name.isascii() for name in names)
