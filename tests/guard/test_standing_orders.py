"""Every story of five events: what a plain script is told, in any order, and what stands then."""

import itertools
import signal

import pytest

from brainenc.guard.messages import Order
from brainenc.guard.standing_orders import StandingOrders


def decision(level="critical", **changes):
    numbers = {"meter": "ram", "fraction": 0.9, "urgent": False, "at": 1.0, "predicted": False, "drill": False}
    return {"kind": "decision", "level": level, "reason": f"RAM is {level}", **numbers, **changes}


HEARD = {
    "calm": decision("ok"),
    "warned": decision("warn"),
    "critical": decision(),
    "urgent": decision(urgent=True),
    "gpu": decision(meter="gpu0"),
    "held": decision(held=True),
    "overdue": {"kind": "overdue"},
    "reading": {"kind": "reading"},
}


@pytest.mark.parametrize("first", [*HEARD, "asked"])
def test_every_story_of_five_events(first):
    for rest in itertools.product([*HEARD, "asked"], repeat=4):
        story = (first, *rest)
        orders, asked, alarm, late, attention = StandingOrders("stop", 30.0), 0, None, False, False
        for event in story:
            waited_for = orders.next is None
            if event == "asked":
                asked += 1
                if asked == 3:
                    with pytest.raises(SystemExit) as ended:
                        orders.ask(signal.SIGTERM)
                    assert ended.value.code == 128 + signal.SIGTERM
                    break
                orders.ask(signal.SIGTERM)
            else:
                waits = orders.hear(HEARD[event])
                assert waits == (waited_for and event in ("critical", "urgent")), story

            if event in ("critical", "urgent", "gpu"):
                alarm = event
            elif event in ("calm", "warned"):
                alarm, late = None, False
            late = late or (event == "overdue" and alarm in ("critical", "urgent"))

            assert (orders.alarm is None) == (alarm is None), story
            assert (orders.asked is None) == (not asked), story
            assert orders.next is (orders.asked or orders.alarm), "a person goes before memory"
            attention = attention or event not in ("calm", "overdue", "reading")
            assert orders.attention == attention, story
            if orders.asked is not None and asked == 2:
                assert orders.urgent is orders.asked, story
            if alarm == "urgent" or (alarm is not None and late):
                assert orders.urgent is not None, story
            if not asked and alarm in ("critical", "gpu") and not late:
                assert orders.urgent is None, story


def test_a_second_signal_in_the_handler_of_the_first_is_not_forgotten(monkeypatch):
    orders, nested = StandingOrders("stop", 30.0), [signal.SIGTERM]

    def made(**fields):
        order = Order(**fields)
        while nested:
            orders.ask(nested.pop())
        return order

    monkeypatch.setattr("brainenc.guard.standing_orders.Order", made)
    orders.ask(signal.SIGTERM)

    assert orders.urgent is orders.asked is not None


def test_what_was_seen_before_memory_was_freed_is_no_alarm():
    orders = StandingOrders("stop", 30.0)
    orders.freed(2.0)

    assert not orders.hear(decision(at=1.9))
    assert orders.next is None
    assert orders.hear(decision(at=2.0))
    assert orders.next is not None


def test_after_a_shrink_it_waits_a_dwell_and_then_stops(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    orders = StandingOrders("shrink", 30.0)
    orders.hear(decision(at=now))
    assert orders.next.kind == "shrink"

    orders.shrunk(now)
    assert orders.next is None
    now = 129.0
    orders.hear(decision(at=now))
    assert orders.next is None, "that needs a moment to show"
    now = 131.0
    orders.hear(decision(at=now))
    assert orders.next.kind == "stop"


def test_a_warning_that_lasts_is_no_alarm_and_needs_a_closer_look():
    orders = StandingOrders("stop", 30.0)
    orders.hear(decision("warn"))

    assert (orders.next, orders.attention, orders.level, orders.reason) == (None, True, "warn", "RAM is warn")
