"""Requests of many threads in shared batches: the same vectors, a bound, cancelled places, errors that stay apart."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import pytest

from nvembed_deploy import Coalescer, ConfigError, DeadlineError, Encoder, NumericsError, OverloadedError
from nvembed_deploy.backends.base import Output
from nvembed_deploy.coalescer import GROUP_SECONDS
from nvembed_deploy.tokenization import TokenBatch
from tests.conformance import TEXTS


class Gate:
    """Stands in front of an encoder's backend and holds its batches back until it is opened."""

    def __init__(self, encoder: Encoder) -> None:
        self.inner = encoder._backend
        self.name, self.profile, self.in_flight = self.inner.name, self.inner.profile, 1
        self.open = threading.Event()
        self.entered = threading.Event()
        self.rows: list[int] = []

    def run(self, batch: TokenBatch) -> Output:
        self.entered.set()
        assert self.open.wait(20)
        self.rows.append(len(batch.input_ids))
        return self.inner.run(batch)


@pytest.fixture
def gated(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(encoder)
    monkeypatch.setattr(encoder, "_backend", gate)
    yield gate
    gate.open.set()


def test_threads_get_their_own_vectors(encoder: Encoder) -> None:
    """Sixteen threads, a thousand calls in all, prompts mixed."""
    prompts = [None, "find the passage: ", "query: "]
    expected = {prompt: encoder.encode(TEXTS, prompt=prompt) for prompt in prompts}
    with Coalescer(encoder) as coalescer, ThreadPoolExecutor(16) as pool:

        def call(number: int) -> float:
            index, prompt = number % len(TEXTS), prompts[number % 3]
            rows = encoder.tokenize([TEXTS[index]], prompt=prompt)
            return float(np.abs(coalescer.submit(rows).result()[0] - expected[prompt][index]).max())

        assert max(pool.map(call, range(1000))) <= 2e-6


def test_what_waits_runs_together(encoder: Encoder, gated: Gate) -> None:
    with Coalescer(encoder) as coalescer:
        first = coalescer.submit(encoder.tokenize(["first"]))
        assert gated.entered.wait(20)
        later = [coalescer.submit(encoder.tokenize([f"later {number}"])) for number in range(5)]
        assert coalescer.waiting_texts == 5
        gated.open.set()
        assert first.result().shape == later[0].result().shape
        assert len([future.result() for future in later]) == 5
    assert gated.rows == [1, 5]


def test_the_queue_is_bounded_and_cancelled_places_are_free(encoder: Encoder, gated: Gate) -> None:
    with Coalescer(encoder, max_waiting=3) as coalescer:
        running = coalescer.submit(encoder.tokenize(["running"]))
        assert gated.entered.wait(20)
        waiting = [coalescer.submit(encoder.tokenize(["waiting"])) for _ in range(3)]
        for texts in (["one more"], ["two", "more"]):
            with pytest.raises(OverloadedError, match="3 texts are waiting in small requests, the maximum is 3"):
                coalescer.submit(encoder.tokenize(texts))
        assert waiting[1].cancel()
        accepted = coalescer.submit(encoder.tokenize(["taken"]))
        gated.open.set()
        assert accepted.result().shape == running.result().shape
    assert sum(gated.rows) == 4


def test_who_waits_for_a_cancelled_future_is_told(encoder: Encoder, gated: Gate) -> None:
    """As by an executor: `wait` and `as_completed` know no other end of a cancelled future."""
    with Coalescer(encoder, group_tokens=1) as coalescer:
        half_run = coalescer.submit(encoder.tokenize(["one", "two"]))
        assert gated.entered.wait(20)
        waiting = coalescer.submit(encoder.tokenize(["three"]))
        assert half_run.cancel()
        assert waiting.cancel()
        gated.open.set()
        assert coalescer.submit(encoder.tokenize(["after"])).result().shape[0] == 1
        assert wait([half_run, waiting], timeout=20).not_done == set()


def test_a_request_that_could_never_wait_is_refused_for_good(encoder: Encoder) -> None:
    with Coalescer(encoder, max_waiting=2) as coalescer:
        with pytest.raises(ConfigError, match="has 3 texts, more than the 2 that may wait; split it"):
            coalescer.submit(encoder.tokenize(["one", "two", "three"]))
        assert coalescer.submit(encoder.tokenize(["one", "two"])).result().shape[0] == 2


def test_places_are_claimed_before_tokenizing(encoder: Encoder) -> None:
    with Coalescer(encoder, max_waiting=3) as coalescer:
        reservation = coalescer.reserve(2)
        assert coalescer.waiting_texts == 2
        with pytest.raises(ConfigError, match="3 rows were submitted, but only 2 places were reserved"):
            reservation.submit(encoder.tokenize(["one", "two", "three"]))
        reservation.release()
        reservation.release()
        assert coalescer.waiting_texts == 0
        reservation = coalescer.reserve(3)
        with pytest.raises(OverloadedError, match="3 texts are waiting in small requests, the maximum is 3"):
            coalescer.reserve(1)
        vectors = reservation.submit(encoder.tokenize(["one", "two", "three"])).result()
        reservation.release()
        np.testing.assert_allclose(vectors, encoder.encode(["one", "two", "three"]), atol=2e-6)
    with pytest.raises(OverloadedError, match="shutting down"):
        coalescer.reserve(1)


def test_a_large_request_runs_in_pieces_and_lets_others_in(encoder: Encoder, gated: Gate) -> None:
    with Coalescer(encoder, group_tokens=40) as coalescer:
        running = coalescer.submit(encoder.tokenize(["running"]))
        assert gated.entered.wait(20)
        texts = [f"part {number} of a large request" for number in range(30)]
        large = coalescer.submit(encoder.tokenize(texts))
        small = coalescer.submit(encoder.tokenize(["small"]))
        order: list[str] = []
        large.add_done_callback(lambda _: order.append("large"))
        small.add_done_callback(lambda _: order.append("small"))
        gated.open.set()
        vectors = large.result()
        small.result()
        running.result()
        assert order == ["small", "large"]
    np.testing.assert_allclose(vectors, encoder.encode(texts), atol=2e-6)
    assert len(gated.rows) > 5


def test_a_large_request_that_is_cancelled_half_way_stops(encoder: Encoder, gated: Gate) -> None:
    with Coalescer(encoder, group_tokens=1) as coalescer:
        large = coalescer.submit(encoder.tokenize(["one", "two", "three", "four"]))
        assert gated.entered.wait(20)
        assert large.cancel()
        assert coalescer.waiting_texts == 0
        after = coalescer.submit(encoder.tokenize(["after"]))
        gated.open.set()
        assert after.result().shape[0] == 1
    assert gated.rows == [1, 1]  # the first of the large one, and what came behind it


def test_a_large_request_that_fails_half_way_fails_once(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, gated: Gate
) -> None:
    run = gated.run

    def spoiled(batch: TokenBatch) -> Output:
        output = run(batch)
        if len(gated.rows) == 2:
            output.embeddings[:] = np.nan
        return output

    monkeypatch.setattr(gated, "run", spoiled)
    gated.open.set()
    with Coalescer(encoder, group_tokens=1) as coalescer:
        large = coalescer.submit(encoder.tokenize(["one", "two", "three", "four"]))
        with pytest.raises(NumericsError):
            large.result()
        assert coalescer.submit(encoder.tokenize(["after"])).result().shape[0] == 1
    assert gated.rows == [1, 1, 1]


def test_one_bad_text_fails_alone(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, gated: Gate) -> None:
    bad = encoder.tokenize(["the bad one"])[0].ids
    run = gated.run

    def spoiled(batch: TokenBatch) -> Output:
        output = run(batch)
        for row, ids in enumerate(batch.input_ids):
            if list(ids[: len(bad)]) == bad:
                output.embeddings[row] = np.nan
        return output

    monkeypatch.setattr(gated, "run", spoiled)
    with Coalescer(encoder) as coalescer:
        first = coalescer.submit(encoder.tokenize(["first"]))
        assert gated.entered.wait(20)
        futures = [coalescer.submit(encoder.tokenize([text])) for text in ("good", "the bad one", "good")]
        gated.open.set()
        first.result()
        with pytest.raises(NumericsError):
            futures[1].result()
        np.testing.assert_allclose(futures[0].result(), futures[2].result(), atol=2e-6)
        assert np.isfinite(coalescer.submit(encoder.tokenize(["good"])).result()).all()


def test_a_dimension_that_the_model_lacks_fails_nobody_else(encoder: Encoder, gated: Gate) -> None:
    with Coalescer(encoder) as coalescer:
        first = coalescer.submit(encoder.tokenize(["first"]))
        assert gated.entered.wait(20)
        good = coalescer.submit(encoder.tokenize(["good"]))
        with pytest.raises(ConfigError, match="dimensions is 3; this model was not trained"):
            coalescer.submit(encoder.tokenize(["bad"]), dimensions=3)
        gated.open.set()
        assert [len(future.result(20)) for future in (first, good)] == [1, 1]
        assert coalescer.waiting_texts == 0
    assert gated.rows == [1, 1]


def test_coroutines_can_wait(encoder: Encoder) -> None:
    async def ask(coalescer: Coalescer) -> list[np.ndarray]:
        futures: list[Future] = [coalescer.submit(encoder.tokenize([text])) for text in TEXTS]
        return await asyncio.gather(*map(asyncio.wrap_future, futures))

    with Coalescer(encoder) as coalescer:
        vectors = np.concatenate(asyncio.run(ask(coalescer)))
    np.testing.assert_allclose(vectors, encoder.encode(TEXTS), atol=2e-6)


def test_closing_runs_what_waits_and_refuses_what_comes(encoder: Encoder) -> None:
    coalescer = Coalescer(encoder)
    futures = [coalescer.submit(encoder.tokenize(["text"])) for _ in range(10)]
    coalescer.close()
    assert all(future.done() for future in futures)
    with pytest.raises(OverloadedError, match="shutting down"):
        coalescer.submit(encoder.tokenize(["text"]))
    with pytest.raises(ConfigError, match="max_waiting is 0"):
        Coalescer(encoder, max_waiting=0)


def test_large_and_small_requests_have_places_of_their_own(encoder: Encoder, gated: Gate) -> None:
    """One request of the largest size locks no query out, and queries do not keep it out."""
    with Coalescer(encoder, max_waiting=100) as coalescer:
        first = coalescer.submit(encoder.tokenize(["first"]))
        assert gated.entered.wait(20)
        large = coalescer.reserve(100)
        with pytest.raises(OverloadedError, match="100 texts are waiting in large requests, the maximum is 100"):
            coalescer.reserve(50)
        small = [coalescer.submit(encoder.tokenize([f"query {number}"])) for number in range(100)]
        with pytest.raises(OverloadedError, match="100 texts are waiting in small requests"):
            coalescer.reserve(1)
        answer = large.submit(encoder.tokenize([f"text {number}" for number in range(100)]))
        with pytest.raises(ConfigError, match="already used or released"):
            large.submit(encoder.tokenize(["twice"]))
        gated.open.set()
        assert answer.result(20).shape == (100, encoder.dimension)
        assert len([future.result(20) for future in [first, *small]]) == 101


def test_small_and_large_requests_share_each_batch(encoder: Encoder, gated: Gate) -> None:
    """Even if a single text fills a batch: neither kind waits until there are no requests of the other."""
    with Coalescer(encoder, group_tokens=1) as coalescer:
        running = coalescer.submit(encoder.tokenize(["running"]))
        assert gated.entered.wait(20)
        large = coalescer.submit(encoder.tokenize([f"text {number}" for number in range(40)]))
        small = [coalescer.submit(encoder.tokenize([f"query {number}"])) for number in range(3)]
        order: list[str] = []
        large.add_done_callback(lambda _: order.append("large"))
        small[-1].add_done_callback(lambda _: order.append("small"))
        gated.open.set()
        assert large.result(20).shape[0] == 40
        assert [len(future.result(20)) for future in (running, *small)] == [1] * 4
    assert order == ["small", "large"]
    assert gated.rows == [1, 2, 2, 2] + [1] * 37


def test_a_few_texts_do_not_keep_out_a_request_of_the_maximum_size(encoder: Encoder, gated: Gate) -> None:
    with Coalescer(encoder, max_waiting=100) as coalescer:
        coalescer.submit(encoder.tokenize(["running"]))
        assert gated.entered.wait(20)
        waiting = [coalescer.reserve(50), coalescer.reserve(100)]
        with pytest.raises(OverloadedError, match="150 texts are waiting in large requests, the maximum is 100"):
            coalescer.reserve(50)
        for reservation in waiting:
            reservation.release()
        gated.open.set()


class SlowGate(Gate):
    """Takes 5 ms for each token of a batch, so 200 tokens a second."""

    def run(self, batch: TokenBatch) -> Output:
        time.sleep(0.005 * batch.input_ids.size)
        return super().run(batch)


def test_what_cannot_be_done_in_time_is_refused_or_not_run(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = SlowGate(encoder)
    gate.open.set()
    monkeypatch.setattr(encoder, "_backend", gate)
    rows = encoder.tokenize(["a text of several tokens"])
    tokens = len(rows[0])
    with Coalescer(encoder, group_tokens=tokens) as coalescer:
        coalescer.submit(rows).result(20)  # measures the speed
        waiting = [coalescer.submit(rows) for _ in range(20)]
        with pytest.raises(OverloadedError, match=r"would take \d+\.\d s with the waiting texts, the limit is 0\.1 s"):
            coalescer.submit(rows, max_seconds=0.1)
        for future in waiting:
            future.cancel()


def test_a_slow_engine_runs_small_groups(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small request waits for a group of half a second, and not for all that a large request could fill."""
    gate = SlowGate(encoder)
    gate.open.set()
    monkeypatch.setattr(encoder, "_backend", gate)
    row = encoder.tokenize(["a text of several tokens"])
    with Coalescer(encoder, group_tokens=20 * len(row[0])) as coalescer:
        coalescer.submit(row * 20).result(20)
        gate.rows.clear()
        coalescer.submit(row * 30).result(20)
    assert sum(gate.rows) == 30
    assert max(gate.rows) * len(row[0]) <= GROUP_SECONDS * 200


def test_what_is_too_late_is_not_run(encoder: Encoder, gated: Gate) -> None:
    rows = encoder.tokenize(["a text"])
    with Coalescer(encoder, group_tokens=1) as coalescer:
        first = coalescer.submit(rows)
        assert gated.entered.wait(20)
        late = coalescer.submit(rows, max_seconds=0.2)
        time.sleep(0.3)
        gated.open.set()
        with pytest.raises(DeadlineError, match="could not be completed before its deadline and was not started"):
            late.result(20)
        first.result(20)
    assert len(gated.rows) == 1


def test_an_idle_engine_takes_what_a_slow_moment_would_refuse(encoder: Encoder) -> None:
    rows = encoder.tokenize(["a text"])
    with Coalescer(encoder) as coalescer:
        coalescer._tokens_per_second = 1e-6
        assert coalescer.submit(rows, max_seconds=20).result(20).shape == (1, encoder.dimension)


def test_small_groups_say_nothing_of_the_speed(encoder: Encoder) -> None:
    """A query has a fixed cost: a large request must not be refused for the speed that a lone text had."""
    with Coalescer(encoder) as coalescer:
        coalescer.submit(encoder.tokenize(["a"])).result(20)
        assert coalescer._tokens_per_second == float("inf")
        coalescer.submit(encoder.tokenize(["several words " * 20] * 300)).result(60)
        assert coalescer._tokens_per_second < float("inf")


def test_closing_has_a_limit(encoder: Encoder, gated: Gate) -> None:
    coalescer = Coalescer(encoder, group_tokens=1)
    running = coalescer.submit(encoder.tokenize(["one"]))
    waiting = coalescer.submit(encoder.tokenize(["two"]))
    assert gated.entered.wait(20)
    started = time.monotonic()
    coalescer.close(max_seconds=0.2)
    assert time.monotonic() - started < 5
    with pytest.raises(OverloadedError, match="shutting down"):
        waiting.result(0)
    gated.open.set()
    assert running.result(20).shape == (1, encoder.dimension)
