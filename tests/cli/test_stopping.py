"""SIGTERM to commands before their work has begun, while Python and the inputs are still being loaded."""

import os
import signal

import pytest

from brainenc.cli.main import run

TRAIN = ["train", "--subject-dir", "s", "--store", "f", "--feature", "b/1.q", "--encoder", "linear", "--out", "r"]
EXTRACT = ["extract", "--images", "i", "--store", "f", "--backbone", "b", "--feature", "1.q"]


def terminate(*_args, **_kwargs):
    """What is being done when the signal comes; it looks for libraries, as those do that are imported."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except Exception:
        pytest.fail("a stop must not be taken for a library that is missing")
    pytest.fail("nothing is done after it")


@pytest.mark.parametrize(("argv", "where"), [
    (EXTRACT, "brainenc.cli.extract.config_from"), (TRAIN, "brainenc.cli.train.split_source"),
    (EXTRACT, "brainenc.extract.driver.survey"), (TRAIN, "brainenc.train.prepare.check"),
])  # fmt: skip
def test_a_stop_before_the_work_exits_75_and_says_that_nothing_was_lost(
    argv, where, tmp_path, monkeypatch, capsys
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(where, terminate)
    before = signal.getsignal(signal.SIGTERM)

    code = run(argv)

    assert code == 75
    assert "stopped by SIGTERM; nothing was lost, and the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_commands_that_do_not_go_on_are_ended_by_sigterm_as_ever(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "brainenc.cli.guard.history_of", lambda _: seen.append(signal.getsignal(signal.SIGTERM)) or 1 / 0
    )

    assert run(["guard", "status", "x"]) == 1

    assert "ZeroDivisionError" in capsys.readouterr().err
    assert seen == [signal.getsignal(signal.SIGTERM)]
