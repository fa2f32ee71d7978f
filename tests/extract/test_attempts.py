"""A worker that keeps dying ends the run, with what it was last seen to take."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from brainenc.extract.attempts import AttemptLedger, Death, Reading, explain_deaths, fitting_batch

GB = 10**9


def reading(worker="w", **figures):
    return Reading(worker=worker, **({"micro_batch": 8, "limit_bytes": 12 * GB} | figures))


def test_a_shard_that_kills_its_worker_is_left_out_after_so_many_tries_and_the_others_go_on():
    ledger = AttemptLedger(max_attempts=3, max_deaths=5)

    assert [ledger.begin("bad", f"w{n}") for n in range(4)] == ["go", "go", "go", "quarantined"]
    assert ledger.begin("good", "w4") == "go"
    ledger.end("good", sealed=True)
    assert len(ledger.state().deaths) == 3
    assert not ledger.state().stop


def test_workers_that_die_on_whatever_they_are_given_stop_the_run():
    ledger = AttemptLedger(max_attempts=3, max_deaths=4)

    answers = [ledger.begin(f"shard{n // 2}", f"w{n}") for n in range(12)]

    assert "stop" in answers
    assert set(answers[answers.index("stop") :]) == {"stop"}
    assert "4 workers died" in ledger.state().stop


def test_a_sealed_shard_shows_that_workers_are_able():
    ledger = AttemptLedger(max_attempts=3, max_deaths=2)
    for n in range(20):
        ledger.begin("unlucky", f"a{n}") if n < 2 else None
        ledger.begin(f"shard{n}", f"w{n}")
        ledger.end(f"shard{n}", sealed=True)

    assert not ledger.state().stop


def test_the_same_worker_asking_again_is_no_death():
    ledger = AttemptLedger()
    ledger.begin("shard", "w")

    assert ledger.begin("shard", "w") == "go"
    assert not ledger.state().deaths


def test_a_worker_is_told_to_stop_when_it_reports_or_asks():
    ledger = AttemptLedger()
    ledger.begin("shard0", "w")
    assert ledger.report(reading()) == ""

    ledger.stop("SIGTERM")

    assert ledger.report(reading()) == "SIGTERM"
    assert ledger.begin("shard1", "v") == "stop"
    assert ledger.state().active == 1


def test_images_of_dead_workers_still_count():
    ledger = AttemptLedger()
    ledger.begin("shard", "w")
    ledger.report(reading("w", rows=5))
    ledger.begin("shard", "v")
    ledger.report(reading("v", rows=2))

    assert ledger.state().rows == 7
    assert pickle.loads(pickle.dumps(ledger.state())) == ledger.state()


def test_the_account_of_deaths_names_peak_limit_and_a_batch_that_fits():
    last = reading(loaded_bytes=1 * GB, used_bytes=9 * GB, peak_bytes=9 * GB, machine_used_bytes=11 * GB)

    text = explain_deaths((Death(task="shard", attempt=1, last=last),))

    assert "9 GB" in text
    assert "12 GB" in text
    assert "--batch-size 4 would fit" in text


def test_an_account_without_any_reading_says_so():
    assert "loading the backbone" in explain_deaths((Death(task="shard", attempt=1, last=None),))


@given(
    st.integers(1, 64),
    st.integers(0, 8 * GB),
    st.integers(0, 30 * GB),
    st.integers(0, 24 * GB),
    st.integers(0, 24 * GB),
)
def test_a_suggested_batch_is_smaller_and_at_least_one(micro_batch, loaded, above, machine, limit):
    last = reading(
        micro_batch=micro_batch, loaded_bytes=loaded, used_bytes=loaded, peak_bytes=loaded + above,
        machine_used_bytes=machine, limit_bytes=limit,
    )  # fmt: skip

    assert 1 <= fitting_batch(last) <= max(1, micro_batch // 2)
