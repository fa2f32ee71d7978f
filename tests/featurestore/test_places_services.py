"""How often a remote place is asked again, and that what its failures quote holds no credential."""

import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainenc.errors import TransferFailed
from brainenc.featurestore.services.patience import Patience, is_passing


class FakeClock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def patience(self, **settings):
        return Patience(clock=lambda: self.now, sleep=self.sleep, **settings)


def failing(times, error):
    left = [times]

    def action(limit):
        if left[0]:
            left[0] -= 1
            raise error
        return "answer"

    return action


def test_passing_failures_are_tried_again_with_growing_waits():
    clock = FakeClock()
    assert clock.patience(first_wait_s=1.0).call("x", failing(4, ConnectionResetError("gone"))) == "answer"
    assert len(clock.slept) == 4
    assert all(0.5 * 2**i <= wait <= 1.5 * 2**i for i, wait in enumerate(clock.slept))


@given(deadline=st.floats(0.5, 500), first=st.floats(0.01, 5))
def test_the_deadline_holds_whatever_the_waits(deadline, first):
    clock = FakeClock()
    with pytest.raises(TransferFailed):
        clock.patience(deadline_s=deadline, first_wait_s=first).call("x", failing(10**6, TimeoutError()))
    assert clock.now <= deadline


def test_a_large_body_lengthens_the_deadline():
    clock = FakeClock()
    limits = []
    clock.patience(try_s=10, deadline_s=20, slowest_rate=1e6).call("x", limits.append, n_bytes=60_000_000)
    assert limits == [70.0]


def test_answers_are_no_failures():
    for answer in (FileNotFoundError("x"), FileExistsError("x")):
        clock = FakeClock()
        with pytest.raises(type(answer)):
            clock.patience().call("x", failing(1, answer))
        assert not clock.slept


@pytest.mark.parametrize(
    "error", [PermissionError("AccessDenied"), OSError("Forbidden: b/x\nno"), ValueError("Bad Request: b/x\ninvalid")]
)
def test_what_another_try_would_not_mend_fails_at_once_and_says_so(error):
    clock = FakeClock()
    with pytest.raises(TransferFailed, match="permissions"):
        clock.patience().call("Reading gs://b/x", failing(1, error))
    assert not clock.slept


def test_our_own_mistakes_are_not_retried():
    clock = FakeClock()
    with pytest.raises(TypeError):
        clock.patience().call("x", failing(1, TypeError("a bug")))
    assert not clock.slept


def test_status_codes_decide():
    from gcsfs.retry import HttpError

    assert is_passing(HttpError({"code": 503, "message": "busy"}))
    assert is_passing(HttpError({"code": 429, "message": "slow down"}))
    assert is_passing(HttpError({"code": 400, "message": "Provided crc32c 'a' doesn't match calculated crc32c 'b'."}))
    assert not is_passing(HttpError({"code": 400, "message": "bad name"}))
    assert not is_passing(HttpError({"code": 401, "message": "no"}))


def test_a_failure_carries_no_credential_in_text_cause_or_pickle():
    clock = FakeClock()
    secret = "wJalrXUtnFEMI"
    with pytest.raises(TransferFailed) as caught:
        clock.patience(deadline_s=1).call("x", failing(9, OSError(f"https://AKIA:{secret}@h/x timed out")))
    assert secret not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert secret.encode() not in pickle.dumps(caught.value)


def test_a_place_that_does_not_answer_is_not_silent_for_long(caplog, monkeypatch):
    monkeypatch.setattr("brainenc.featurestore.services.patience._told", [-1e9])
    patience = Patience(notice_s=0.05, deadline_s=90)
    assert patience.call("Reading gs://lab/x", lambda limit: time.sleep(0.3)) is None
    assert caplog.messages == ["Reading gs://lab/x: no answer for 0 s; trying again, for up to 90 s in all."]
    assert patience.call("Reading gs://lab/y", lambda limit: time.sleep(0.2)) is None
    assert len(caplog.messages) == 1  # one word in half a minute, however many wait


def test_the_notice_names_why_the_last_try_failed_without_its_secrets(caplog, monkeypatch):
    monkeypatch.setattr("brainenc.featurestore.services.patience._told", [-1e9])
    tries = iter([ConnectionError("https://key:secret@host refused"), None])

    def action(limit):
        if (error := next(tries)) is not None:
            raise error
        time.sleep(0.3)

    Patience(notice_s=0.1, first_wait_s=0.01).call("Reading gs://lab/x", action)
    assert "(ConnectionError: https://" in caplog.text
    assert "secret" not in caplog.text


def test_a_place_that_answers_is_not_spoken_of(caplog, monkeypatch):
    monkeypatch.setattr("brainenc.featurestore.services.patience._told", [-1e9])
    Patience(notice_s=0.05).call("Reading gs://lab/x", lambda limit: None)
    time.sleep(0.1)
    assert caplog.messages == []
