"""Workers that are counted on while nodes are being taken away: the rule, and Ray's own policy with it."""

import pytest

from brainenc.train.elastic import possible_workers
from brainenc.train.on_ray import scaling as ray_scaling


def count(nodes) -> int:
    return sum(int(resources.get("CPU", 0)) for resources in nodes.values())


@pytest.mark.parametrize(
    ("reserved", "leaving", "expected"),
    [
        ({"a": 1, "b": 1}, (), 2),
        ({"a": 1, "b": 1}, ("b",), 1),
        ({"b": 2}, ("b",), 4),  # nothing is reserved on the one that stays, but it has room
        ({"b": 2}, ("a", "b"), 0),
        ({}, (), 0),  # nobody leaves: what Ray reserves is all that counts
    ],
)
def test_nodes_that_leave_hold_no_workers_to_come(reserved, leaving, expected):
    alive = {"a": {"CPU": 4}, "b": {"CPU": 4}}
    found = possible_workers({n: {"CPU": c} for n, c in reserved.items()}, alive, leaving, count=count, least=1)

    assert found == expected


class Group:
    """What Ray tells its policy of a group that runs."""

    start_time = float("-inf")

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers


@pytest.fixture
def policy(monkeypatch):
    """Ray's policy with ours over it, and the questions that it asks Ray answered by the test."""
    import ray
    from ray.train import ScalingConfig

    from brainenc.guard import actors

    leaving, reserved = {}, {"a": {"CPU": 2.0}, "b": {"CPU": 2.0}}
    monkeypatch.setattr(actors, "draining_nodes", lambda: leaving)
    nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 3.0}} for name in "ab"]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray_scaling, "_LOOK_EVERY_S", 0)
    scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=0)
    made = ray_scaling.staying_policy()(scaling)
    monkeypatch.setattr(made, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(made, "_get_reserved_resources", lambda: reserved)
    made.test_leaving, made.test_reserved = leaving, reserved
    return made


@pytest.mark.ray
def test_a_restart_is_of_as_many_workers_as_stay(policy):
    assert policy.make_decision_for_non_running_worker_group().num_workers == 4
    policy.test_leaving["b"] = 0.0
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    del policy.test_reserved["a"]
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3


@pytest.mark.ray
def test_a_group_that_runs_keeps_its_workers_until_the_node_is_gone(policy):
    """The time of a notice is worked in, and what was reserved on a node that leaves may be needed by nobody there."""
    policy.test_leaving["b"] = 0.0

    assert not hasattr(policy.make_decision_for_running_worker_group(Group(4), None), "num_workers")
    assert policy.make_decision_for_running_worker_group(Group(1), None).num_workers == 2
    policy.test_leaving.clear()
    del policy.test_reserved["b"]
    assert policy.make_decision_for_running_worker_group(Group(4), None).num_workers == 2


@pytest.mark.ray
def test_another_ray_is_taken_as_it_is_with_a_warning(monkeypatch, caplog):
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution import scaling_policy

    assert ray_scaling.elastic_trainer() is not TorchTrainer
    monkeypatch.delattr(scaling_policy, "ElasticScalingPolicy")

    assert ray_scaling.elastic_trainer() is TorchTrainer
    assert "built otherwise" in caplog.text


@pytest.mark.ray
def test_another_way_of_scaling_is_left_to_ray_with_a_warning(monkeypatch, caplog):
    from ray.train.torch import TorchTrainer

    given = {}
    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", lambda self, **more: given.update(more))
    trainer = ray_scaling.elastic_trainer()
    made = trainer.__new__(trainer)

    made._initialize_and_run_controller(scaling_policy="theirs")
    made._initialize_and_run_controller()

    assert given == {"scaling_policy": "theirs"}
    assert caplog.text.count("built otherwise") == 2
