"""Clusters of several raylets on this machine, each with its own resources and its own scratch folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brainenc.extract.miniature import save_miniature

BRAINENC = [sys.executable, "-m", "brainenc"]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A head without CPUs, as in cluster.yaml; nodes are added by the test. Stopped with its processes."""
    from ray.cluster_utils import Cluster

    for name in list(os.environ):
        if name.startswith("RAY_ADDRESS"):
            monkeypatch.delenv(name)
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False},
    )
    yield made
    made.shutdown()


def add_node(cluster, scratch: Path, **resources):
    """A raylet whose processes have a temporary folder of their own."""
    scratch.mkdir(parents=True)
    return cluster.add_node(
        object_store_memory=100_000_000, env_vars={"TMPDIR": str(scratch)}, include_dashboard=False, **resources
    )


@pytest.fixture(scope="session")
def miniature(tmp_path_factory) -> str:
    return str(save_miniature("dinov2", tmp_path_factory.mktemp("backbones") / "mini"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """120 gratings; enough shards that every node gets some."""
    folder = tmp_path_factory.mktemp("images") / "pictures"
    folder.mkdir()
    y, x = np.mgrid[0:112, 0:112] / 112
    for number in range(120):
        waves = [np.sin((number % 17 + c + 1) * 6 * (x + y * (number % 7 - 3))) for c in range(3)]
        pixels = ((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"train-{number + 1:04d}_nsd-{number:05d}.png")
    return folder


def start(*arguments: object, **env: str) -> subprocess.Popen[str]:
    """``brainenc`` as a process of its own."""
    command = [*BRAINENC, *map(str, arguments)]
    return subprocess.Popen(
        command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def run(*arguments: object, timeout: float = 240, **env: str) -> str:
    """``brainenc``, to its end; what it printed."""
    process = start(*arguments, **env)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-4000:]
    return out
