"""The long repetition of a rank's death: `make soak`."""

import random
import time

import pytest
import torch
from safetensors.torch import load_file

from brainenc.train import checkpoint
from brainenc.train.launch import train
from brainenc.train.run_folder import RunFolder

pytestmark = [pytest.mark.soak, pytest.mark.ray, pytest.mark.timeout(3600)]


def weights(out: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.newest([RunFolder(out).checkpoints]).folder / checkpoint.WEIGHTS)


def test_twenty_ranks_are_killed_in_mid_step_and_each_run_ends_bit_equal(small, tmp_path, ray_session, capsys):
    """At random steps. Prints what each death cost: steps done again, and seconds until training went on."""
    fields = {"epochs": 4, "workers": "2", "guard": {}}
    whole = small.config(tmp_path / "whole", **fields)
    assert train(whole).status == "done"
    wanted, rng = weights(whole.out), random.Random(7)
    n_steps = max(r["step"] for r in RunFolder(whole.out).metrics())
    for attempt in range(20):
        step = rng.randrange(1, n_steps)
        config = small.config(tmp_path / f"run{attempt}", drill=(f"kill@step={step},rank=1",), **fields)
        seen: list[tuple[float, int, int]] = []

        result = train(config, progress=lambda r, seen=seen: seen.append((time.monotonic(), r["run"], r["step"])))

        assert result.status == "done", result.reason
        found = weights(config.out)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[k], wanted[k]) for k in wanted), f"killed at step {step}"
        before = [(at, done) for at, run, done in seen if run == 0]
        after = [(at, done) for at, run, done in seen if run == 1]
        assert after, "the run was not interrupted"
        again = max((done for _, done in before), default=0) - after[0][1] + 1
        seconds = after[0][0] - before[-1][0] if before else float("nan")
        with capsys.disabled():
            print(
                f"killed at step {step}: {max(0, again)} steps done again, training after {seconds:.1f} s", flush=True
            )
        done_at = {done: at for at, done in before}
        assert before[-1][0] - done_at.get(after[0][1], before[-1][0]) <= 30, "seconds of work that were lost"
