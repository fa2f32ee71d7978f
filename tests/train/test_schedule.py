"""What happens when, from numbers alone."""

import pytest
import torch

from brainenc.train.schedule import Clock, learning_rate


def test_the_learning_rate_is_that_of_the_published_scheduler():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    published = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    wanted = []
    for _ in range(10):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        published.step()

    assert [learning_rate(5e-4, epoch, drop=3, gamma=0.5) for epoch in range(10)] == pytest.approx(wanted)


def test_a_clock_is_due_after_its_interval_and_counts_from_the_last_one():
    clock = Clock(every_s=20)
    clock.start(100)

    assert [clock.due(t) for t in (100, 119.9, 120)] == [False, False, True]
    clock.done(125, cost_s=0.01)
    assert [clock.due(t) for t in (144, 145)] == [False, True]


def test_what_is_dear_is_done_less_often_but_never_too_seldom():
    clock = Clock(every_s=20, longest_s=25)
    clock.done(0, cost_s=0.11)
    assert clock.interval_s == pytest.approx(22)

    clock.done(0, cost_s=5)
    assert clock.interval_s == 25


def test_zero_means_never():
    assert not Clock(every_s=0).due(1e9)
