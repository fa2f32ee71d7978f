"""From readings to levels: thresholds, growth, hysteresis and dwell. Nothing real is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainenc.errors import UsageError
from brainenc.guard.policy import (
    RANK,
    Escalation,
    Growth,
    Meter,
    Policy,
    PolicyConfig,
    Thresholds,
    Timing,
    Trend,
    classify,
    free_below,
    sampling_interval,
)
from brainenc.guard.testing import FakeSource

GB = 1_000_000_000
CALM = Timing(save_s=0.3, step_s=0.2)


def levels(policy, source, readings, timing=CALM):
    """The level after each (time, fraction)."""
    return [policy.look(now, [source.at(fraction)], timing).level for now, fraction in readings]


@pytest.mark.parametrize(
    ("batch_size", "wanted"),
    [(1, (0.90, 0.92, 0.85, 0.88)), (4, (0.90, 0.92, 0.85, 0.88)), (6, (0.88, 0.90, 0.83, 0.86)),
     (7, (0.88, 0.90, 0.83, 0.86)), (8, (0.85, 0.88, 0.80, 0.84)), (64, (0.85, 0.88, 0.80, 0.84))],
)  # fmt: skip
def test_presets_by_batch_size(batch_size, wanted):
    t = Thresholds.for_batch_size(batch_size)

    assert (t.gpu_warn, t.gpu_critical, t.ram_warn, t.ram_critical) == wanted


def test_the_defaults_are_those_of_the_script_this_comes_from():
    assert Thresholds() == Thresholds.for_batch_size(4)


@pytest.mark.parametrize("pair", [(0.9, 0.8), (0.0, 0.5), (0.5, 1.2)])
def test_thresholds_that_make_no_sense_are_refused(pair):
    with pytest.raises(UsageError, match="the warning first"):
        Thresholds(ram_warn=pair[0], ram_critical=pair[1])


def test_thresholds_that_come_late_are_allowed_with_a_doubt():
    doubts = Thresholds(gpu_warn=0.95, gpu_critical=0.97, ram_warn=0.9, ram_critical=0.93).doubts()

    assert len(doubts) == 2
    assert Thresholds().doubts() == []


@pytest.mark.parametrize(
    ("meter", "fraction", "level"),
    [("ram", 0.849, "ok"), ("ram", 0.85, "warn"), ("ram", 0.879, "warn"), ("ram", 0.88, "critical"),
     ("gpu0", 0.899, "ok"), ("gpu0", 0.90, "warn"), ("gpu1", 0.919, "warn"), ("gpu1", 0.92, "critical")],
)  # fmt: skip
def test_each_threshold(meter, fraction, level):
    decision = classify(FakeSource(GB, meter).at(fraction), Growth(), CALM, PolicyConfig())

    assert decision.level == level
    assert decision.numbers()["fraction"] == pytest.approx(fraction, abs=1e-3)


def test_a_level_is_left_only_some_way_below_its_threshold():
    policy = Policy(PolicyConfig(dwell_s=0.0))

    found = levels(policy, FakeSource(GB), [(0, 0.86), (10, 0.845), (20, 0.835), (30, 0.825), (40, 0.84)])

    assert found == [
        "ok" if f < 0 else lvl for f, lvl in zip([1] * 5, ["warn", "warn", "warn", "ok", "ok"], strict=True)
    ]


def test_a_level_lasts_for_its_dwell():
    policy = Policy(PolicyConfig(dwell_s=5.0))

    assert levels(policy, FakeSource(GB), [(0, 0.90), (1, 0.10), (4.9, 0.10), (5.1, 0.10)]) == ["critical"] * 3 + ["ok"]


def test_the_worst_meter_decides():
    decision = Policy().look(0, [FakeSource(GB).at(0.86), FakeSource(GB, "gpu1").at(0.93)], CALM)

    assert (decision.meter, decision.level) == ("gpu1", "critical")
    assert "GPU1 usage is 93.0%" in decision.reason


def test_a_fast_leak_is_critical_before_the_threshold():
    """1.3 GB/s in 8 GB: at 88 % there would be 0.7 s left, and a checkpoint takes 0.65 s with its margin."""
    policy, source = Policy(), FakeSource(8 * GB)

    for now, meter in source.rising(1.3e9, start=0.3, to=1.0, every=0.01):
        decision = policy.look(now, [meter], Timing(save_s=0.8, step_s=0.2))
        if decision.level == "critical":
            break

    assert decision.predicted
    assert 0.70 <= decision.fraction < 0.85
    assert decision.rate == pytest.approx(1.3e9, rel=0.05)
    assert decision.seconds_left > 0.8 + 0.2  # the checkpoint still fits, with the step before it


def test_a_slow_leak_waits_for_the_threshold():
    policy, source = Policy(), FakeSource(8 * GB)

    decisions = [policy.look(now, [meter], CALM) for now, meter in source.rising(20e6, start=0.7, to=0.9, every=0.1)]

    first = next(d for d in decisions if d.level == "critical")
    assert not first.predicted
    assert first.fraction >= 0.88


def burst(seconds):
    """From 40 % of 8 GB, at 13.5 GB/s for so long, then flat; looked at every 10 ms."""
    calm = [(i * 0.1, 0.40) for i in range(10)]
    return calm + [(1.0 + i * 0.01, 0.40 + min(seconds, i * 0.01) * 13.5 / 8) for i in range(100)]


def test_one_big_array_is_no_leak():
    assert set(levels(Policy(), FakeSource(8 * GB), burst(0.15))) == {"ok"}


def test_growth_that_stops_is_forgotten_at_once():
    """A burst that looks like a leak while it lasts: critical meanwhile, and no dwell after it."""
    found = levels(Policy(), FakeSource(8 * GB), burst(0.24))

    assert "critical" in found
    assert found[-60:] == ["ok"] * 60


def test_memory_that_goes_up_and_down_is_no_leak():
    """Activations: 72 % to 82 % and back, every step."""
    policy, source = Policy(), FakeSource(8 * GB)
    readings = [(i * 0.01, 0.77 + 0.05 * (1 if (i // 10) % 2 else -1)) for i in range(500)]

    assert set(levels(policy, source, readings)) == {"ok"}


def test_critical_is_urgent_when_the_next_boundary_comes_too_late():
    policy, source = Policy(), FakeSource(8 * GB)
    for now, meter in source.rising(5e9, start=0.5, to=0.97, every=0.01):
        decision = policy.look(now, [meter], CALM)
        if decision.urgent:
            break

    assert decision.urgent
    assert decision.seconds_left < CALM.save_s + CALM.step_s
    assert not policy.look(now + 60, [source.at(0.97)], CALM).urgent  # it stands still: there is time


@given(
    st.lists(st.floats(0, 1.2), min_size=1, max_size=60),
    st.floats(0.005, 0.5),
    st.floats(0.01, 5),
)
def test_a_level_never_reads_better_than_its_threshold_says(fractions, every, save_s):
    """Whatever happened before: at or above a threshold the level is at least what the threshold says."""
    policy, source, config = Policy(), FakeSource(10 * GB), PolicyConfig()

    for i, fraction in enumerate(fractions):
        decision = policy.look(i * every, [source.at(fraction)], Timing(save_s, 0.1))
        plain = classify(source.at(fraction), Growth(), CALM, config)
        assert RANK[decision.level] >= RANK[plain.level]
        assert decision.level != "critical" or max(fractions[: i + 1]) >= config.predict_from


@given(st.floats(1e6, 1e10), st.floats(0.02, 0.1))
def test_the_trend_of_a_steady_leak_is_its_rate(rate, every):
    trend = Trend(0.25)
    for i in range(40):
        trend.add([(i * every, int(rate * i * every))])

    assert trend.growth().steady == pytest.approx(rate, rel=0.01)


def test_a_trend_needs_a_full_window():
    trend = Trend(0.25)
    for i in range(10):
        trend.add([(i * 0.01, i * GB)])

    assert trend.growth() == Growth(0.0, 0.0)


@pytest.mark.parametrize(
    ("used", "limit", "wanted"),
    [(0, 100 * GB, 0.1), (69 * GB, 100 * GB, 1 / 14), (71 * GB, 100 * GB, 0.01), (6 * GB, 8 * GB, 0.01),
     (0, GB, 0.05), (0.69 * GB, GB, 0.01)],
)  # fmt: skip
def test_looks_come_faster_when_the_way_to_70_percent_is_short(used, limit, wanted):
    assert sampling_interval(int(used), limit) == pytest.approx(wanted, rel=1e-6)


def test_what_may_still_be_allocated_ends_at_the_critical_threshold():
    assert free_below(Meter("ram", 5 * GB, 10 * GB), PolicyConfig()) == int(3.8 * GB)
    assert free_below(Meter("ram", 9 * GB, 10 * GB), PolicyConfig()) == 0


def test_the_level_that_its_dwell_keeps_is_told_apart():
    """Whoever acts must know that memory is there again."""
    policy, source = Policy(PolicyConfig(dwell_s=5.0)), FakeSource(GB)

    decisions = [policy.look(now, [source.at(fraction)], CALM) for now, fraction in [(0, 0.9), (1, 0.6), (2, 0.89)]]

    assert [d.level for d in decisions] == ["critical"] * 3
    assert [d.held for d in decisions] == [False, True, False]
    assert "lately at or above 88%" in decisions[1].reason


def test_a_gpu_can_wait_for_the_boundary():
    """Its end is an error that can be caught, and activations come back."""
    policy, source = Policy(), FakeSource(8 * GB, "gpu0")
    decisions = [policy.look(now, [meter], CALM) for now, meter in source.rising(5e9, start=0.5, to=0.99, every=0.01)]

    assert decisions[-1].level == "critical"
    assert not any(decision.urgent for decision in decisions)


def test_a_shrink_that_did_not_help_is_followed_by_a_stop():
    escalation = Escalation("shrink", 5.0)
    assert escalation.critical(0) == "shrink"
    escalation.shrunk(1)

    assert [escalation.critical(now) for now in (2, 5, 6.1)] == [None, None, "stop"]


def test_a_shrink_that_helped_is_tried_again_another_day():
    escalation = Escalation("shrink", 5.0)
    escalation.shrunk(1)
    escalation.calm()  # said once, before the dwell was over

    assert [escalation.critical(now) for now in (7200, 7201)] == ["shrink", "shrink"]


def test_a_shrink_that_helped_for_a_moment_did_not_help():
    escalation = Escalation("shrink", 5.0)
    escalation.shrunk(1)
    escalation.calm()

    assert [escalation.critical(now) for now in (3, 7)] == [None, "stop"]


@given(
    limit=st.integers(1, 2**40), share=st.floats(0, 1), name=st.sampled_from(["ram", "gpu0"]),
    batch_size=st.integers(1, 9), at=st.floats(0, 1),
)  # fmt: skip
def test_between_two_thresholds_the_level_stays(limit, share, name, batch_size, at):
    """Whatever it was, wherever in between; and one byte further a threshold is passed, or there is nothing."""
    config = PolicyConfig(thresholds=Thresholds.for_batch_size(batch_size))
    used = int(share * limit)
    least, most = Policy(config).same_level(Meter(name, used, limit))

    def level(used):
        return [classify(Meter(name, used, limit), Growth(), CALM, config, p).level for p in ("ok", "warn", "critical")]

    assert 0 <= least <= used <= most <= limit
    assert level(least) == level(used) == level(most) == level(least + int(at * (most - least)))
    steep = Growth(steady=1e18)
    predicted = [classify(Meter(name, u, limit), steep, CALM, config).predicted for u in (least, used, most)]
    assert len(set(predicted)) == 1
    edges = [u for u in (least - 1, most + 1) if 0 <= u <= limit]
    assert all(level(u) != level(used) or (u < 0.7 * limit) != (used < 0.7 * limit) for u in edges)
