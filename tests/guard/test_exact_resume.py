"""Stopped anywhere and resumed through ``epochs`` and ``batches``: the weights of a run that nobody has stopped."""

import os
import signal
import time

import pytest
import torch

from brainenc.guard import MemoryGuard
from tests.guard.test_memory_guard import home  # noqa: F401


class Noisy(torch.utils.data.Dataset):
    """Augments in the process that reads it, from the same random numbers as the model's dropout."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.full((4,), index / 40) + torch.rand(4)


def train(folder, *, stop_at=None, stop_in=1, times=1, gather=1, skip=(), seconds=0.0, said=None, norm=False):
    """Two epochs of ten batches; the final weights, or how it was stopped, in the second one unless told otherwise."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    model = torch.nn.Sequential(*model, torch.nn.BatchNorm1d(1)) if norm else model
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=4, shuffle=True)
    say = said.append if said is not None else lambda _: None
    try:
        with MemoryGuard(model=model, optimizer=opt, save_dir=folder, say=say, reserve=0) as guard:
            guard.resume()
            for epoch in guard.epochs(2):
                for step, x in guard.batches(loader):
                    loss = model(x).pow(2).mean()
                    if (epoch, step) == (stop_in, stop_at):
                        for _ in range(times):
                            os.kill(os.getpid(), signal.SIGTERM)
                    loss.backward()
                    if step % gather == gather - 1 and step not in skip:
                        opt.step()
                    if step % gather == gather - 1:
                        opt.zero_grad()
                    time.sleep(seconds)
    except SystemExit as stop:
        return stop.code
    return [value.tolist() for value in model.state_dict().values()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Without a stop, for each number of batches to an update."""
    return {n: train(tmp_path_factory.mktemp("whole"), gather=n) for n in (1, 4)}


@pytest.mark.parametrize("stop_at", [0, 4, 7])
def test_what_the_loader_draws_beside_dropout_is_drawn_again(home, whole, stop_at):  # noqa: F811
    assert train(home, stop_at=stop_at) == 75
    assert train(home) == whole[1]


@pytest.mark.parametrize("stop_at", [2, 3, 4, 5, 6])
def test_gathered_gradients_are_gathered_again(home, whole, stop_at):  # noqa: F811
    """Updates after 4 batches, stopped between two of them: the gradients so far end with the script."""
    assert train(home, stop_at=stop_at, gather=4) == 75
    assert train(home, gather=4) == whole[4]


def test_gradients_that_wait_for_the_first_update_are_gathered_again(home, whole):  # noqa: F811
    """Nobody has seen yet how many batches an update takes."""
    assert train(home, stop_at=1, stop_in=0, gather=4) == 75
    assert train(home, gather=4) == whole[4]


@pytest.mark.parametrize(("norm", "gather", "told"), [(True, 4, True), (False, 4, False), (True, 1, False)])
def test_statistics_that_count_a_batch_twice_are_told(home, norm, gather, told):  # noqa: F811
    """Only the weights go back to before the batches whose gradients were being gathered."""
    said = []
    assert train(home, stop_at=1, stop_in=0, gather=gather, norm=norm, said=said, seconds=0.06) == 75
    assert any("counts them twice" in text for text in said) == told


def test_gradients_that_an_epoch_leaves_over_are_gathered_again(home, tmp_path):  # noqa: F811
    """Two of its ten batches wait for the next epoch, whose first ones are broken off."""
    undisturbed = train(tmp_path / "whole", gather=4)

    assert train(home, stop_at=1, times=2, gather=4, seconds=0.06) == 75
    assert (home / "emergency_epoch0.pth").exists()
    assert train(home, gather=4) == undisturbed


def test_a_batch_that_was_broken_off_is_repeated_with_its_random_numbers(home, tmp_path):  # noqa: F811
    """Steps long enough that nobody would wait for their end."""
    undisturbed = train(tmp_path / "whole", seconds=0.06)

    assert train(home, stop_at=4, times=2, seconds=0.06) == 75
    assert train(home) == undisturbed


def test_what_cannot_be_exact_is_told(home):  # noqa: F811
    """Asked twice within steps so short that their random states are not kept."""
    said = []
    assert train(home, stop_at=8, times=2, said=said) == 75
    assert "repeated with other random numbers" in "\n".join(said)


def test_batches_without_an_update_are_repeated_at_most(home, tmp_path):  # noqa: F811
    """As a scaler leaves out updates of which the gradients are infinite."""
    skip = (3, 4, 5, 6)
    undisturbed = train(tmp_path / "whole", skip=skip)

    assert train(home, stop_at=5, skip=skip) == 75
    assert train(home, skip=skip) == undisturbed
