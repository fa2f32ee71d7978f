"""The U-Net script of ``examples/``: without Ray, saved by a drill and resumed, batch normalisation and all."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[2] / "examples/unet_guard.py"


def run(folder, options=()):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(folder), "TMPDIR": str(folder)}
    command = [sys.executable, SCRIPT, "--out", folder, "--epochs", "2", *map(str, options)]
    folder.mkdir(exist_ok=True)
    return subprocess.run(command, env=environment, cwd=SCRIPT.parents[1], capture_output=True, text=True, timeout=200)


def test_the_unet_script_is_saved_and_resumed(tmp_path):
    with ThreadPoolExecutor() as pool:
        whole, struck = pool.map(run, (tmp_path / "whole", tmp_path / "struck"), ((), ("--drill-at", 5)))
    resumed = run(tmp_path / "struck")

    assert (whole.returncode, struck.returncode, resumed.returncode) == (0, 75, 0), struck.stderr + resumed.stderr
    assert "emergency_epoch" in struck.stderr
    assert "Resumed from" in resumed.stderr
    assert whole.stdout.splitlines()[-1] == resumed.stdout.splitlines()[-1]
    one, other = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("whole", "struck"))
    assert all(torch.equal(one[key], other[key]) for key in one)
