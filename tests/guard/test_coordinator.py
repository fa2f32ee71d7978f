"""The coordinator's state machine, without a cluster: single stories, and every short sequence of events."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainenc.guard.coordinator import Coordinator, CoordinatorConfig
from brainenc.guard.messages import STRENGTH, CheckpointAck, Order, WorkerReport

CONFIG = CoordinatorConfig(silent_after_s=3, deadline_s=20, dwell_s=5)


class Run:
    """Workers as they would be: each keeps its state and reports it; the test says what happens."""

    def __init__(self, names=("rank0", "rank1"), config=CONFIG, roles=None, kind=Coordinator):
        self.now, self.lines, self.config, self.kind = 0.0, [], config, kind
        self.coordinator = self.new_coordinator()
        self.state = {
            name: {"seq": 0, "step": 0, "level": "ok", "order": None, "ack": None, "leaving": ""} for name in names
        }
        self.roles = roles or {}

    def new_coordinator(self):
        return self.kind(self.config, lambda line: self.lines.append(json.loads(json.dumps(line))))

    def report(self, name, *, lost=False, **changes):
        """One heartbeat; ``lost`` on its way."""
        mine = self.state[name]
        mine.update(changes)
        mine["seq"] += 1
        report = WorkerReport(
            worker=name, node="n1", pid=1, epoch=0, reason=f"{name} is full",
            role=self.roles.get(name, "train"), **mine,
        )  # fmt: skip
        if lost:
            return None
        mine["heard"] = self.coordinator.report(report, self.now)
        order = mine.pop("heard")
        if order is not None and mine["order"] is None:
            mine["order"] = order
        return order

    def protect(self, name, **changes):
        """The worker gives itself an order, as its guard does on an alarm, and reports it."""
        mine = self.state[name]
        if mine["order"] is None:
            own = f"{name}-1-{mine['seq']}"
            mine["order"] = Order(kind="shrink", reason=f"{name} is full", id=own, step=mine["step"])
        return self.report(name, **{"level": "critical", **changes})

    def save(self, name, *, ok=True, step=None):
        """The worker carries its order out."""
        mine = self.state[name]
        order = mine["order"]
        step = mine["step"] if step is None else step
        mine["ack"] = CheckpointAck(
            order_id=order.id if order else "", worker=name, epoch=0, step=step,
            path=f"/ckpt/step{step}" if ok else "", error="" if ok else "no space",
        )  # fmt: skip
        if order is not None and order.kind != "stop":
            mine["order"] = None

    def wait(self, seconds):
        self.now += seconds
        self.coordinator.tick(self.now)

    @property
    def incident(self):
        return self.coordinator.incidents[-1]


def test_a_critical_worker_makes_everybody_shrink_and_go_on():
    run = Run()
    run.report("rank0", step=7)

    first = run.report("rank1", step=7, level="critical")
    second = run.report("rank0", step=7)

    assert (first.kind, second.id) == ("shrink", first.id)
    for name in ("rank0", "rank1"):
        run.save(name)
        run.report(name, level="ok")
    assert run.coordinator.state == "watching"
    assert (run.incident.outcome, run.incident.best.path) == ("saved", "/ckpt/step7")
    assert run.report("rank0", step=8) is None


def test_still_critical_one_dwell_after_the_shrink_means_stop():
    run = Run(["rank0"])
    run.report("rank0", level="critical")
    run.save("rank0")
    run.report("rank0")

    run.wait(4.9)
    assert run.report("rank0", step=1) is None
    run.wait(0.2)
    assert run.report("rank0", step=2).kind == "stop"


def test_a_shrink_that_helped_is_forgotten_after_a_dwell():
    run = Run(["rank0"])
    run.report("rank0", level="critical")
    run.save("rank0")
    run.report("rank0", level="ok")
    run.wait(6)
    run.report("rank0", level="ok", step=50)

    assert run.report("rank0", level="critical", step=51).kind == "shrink"


def test_two_criticals_at_once_are_one_incident_with_two_causes():
    run = Run()

    orders = {run.report(name, level="critical").id for name in ("rank0", "rank1")}

    assert len(orders) == 1
    assert [cause["worker"] for cause in run.incident.causes] == ["rank0", "rank1"]


def test_a_lost_report_costs_one_heartbeat():
    run = Run()
    run.report("rank0")

    assert run.report("rank1", level="critical", lost=True) is None
    assert run.report("rank1").kind == "shrink"


def test_a_lost_acknowledgement_is_heard_the_next_time():
    run = Run(["rank0"])
    run.report("rank0", level="critical", step=3)
    run.save("rank0")
    run.report("rank0", lost=True)
    assert run.coordinator.state == "collecting"

    run.report("rank0")

    assert run.incident.outcome == "saved"


def test_reports_that_arrive_late_change_nothing():
    run = Run(["rank0"])
    run.report("rank0", step=9)
    old = WorkerReport(worker="rank0", seq=0, node="n1", pid=1, step=2, level="critical")

    assert run.coordinator.report(old, run.now) is None
    assert run.coordinator.status(run.now)["workers"]["rank0"]["step"] == 9


def test_a_worker_that_was_started_again_counts_from_the_beginning():
    run = Run(["rank0"])
    for _ in range(5):
        run.report("rank0", step=9)

    run.coordinator.report(WorkerReport(worker="rank0", seq=1, node="n1", pid=2, step=4), run.now)

    assert run.coordinator.status(run.now)["workers"]["rank0"]["step"] == 4


def test_a_death_during_the_checkpoint_does_not_hold_it_up():
    run = Run()
    run.report("rank0", step=5)
    run.report("rank1", step=5, level="critical")
    run.report("rank0")
    run.save("rank0")
    run.report("rank0")
    assert run.coordinator.state == "collecting"

    run.wait(3.1)

    assert run.incident.outcome == "saved"
    assert run.incident.dead == ["rank1"]


def test_all_dead_is_a_failure_and_the_account_says_so():
    run = Run()
    run.report("rank0")
    run.report("rank1", level="critical")

    run.wait(3.1)

    assert (run.incident.outcome, sorted(run.incident.dead)) == ("failed", ["rank0", "rank1"])
    assert run.lines[-1]["outcome"] == "failed"


def test_a_worker_that_lives_but_never_answers_runs_into_the_deadline():
    run = Run()
    run.report("rank0", level="critical")
    for _ in range(11):
        run.wait(2)
        run.report("rank0")
        run.report("rank1")

    assert run.incident.outcome == "timed out"


def test_a_late_acknowledgement_is_still_good_news():
    run = Run(["rank0"])
    run.report("rank0", level="critical", step=4)
    run.wait(25)
    assert run.incident.outcome in ("timed out", "failed")

    run.save("rank0")
    run.report("rank0")

    assert run.incident.outcome == "saved"
    assert run.lines[-1]["late"]


def test_a_slow_worker_that_comes_back_is_waited_for_again():
    run = Run()
    run.report("rank0", step=5)
    run.report("rank1", step=5, level="critical")
    run.now += 3.5
    run.report("rank0")  # rank1 is silent
    assert run.incident.dead == ["rank1"]
    run.report("rank1")

    assert run.incident.dead == []
    assert run.coordinator.state == "collecting"


def test_a_new_coordinator_learns_the_order_from_the_workers():
    """It dies with an order out; rank1 has not heard it yet."""
    run = Run()
    run.report("rank1", step=6)
    order = run.report("rank0", step=6, level="critical")
    run.coordinator = run.new_coordinator()

    run.report("rank0")
    told = run.report("rank1")

    assert (told.id, told.kind) == (order.id, "shrink")
    for name in ("rank0", "rank1"):
        run.save(name)
        run.report(name, level="ok")
    assert run.incident.outcome == "saved"


def test_ranks_that_acted_together_answer_for_an_order_they_never_saw():
    """rank1 protects itself, all ranks save at the same step by their status word; the coordinator hears it last."""
    run = Run()
    own = Order(kind="shrink", reason="rank1 is full", id="rank1-1-1", step=8, urgent=True)
    run.report("rank0", step=9)
    run.save("rank0", step=9)  # acted on the word, without an order of its own
    told = run.report("rank1", step=9, level="critical", order=own)
    assert not told.urgent  # only the one in trouble is short of time
    run.save("rank1", step=9)
    run.report("rank1", level="ok")
    run.report("rank0")

    assert run.incident.outcome == "saved"
    assert set(run.incident.acks) == {"rank0", "rank1"}


def test_two_ranks_that_protect_themselves_in_one_step_answer_each_under_its_own_name():
    run = Run()
    for name in ("rank0", "rank1"):
        run.protect(name, step=20)
    for name in ("rank0", "rank1"):
        run.save(name, step=21)
        run.report(name, step=21, level="ok")

    assert (run.incident.outcome, len(run.coordinator.incidents)) == ("saved", 1)
    assert [run.incident.acks[name].order_id.split("-")[0] for name in ("rank0", "rank1")] == ["rank0", "rank1"]
    assert [run.report(name, step=22) for name in ("rank0", "rank1")] == [None, None], "it begins anew"


def test_an_answer_to_a_shrink_is_none_to_the_stop_that_it_became():
    run = Run()
    for name in ("rank0", "rank1"):
        run.protect(name, step=20)
    run.coordinator.trip("stop", "SIGTERM", run.now)
    for name in ("rank0", "rank1"):
        run.save(name, step=21)
        run.report(name, step=21, level="ok")

    assert run.incident.acks == {}
    assert run.coordinator.state == "collecting"


def test_a_notice_during_an_incident_is_carried_out_after_it():
    """A node is taken away while rank1 has not answered yet: what rank0 has saved is older than what it is at."""
    run = Run()
    run.report("rank1", step=7)
    run.report("rank0", step=7, level="critical")
    run.save("rank0")
    run.report("rank0", step=90, level="ok")

    assert run.coordinator.trip("checkpoint", "node a is being taken away", run.now).kind == "shrink"
    run.report("rank1")
    run.save("rank1")
    run.report("rank1")

    assert [i.outcome for i in run.coordinator.incidents] == ["saved", "open"]
    assert (run.incident.order.kind, run.incident.order.reason) == ("checkpoint", "node a is being taken away")
    for name in ("rank0", "rank1"):
        assert run.report(name, step=91).kind == "checkpoint"
        run.save(name)
        run.report(name)
    assert [(i.number, i.outcome, i.best.step) for i in run.coordinator.incidents] == [
        (1, "saved", 7),
        (2, "saved", 91),
    ]


def test_a_notice_is_done_with_when_the_incident_saves_a_step_so_new():
    run = Run()
    run.report("rank1", step=7)
    run.report("rank0", step=7, level="critical")
    run.coordinator.trip("checkpoint", "node a is being taken away", run.now)
    for name in ("rank0", "rank1"):
        run.report(name)
        run.save(name, step=8)
        run.report(name, level="ok")

    assert [i.outcome for i in run.coordinator.incidents] == ["saved"]


def test_a_notice_is_not_forgotten_with_an_incident_that_failed():
    run = Run(["rank0"])
    run.report("rank0", step=7, level="critical")
    run.coordinator.trip("checkpoint", "node a is being taken away", run.now)
    run.save("rank0", ok=False)

    assert run.report("rank0", level="ok").reason == "node a is being taken away"


def test_after_a_stop_nothing_else_is_ordered():
    run = Run(["rank0"])
    run.report("rank0", step=7, level="critical")
    run.coordinator.trip("checkpoint", "node a is being taken away", run.now)
    run.coordinator.trip("stop", "SIGTERM", run.now)
    run.save("rank0", ok=False)
    run.report("rank0")
    run.wait(CONFIG.deadline_s + 1)
    run.coordinator.trip("checkpoint", "node b is being taken away", run.now)

    assert run.report("rank0").kind == "stop"
    assert [i.order.kind for i in run.coordinator.incidents] == ["stop"]


def test_a_stop_makes_an_open_shrink_stronger_and_wants_new_answers():
    run = Run()
    run.report("rank1")
    run.report("rank0", level="critical")
    run.save("rank0")
    run.report("rank0")

    run.coordinator.trip("stop", "SIGTERM", run.now)

    assert run.report("rank1").kind == "stop"
    assert run.incident.acks == {}
    assert len(run.coordinator.incidents) == 1


def test_a_stop_stays_for_workers_that_come_later():
    run = Run()
    run.coordinator.trip("stop", "drain", run.now)
    run.wait(1)

    assert run.report("rank0").kind == "stop"
    run.save("rank0")
    run.report("rank0")
    run.report("rank1", leaving="done")
    assert run.coordinator.state == "stopped"
    assert run.report("rank1").kind == "stop"


def test_an_extraction_actor_shrinks_alone_and_stops_with_everybody():
    run = Run(["rank0", "extract-0", "extract-1"], roles={"extract-0": "extract", "extract-1": "extract"})
    run.report("rank0")
    run.report("extract-1")

    assert run.report("extract-0", level="critical").kind == "shrink"
    assert run.report("extract-1") is None
    assert run.report("rank0") is None

    run.coordinator.trip("stop", "SIGTERM", run.now)
    assert {run.report(name).kind for name in ("rank0", "extract-0", "extract-1")} == {"stop"}


def test_an_extraction_actor_that_was_replaced_long_ago_is_not_waited_for_and_not_mourned():
    names = ["a:1", "a:2"]
    run = Run(names, roles=dict.fromkeys(names, "extract"))
    run.report("a:1")
    run.wait(10)
    assert [line["worker"] for line in run.lines if line["kind"] == "silent"] == ["a:1"]
    run.report("a:2")
    run.coordinator.trip("stop", "SIGTERM", run.now)
    run.report("a:2")
    run.save("a:2")
    run.report("a:2")

    assert (run.incident.outcome, run.incident.dead) == ("saved", [])


def test_with_stop_as_the_action_nothing_is_tried_first():
    run = Run(config=CoordinatorConfig(on_critical="stop"))

    assert run.report("rank0", level="critical").kind == "stop"


def test_readings_are_thinned_out_and_changes_are_not():
    run = Run(["rank0"])
    for i in range(100):
        run.report("rank0", step=i)
        run.now += 0.25
    run.report("rank0", level="warn")
    run.report("rank0", level="ok")

    kinds = [line["kind"] for line in run.lines]
    assert kinds.count("reading") == 6  # 25 s, one in 5 s, and the change back
    assert kinds.count("warning") == 1


# ---- every short sequence of events

EVENTS = {
    "ok0": lambda run: run.report("rank0", level="ok", step=run.state["rank0"]["step"] + 1),
    "critical0": lambda run: run.report("rank0", level="critical"),
    "critical1": lambda run: run.report("rank1", level="critical"),
    "lost0": lambda run: run.report("rank0", level="critical", lost=True),
    "saved0": lambda run: (run.save("rank0"), run.report("rank0")),
    "saved1": lambda run: (run.save("rank1"), run.report("rank1")),
    "failed1": lambda run: (run.save("rank1", ok=False), run.report("rank1")),
    "silence": lambda run: run.wait(3.5),
    "dwell": lambda run: run.wait(5.5),
    "protects1": lambda run: run.protect("rank1"),
    "sigterm": lambda run: run.coordinator.trip("stop", "SIGTERM", run.now),
    "notice": lambda run: run.coordinator.trip("checkpoint", "node a is being taken away", run.now),
    "restart": lambda run: setattr(run, "coordinator", run.new_coordinator()),
    "leave1": lambda run: run.report("rank1", leaving="failed: x"),
}


def check_story(events):
    """Play events; after each, what must always hold; at the end, nothing waits for ever."""
    run = Run()
    strongest, ever_stopped, noticed = -1, False, None
    for event in events:
        if event == "restart":
            strongest, ever_stopped, noticed = -1, False, None
        EVENTS[event](run)
        coordinator = run.coordinator
        if event == "notice":
            noticed = max((w["step"] for w in coordinator.status(run.now)["workers"].values()), default=-1)
        incident = coordinator.open_incident
        for past in coordinator.incidents:
            saved = any(ack.ok for ack in past.acks.values())
            assert past.outcome != "saved" or saved, "saved without a durable checkpoint"
            assert past.outcome not in ("failed", "timed out") or not saved, "a checkpoint was there all the same"
            older = saved and max(ack.step for ack in past.acks.values() if ack.ok) < past.order.step
            assert bool(past.done_again) == older, "an older step than that of the order, and nobody is told"
        assert sum(past.outcome == "open" for past in coordinator.incidents) <= 1
        assert [past.number for past in coordinator.incidents] == list(range(1, len(coordinator.incidents) + 1))
        assert incident is None or not set(incident.dead) & set(incident.acks)
        if incident is not None:
            strength = STRENGTH[incident.order.kind]
            assert strength >= strongest or len(coordinator.incidents) > 1, "an order became weaker"
            strongest = strength if len(coordinator.incidents) == 1 else strongest
        if ever_stopped:
            assert coordinator.report(WorkerReport(worker="new", seq=1, pid=len(run.lines) + 9), run.now).kind == "stop"
        ever_stopped = ever_stopped or event == "sigterm"
    run.wait(CONFIG.deadline_s + 1)
    assert run.coordinator.open_incident is None, "an incident that never ends"
    if noticed is not None:
        assert any(
            past.order.kind == "stop" or past.order.step >= noticed or (past.best and past.best.step >= noticed)
            for past in run.coordinator.incidents
        ), "a notice was lost"


@pytest.mark.parametrize("first", EVENTS)
def test_every_sequence_of_four_events(first):
    """14^4 stories in all: every order of reports, losses, answers, deaths, restarts."""
    for rest in itertools.product(EVENTS, repeat=3):
        check_story((first, *rest))


def test_an_order_from_before_a_restart_does_not_undo_a_stop():
    """Found by playing all stories of six: the old shrink was adopted after everybody had been told to stop."""
    check_story(("ok0", "critical0", "restart", "sigterm", "saved1", "ok0"))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(sorted(EVENTS)), min_size=5, max_size=40))
def test_long_sequences_of_events(events):
    check_story(events)


# ---- a report looks at its own worker only


class Thorough(Coordinator):
    """Ticks at every report, as if that cost nothing."""

    def _would_change(self, worker, now):
        return True


MIXED = ("rank0", "rank1", "extract-0", "extract-1")
CHANGES = {
    "beat": {},
    "ok": {"level": "ok"},
    "critical": {"level": "critical"},
    "lost": {"level": "critical", "lost": True},
    "leaves": {"leaving": "done"},
    "comes back": {"leaving": ""},
}
ANYTHING = st.one_of(
    st.tuples(st.sampled_from(sorted(CHANGES)), st.sampled_from(MIXED)),
    st.tuples(st.sampled_from(("saved", "failed", "protects")), st.sampled_from(MIXED)),
    st.tuples(st.just("trip"), st.sampled_from(("stop", "shrink", "checkpoint"))),
    st.tuples(st.just("tick"), st.just("")),
    st.tuples(st.just("restart"), st.just("")),
    st.tuples(st.just("later"), st.sampled_from((0.5, 1.7, 3.1, 5.5, 21.0))),
)


def tell(kind, events):
    """All that a coordinator answers, records and knows in a story."""
    run = Run(MIXED, roles={name: "extract" for name in MIXED if name.startswith("extract")}, kind=kind)
    told = []
    for event, who in events:
        if event == "later":  # reports are all that it hears of time
            run.now += who
        elif event == "tick":
            run.wait(0)
        elif event == "trip":
            run.coordinator.trip(who, "SIGTERM", run.now)
        elif event == "restart":
            run.coordinator = run.new_coordinator()
        elif event == "protects":
            told.append(run.protect(who))
        else:
            if event in ("saved", "failed"):
                run.save(who, ok=event == "saved")
            told.append(run.report(who, **CHANGES.get(event, {})))
        told.append(json.loads(json.dumps(run.coordinator.status(run.now))))
    return told, run.lines


@settings(max_examples=400, deadline=None)
@given(st.lists(ANYTHING, min_size=3, max_size=40))
def test_a_report_that_does_not_tick_would_have_changed_nothing(events):
    assert tell(Coordinator, events) == tell(Thorough, events)


class Counting(Coordinator):
    """Knows how often it has looked at everybody."""

    ticks = 0

    def tick(self, now):
        self.ticks += 1
        super().tick(now)


def test_a_thousand_reports_of_an_incident_are_not_a_million_looks():
    names = [f"rank{i}" for i in range(1000)]
    run = Run(names, kind=Counting)
    for name in names:
        run.report(name)
    for name in names:
        run.report(name, level="critical" if name == "rank17" else "ok")
    for name in names:
        run.save(name)
        run.report(name, level="ok")

    assert run.incident.outcome == "saved"
    assert len(run.incident.acks) == 1000
    assert run.coordinator.ticks <= 3


@pytest.mark.soak
@pytest.mark.parametrize("first", EVENTS)
def test_every_sequence_of_six_events(first):
    for rest in itertools.product(EVENTS, repeat=5):
        check_story((first, *rest))
