"""How often one source may try."""

from __future__ import annotations

from toppy.policy.attempts import AttemptLimit, FailedAttempts


def test_a_source_may_try_as_often_as_its_burst_and_then_at_the_rate() -> None:
    limit = AttemptLimit(2, 5)
    assert [limit.take("a", 0.0) for _ in range(6)] == [True] * 5 + [False]
    assert [limit.take("a", 1.0) for _ in range(3)] == [True, True, False]
    assert limit.take("b", 1.0)


def test_the_table_has_a_bound_and_forgets_who_tried_longest_ago() -> None:
    limit = AttemptLimit(1, 1, most_sources=2)
    assert limit.take("a", 0.0)
    assert limit.take("b", 0.0)
    assert not limit.take("a", 0.0)
    assert limit.take("c", 0.0)
    assert len(limit) == 2
    assert not limit.take("a", 0.0)
    assert limit.take("b", 0.0)


def test_failures_use_up_what_a_source_may() -> None:
    attempts = FailedAttempts(60)
    for _ in range(60):
        assert attempts.wait_s("a", 0.0) == 0.0
        attempts.failed("a", 0.0)
    assert 0.9 < attempts.wait_s("a", 0.0) < 1.1
    assert attempts.wait_s("b", 0.0) == 0.0
    assert attempts.wait_s("a", 1.1) == 0.0


def test_a_slow_rate_lets_one_pass_after_its_time() -> None:
    attempts = FailedAttempts(1)
    attempts.failed("a", 0.0)
    assert 59 < attempts.wait_s("a", 0.0) < 61
    assert attempts.wait_s("a", 30.0) > 29
    assert attempts.wait_s("a", 60.1) == 0.0


def test_without_a_limit_nothing_is_remembered() -> None:
    attempts = FailedAttempts(0)
    for _ in range(1000):
        attempts.failed("a", 0.0)
    attempts.succeeded("good")
    assert attempts.wait_s("a", 0.0) == 0.0
    assert not attempts.is_known_good("good")


def test_the_credentials_that_were_good_lately_are_known() -> None:
    attempts = FailedAttempts(1, most_credentials=2)
    for credential in ("first", "second", "first", "third"):
        attempts.succeeded(credential)
    known = [attempts.is_known_good(each) for each in ("first", "second", "third")]
    assert known == [True, False, True]
