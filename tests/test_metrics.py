"""Figures of a run become gauges by name."""

from brainenc.metrics import GAUGES, Gauges


class FakeGauge:
    def __init__(self, name, description, tag_keys):
        self.name, self.description, self.tag_keys, self.seen = name, description, tag_keys, []

    def set(self, value, tags=None):
        self.seen.append((value, tags))


def made():
    gauges: dict[str, FakeGauge] = {}

    def make(*args):
        gauges[args[0]] = FakeGauge(*args)
        return gauges[args[0]]

    return gauges, Gauges(make, run="runs/first")


def test_known_numbers_are_set_under_the_runs_label():
    gauges, shown = made()

    shown.set({"images_per_s": 12, "loss": 0.5})
    shown.set({"images_per_s": 13.5})

    assert gauges["brainenc_images_per_s"].seen == [(12.0, {"run": "runs/first"}), (13.5, {"run": "runs/first"})]
    assert gauges["brainenc_images_per_s"].tag_keys == ("run",)
    assert gauges["brainenc_loss"].description == GAUGES["loss"]


def test_what_is_no_number_or_unknown_is_passed_over():
    gauges, shown = made()

    shown.set({"split": "train", "loss": float("nan"), "val_perf": None, "colour": 3})

    assert gauges == {}


def test_the_time_that_is_left_is_a_gauge_while_it_is_known():
    gauges, shown = made()

    shown.set({"seconds_left": None})
    assert gauges == {}
    shown.set({"seconds_left": 90.0})
    assert gauges["brainenc_seconds_left"].seen == [(90.0, {"run": "runs/first"})]
