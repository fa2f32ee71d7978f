"""Fixtures that every test may use: one local Ray cluster a session, and folders on real disk."""

import os
import subprocess
import tempfile
from pathlib import Path

import hypothesis
import pytest

from tests.demo_beside import DemoBeside

hypothesis.settings.register_profile("brainenc", deadline=None)  # a timing never decides a test
hypothesis.settings.load_profile("brainenc")

# Before anything imports Ray, Hugging Face or gcsfs: no telemetry, no hub, no token file, no probing of real clouds.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",
)
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Caches and records of the session, away from those of whoever runs the tests; before Ray, which inherits it."""
    os.environ["BRAINENC_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray of two CPUs for the whole test session, stopped at its end."""
    import ray

    with tempfile.TemporaryDirectory(prefix="bray", dir="/tmp") as scratch:  # short: socket paths are limited
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, _temp_dir=scratch,
            log_to_driver=False, logging_level="ERROR",
        )  # fmt: skip
        yield ray
        ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def demo_beside(request, cache, tmp_path_factory):
    """The demo, at work beside the first tests if its own are among those to run: alone it would take a sixth of the
    session, and most of that it waits."""
    if not any(item.path.name == "test_demo.py" for item in request.session.items):
        yield None
        return
    beside = DemoBeside(tmp_path_factory.mktemp("demo"))
    yield beside
    beside.end()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Arrays that the tests compare with."""
    return Path(__file__).parent / "data"


@pytest.fixture
def gcs(monkeypatch):
    """An empty bucket ``lab`` in an emulated Google Cloud Storage, where ``gs://lab/...`` leads for the test."""
    import asyncio
    from types import SimpleNamespace

    import gcsfs.retry

    from tests.emulators.minigcs import MiniGCS

    # gcsfs waits 1, 2, 4 ... s between its own tries: here a fiftieth of that, or the faults would take minutes.
    quick = SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 50))
    monkeypatch.setattr(gcsfs.retry, "asyncio", quick)
    with MiniGCS("lab") as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        yield emulator


@pytest.fixture
def small_disk(tmp_path):
    """A file system of four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs root to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
