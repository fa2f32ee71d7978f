"""What guards, loops and the coordinator say to one another."""

import json
import pickle

import pytest

from brainenc.guard.messages import CheckpointAck, NullGuard, Order, OutOfTime, StepGuard, WorkerReport


def test_the_null_guard_asks_for_nothing():
    guard: StepGuard = NullGuard()

    guard.beat(epoch=0, step=1)
    guard.reserve(1 << 60, "everything")
    with guard.updating():
        guard.saved(path="a", step=1, epoch=0)

    assert guard.pending() is None


def test_an_acknowledgement_without_a_path_or_with_an_error_is_not_ok():
    assert CheckpointAck(order_id="1", worker="rank0", epoch=0, step=3, path="/a").ok
    assert not CheckpointAck(order_id="1", worker="rank0", epoch=0, step=3).ok
    assert not CheckpointAck(order_id="1", worker="rank0", epoch=0, step=3, path="/a", error="read back torn").ok


def test_orders_and_reports_cross_processes_unchanged():
    order = Order(kind="shrink", reason="RAM usage is 91 %", numbers={"used": 91}, id="i-1")
    report = WorkerReport(worker="rank1", seq=4, order=order)

    assert pickle.loads(pickle.dumps(report)) == report
    assert json.loads(json.dumps(order.to_dict()))["numbers"] == {"used": 91}


def test_out_of_time_is_swallowed_by_no_ordinary_handler():
    def loop():
        try:
            raise OutOfTime(Order(kind="stop", reason="full in 0.1 s"))
        except Exception:  # what a careless loop would write
            return "swallowed"

    with pytest.raises(OutOfTime, match=r"full in 0\.1 s"):
        loop()
