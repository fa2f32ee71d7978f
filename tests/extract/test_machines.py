"""Every actor finds room on one machine, whatever machines there are, and none asks for less than it could have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainenc.errors import UsageError
from brainenc.extract.machines import Machines, Node, this_machine

UNITS = 10_000  # what Ray counts in
clusters = st.lists(
    st.builds(Node, cpus=st.integers(0, 96).map(float), gpus=st.sampled_from((0.0, 0.0, 1.0, 2.0, 8.0))), max_size=6
).map(lambda nodes: Machines(tuple(nodes), cluster=True))
devices = st.sampled_from(("cpu", "cuda"))


def cluster(*nodes: tuple[float, float]) -> Machines:
    return Machines(tuple(Node(*node) for node in nodes), cluster=True)


def held(machines: Machines, ask: dict[str, float]) -> int:
    """How many actors that ask for this the machines hold, counted as Ray counts; a part of a GPU is of one GPU."""
    cpus, gpus = round(ask["num_cpus"] * UNITS), round(ask.get("num_gpus", 0) * UNITS)
    by_cpu = [round(n.cpus * UNITS) // cpus if cpus else 10**9 for n in machines.nodes]
    by_gpu = [int(n.gpus) * (UNITS // gpus) if gpus else 10**9 for n in machines.nodes]
    return sum(map(min, by_cpu, by_gpu))


def suitable(machines: Machines, device: str) -> list[Node]:
    return [n for n in machines.nodes if (n.gpus if device == "cuda" else n.cpus)]


@given(machines=clusters, device=devices, actors=st.integers(1, 40), threads=st.none() | st.integers(1, 128))
def test_all_actors_find_room_at_once(machines, device, actors, threads):
    ask = machines.resources(device, actors, threads or machines.threads(device, actors))

    if suitable(machines, device):
        assert held(machines, ask) >= actors
    else:
        assert ask == {"cpu": {"num_cpus": float(min(threads or 4, 4))}, "cuda": {"num_cpus": 1, "num_gpus": 1}}[device]


@given(machines=clusters, device=devices, actors=st.integers(1, 40))
def test_threads_are_as_many_as_find_room(machines, device, actors):
    threads = machines.threads(device, actors)
    ask = machines.resources(device, actors, threads)

    assert threads >= 1
    if suitable(machines, device):
        assert held(machines, ask | {"num_cpus": threads + 1}) < actors


@given(machines=clusters, actors=st.integers(1, 40))
def test_gpus_are_shared_only_where_they_are_fewer_than_the_actors(machines, actors):
    gpus = machines.resources("cuda", actors, 1)["num_gpus"]

    assert 0 < gpus <= 1
    assert (gpus < 1) == (0 < machines.gpus < actors)


@given(cores=st.integers(1, 256), actors=st.integers(1, 300))
def test_one_machine_is_divided_among_its_actors(cores, actors):
    here = Machines((Node(float(cores)),))

    assert here.threads("cpu", actors) == max(1, cores // actors)
    assert here.decode_threads("cpu", actors) == 1
    assert here.resources("cpu", actors, 1)["num_cpus"] == pytest.approx(min(1, cores / actors), abs=1e-4)


@given(machines=clusters, device=devices, actors=st.integers(1, 40))
def test_threads_that_decode_are_of_the_same_cores(machines, device, actors):
    decoders = machines.decode_threads(device, actors)

    assert 1 <= decoders <= 8
    assert decoders <= max(1, machines.threads(device, actors) - 1)


@pytest.mark.parametrize(
    ("machines", "asked", "device", "copies"),
    [
        (cluster((0, 0), (8, 1), (8, 1)), "auto", "cuda", 2),  # a head that only drives
        (cluster((0, 0), (8, 1), (8, 1)), "cpu", "cpu", 1),
        (cluster((96, 8), (96, 8), (4, 0)), "auto", "cuda", 16),
        (cluster((4, 0), (16, 0)), "auto", "cpu", 1),
        (cluster((0, 0)), "cuda", "cuda", 1),  # an autoscaler brings it
        (Machines((Node(8, 2),)), "auto", "cuda", 2),
    ],
)
def test_what_a_run_is_done_with_by_default(machines, asked, device, copies):
    assert machines.device(asked) == device
    assert machines.copies(device) == copies


def test_a_gpu_that_is_not_there_and_cannot_come_is_refused():
    with pytest.raises(UsageError, match="brainenc doctor"):
        Machines((Node(8),)).device("cuda")


@pytest.mark.parametrize(
    ("machines", "device", "actors", "threads", "decoders", "ask"),
    [
        (cluster((0, 0), (8, 1), (8, 1)), "cuda", 2, 8, 7, {"num_cpus": 8, "num_gpus": 1}),
        (cluster((4, 0), (8, 1), (16, 1)), "cuda", 2, 8, 7, {"num_cpus": 8, "num_gpus": 1}),
        (cluster((96, 8)), "cuda", 8, 12, 8, {"num_cpus": 12, "num_gpus": 1}),
        (cluster((8, 1), (8, 1)), "cuda", 4, 4, 3, {"num_cpus": 4, "num_gpus": 0.5}),
        (cluster((8, 1)), "cuda", 7, 1, 1, {"num_cpus": 1, "num_gpus": 0.1428}),  # seven times a seventh is too much
        (cluster((0, 1)), "cuda", 1, 1, 1, {"num_cpus": 0, "num_gpus": 1}),
        (cluster((2, 0)), "cuda", 4, 4, 3, {"num_cpus": 1, "num_gpus": 1}),  # not parts of one: four machines may come
        (cluster((1, 0), (1, 0)), "cpu", 1, 1, 1, {"num_cpus": 1}),
        (cluster((1, 0), (4, 0), (2, 0)), "cpu", 1, 4, 1, {"num_cpus": 4}),
        (cluster((1, 0), (4, 0), (2, 0)), "cpu", 3, 2, 1, {"num_cpus": 2}),
        (cluster((1, 0), (1, 0)), "cpu", 4, 1, 1, {"num_cpus": 0.5}),
    ],
)
def test_what_one_actor_gets(machines, device, actors, threads, decoders, ask):
    assert machines.threads(device, actors) == threads
    assert machines.decode_threads(device, actors) == decoders
    assert machines.resources(device, actors, threads) == ask


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_threads_that_were_asked_for_are_reserved_as_far_as_they_fit(threads):
    assert cluster((1, 0), (2, 0)).resources("cpu", 1, threads) == {"num_cpus": min(threads, 2)}


def test_this_machine_has_cores():
    assert [node.cpus >= 1 for node in this_machine(gpus=False).nodes] == [True]
