"""Ranks that are processes, with gloo between them: what threads cannot show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from brainenc.train import orders, prepare
from brainenc.train.run_folder import RunFolder


@pytest.fixture
def run_processes(tmp_path):
    """Run configurations one after the other on a pair of processes; returns exit codes and what each printed."""

    def run(*configs, size: int = 2) -> list[tuple[int, str, str]]:
        for config in configs:
            folder = RunFolder(config.out)
            if not folder.config_file.exists():
                folder.create(config)
                prepare.save_split(config, folder)
        runs = tmp_path / "runs.json"
        runs.write_text(json.dumps([c.to_dict() for c in configs]))
        rendezvous = tmp_path / f"rendezvous{len(list(tmp_path.iterdir()))}"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        processes = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("ranks_process.py")), str(rank), str(size),
                 str(rendezvous), str(runs)],
                env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(size)
        ]  # fmt: skip
        results = []
        for process in processes:
            out, err = process.communicate(timeout=150)
            results.append((process.returncode, out, err))
        return results

    return run


def test_two_processes_have_the_loss_of_one_and_are_repeatable_with_dropout(
    small, tmp_path, run_ranks, run_processes, losses, final_state
):
    """Twenty steps to 1e-5 without dropout; with it, stopped in the middle and resumed, the weights are bit-equal."""
    one, two = (small.config(tmp_path / name, dropout=0.0, epochs=4) for name in ("one", "two"))
    whole, broken = (small.config(tmp_path / name) for name in ("whole", "broken"))
    stopped = small.config(tmp_path / "broken", drill=("oom@step=999",))
    RunFolder(broken.out).create(broken)
    prepare.save_split(broken, RunFolder(broken.out))
    orders.give(RunFolder(broken.out), "stop", "at once")
    run_ranks(one)

    first = run_processes(two, whole, stopped)
    orders.clear(RunFolder(broken.out))
    second = run_processes(broken)

    assert [code for code, *_ in first + second] == [0] * 4, first[0][2] + second[0][2]
    assert first[0][1].splitlines() == ["done 20", "done 10", "stopped 1"]
    assert first[1][1] == first[0][1]
    assert losses(Path(two.out)) == pytest.approx(losses(Path(one.out)), rel=1e-5)
    a, b = final_state(Path(whole.out)), final_state(Path(broken.out))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.chaos
def test_a_killed_rank_is_noticed_at_once_and_costs_no_step(small, tmp_path, run_processes, final_state):
    """SIGKILL in mid-step; the survivor saves what was finished and ends, and the pair goes on bit-equal."""
    whole, killed = small.config(tmp_path / "whole"), small.config(tmp_path / "killed", drill=("kill@step=6,rank=1",))

    first = run_processes(killed)
    second = run_processes(killed, whole)

    assert first[1][0] == -9
    assert first[0][0] == 1
    assert "RankLost: Rank 0 lost another rank while waiting for a status word" in first[0][2]
    assert (tmp_path / "killed/checkpoints/emergency_epoch1_step6").is_dir() or "Going on from" in (
        tmp_path / "killed/train.log"
    ).read_text()
    assert [code for code, *_ in second] == [0, 0], second[0][2]
    assert "step 6" in (tmp_path / "killed/train.log").read_text()
    a, b = final_state(Path(whole.out)), final_state(Path(killed.out))
    assert all(torch.equal(a[name], b[name]) for name in a)
