"""Clusters of several raylets on this machine, each with its own resources and its own scratch folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brainenc.cli.main import run as brainenc
from brainenc.extract.miniature import save_miniature

BRAINENC = [sys.executable, "-m", "brainenc"]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A head with one CPU, where drivers connect; nodes are added by the test. Stopped with its processes."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("NODE_DISK", str(tmp_path / "scratch" / "head"))
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
    """A raylet whose processes have a temporary folder and a cache of their own, as on a machine of its own."""
    scratch.mkdir(parents=True)
    own = {"TMPDIR": str(scratch), "NODE_DISK": str(scratch), "BRAINENC_CACHE": str(scratch / "cache")}
    return cluster.add_node(object_store_memory=100_000_000, env_vars=own, include_dashboard=False, **resources)


def drain(node, seconds: float) -> None:
    """As an autoscaler or a preemption notice does it: Ray is told that the node goes, and when."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    why = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    client = GcsClient(address=node.gcs_address)
    accepted, answer = client.drain_node(node.node_id, why, "spot", int((time.time() + seconds) * 1000))
    assert accepted, answer


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


@pytest.fixture(scope="session")
def many_pictures(pictures, tmp_path_factory) -> Path:
    """A list of the same ones again and again: work for a while, whatever the machine."""
    folder = tmp_path_factory.mktemp("images") / "many"
    folder.mkdir()
    for number, picture in enumerate(sorted(pictures.iterdir()) * 50):
        (folder / f"{number:05d}.png").symlink_to(picture)
    return folder


@pytest.fixture(scope="session")
def learnt(tmp_path_factory) -> list[object]:
    """What is trained on: a subject whose features lie in a store, as on a disk that all nodes share."""
    folder = tmp_path_factory.mktemp("shared")
    subject, store = folder / "subj01", folder / "store"
    made = ["data", "synth", "--out", str(subject), "--n-train", "40", "--n-test", "8", "--vertices", "24,26"]
    assert brainenc(made) == 0
    where = ["--subject-dir", subject, "--store", store, "--backbone", folder / "backbone", "--name", "mini"]
    run("extract", *where, "--feature", "-1.token", "--threads", 1, "--json", RAY_ADDRESS="")
    model = ["--heads", 2, "--hidden", 16, "--feedforward", 32, "--dropout", 0, "--batch-size", 8]
    key = next(store.glob("subj01-train/mini/*.token")).name
    return ["--subject-dir", subject, "--store", store, "--feature", f"mini/{key}", *model, "--threads", 1]


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
