"""What is ordered when nodes are being taken away."""

from brainenc.guard.departures import AGAIN_S, Departures

HOME = "f" * 56
NODE, OTHER = "a" * 56, "b" * 56
WORKERS = {NODE: 1, OTHER: 1}


def test_a_node_that_leaves_is_saved_for_at_once_and_again_before_it_goes():
    departures = Departures(HOME)

    def look(now):
        return departures.look({NODE: 1120.0}, WORKERS, now, goes_on=True)

    first = look(1000.0)
    assert (first.kind, first.nodes) == ("checkpoint", (NODE,))
    assert first.reason == "node aaaaaaaa is being taken away in 120 s"
    assert look(1001.0) is None
    assert look(1120.0 - AGAIN_S - 1) is None
    assert look(1120.0 - AGAIN_S).kind == "checkpoint"
    assert look(1119.0) is None


def test_a_short_notice_leaves_half_of_it_for_the_second_checkpoint():
    departures = Departures(HOME)
    departures.look({NODE: 1008.0}, WORKERS, 1000.0, goes_on=True)
    assert departures.look({NODE: 1008.0}, WORKERS, 1003.9, goes_on=True) is None
    assert departures.look({NODE: 1008.0}, WORKERS, 1004.0, goes_on=True).kind == "checkpoint"


def test_nobody_said_when_means_one_checkpoint():
    departures = Departures(HOME)
    assert departures.look({NODE: 0.0}, WORKERS, 1000.0, goes_on=True).reason == "node aaaaaaaa is being taken away"
    assert departures.look({NODE: 0.0}, WORKERS, 99999.0, goes_on=True) is None


def test_what_is_left_is_too_little_so_the_run_stops():
    advice = Departures(HOME).look({NODE: 0.0, OTHER: 0.0}, WORKERS, 1000.0, goes_on=False)
    assert (advice.kind, advice.nodes) == ("stop", (NODE, OTHER))
    assert advice.reason == "nodes aaaaaaaa, bbbbbbbb are being taken away, and what is left cannot hold this run"


def test_the_drivers_own_node_stops_the_run_wherever_the_workers_are():
    assert Departures(HOME).look({HOME: 0.0}, WORKERS, 1000.0, goes_on=True).kind == "stop"


def test_nodes_without_workers_of_this_run_are_nobodys_business():
    departures = Departures(HOME)
    assert departures.look({NODE: 1120.0}, {OTHER: 1}, 1000.0, goes_on=False) is None
    moved_there = departures.look({NODE: 1120.0}, {NODE: 1}, 1001.0, goes_on=True)
    assert moved_there.kind == "checkpoint"


def test_a_node_that_stayed_after_all_is_new_the_next_time():
    departures = Departures(HOME)
    assert departures.look({NODE: 0.0}, WORKERS, 1000.0, goes_on=True)
    assert departures.look({}, {}, 1001.0, goes_on=False) is None
    assert departures.look({NODE: 0.0}, WORKERS, 1002.0, goes_on=True)
