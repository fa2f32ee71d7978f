"""A Colab notebook, simulated: 12 GB and two cores, a Drive that drops its last writes, and sessions that just end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulators.drivefs import MountedDrive, why_not
from tests.extract import killing

CGROUPS = Path("/sys/fs/cgroup/memory")
LIMIT = 12 << 30

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.root,
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
    pytest.mark.skipif(not os.access(CGROUPS, os.W_OK), reason="no cgroup v1 memory controller that may be written"),
]


class Notebook:
    """One machine after another: what is on its disk goes with it, what is on the Drive stays as far as it arrived."""

    def __init__(self, folder: Path, drive: MountedDrive) -> None:
        self.folder, self.drive = folder, drive
        self.session = 0
        self.group = CGROUPS / f"brainenc-colab-{os.getpid()}"
        self.group.mkdir()
        (self.group / "memory.limit_in_bytes").write_text(str(LIMIT))

    @property
    def disk(self) -> Path:
        return self.folder / f"machine{self.session}"

    def start(self, *arguments: object) -> subprocess.Popen:
        """A cell of the notebook: ``brainenc ...`` within the machine's memory."""
        self.disk.mkdir(exist_ok=True)
        keep = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")}
        environ = keep | {"BRAINENC_CACHE": str(self.disk / "cache"), "TMPDIR": str(self.disk)}
        inside = f'echo $$ > {self.group}/cgroup.procs && exec "$0" -m brainenc "$@"'
        with open(self.log, "wb") as log:
            return subprocess.Popen(
                ["bash", "-c", inside, sys.executable, *map(str, arguments)],
                env=environ, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @property
    def log(self) -> Path:
        return self.folder / f"session{self.session}.log"

    def finish(self, *arguments: object) -> str:
        process = self.start(*arguments)
        assert process.wait(400) == 0, self.log.read_text()[-4000:]
        return self.log.read_text()

    def disconnect(self, process: subprocess.Popen) -> None:
        """Everything is gone at once, with what Drive had not taken yet."""
        killing.kill(killing.family(process))
        process.wait(30)
        self.drive.kill()
        shutil.rmtree(self.disk, ignore_errors=True)
        self.session += 1
        self.drive.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            for pid in (self.group / "cgroup.procs").read_text().split():
                os.kill(int(pid), 9)
            self.group.rmdir()


@pytest.fixture
def drive(tmp_path):
    with MountedDrive(tmp_path / "google", upload_s=2.0, read_ms=2.0) as mounted:
        yield mounted


@pytest.fixture
def notebook(tmp_path, drive):
    made = Notebook(tmp_path, drive)
    yield made
    made.close()


@pytest.fixture
def subject(tmp_path) -> Path:
    """On the machine's own disk, as after unpacking an archive from Drive."""
    folder = tmp_path / "data" / "subj01"
    command = ["data", "synth", "--out", folder, "--n-train", 96, "--n-test", 12, "--vertices", "60,60"]
    subprocess.run([sys.executable, "-m", "brainenc", *map(str, command)], check=True, capture_output=True)
    return folder


def shards(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("shard-*.arrow"))}


def test_three_sessions_end_rudely_and_the_night_is_not_lost(notebook, drive, subject, tmp_path):
    backbone = subject.parent / "backbone"
    store, run = drive.mnt / "features", drive.mnt / "runs" / "first"
    wanted = ["--subject-dir", subject, "--backbone", backbone, "--name", "mini", "--feature", "-1.token"]
    small = ["--rows-per-shard", 8, "--batch-size", 4, "--threads", 1, "--json"]

    first = notebook.start("extract", "--store", store, *wanted, *small)
    killing.wait_for(lambda: len(list(store.rglob("shard-*.json"))) >= 4, first)
    notebook.disconnect(first)
    arrived = len(list((drive.back / "features").rglob("shard-*.json")))
    summary = json.loads(notebook.finish("extract", "--store", store, *wanted, *small).splitlines()[-1])
    notebook.finish("extract", "--store", tmp_path / "undisturbed", *wanted, *small)

    assert summary["shards_before"] <= arrived
    assert shards(store) == shards(tmp_path / "undisturbed")
    notebook.finish("store", "verify", store)

    key = summary["keys"][0].partition("/")[2]
    training = ["--subject-dir", subject, "--store", store, "--feature", key, "--epochs", 6, "--workers", 0]
    second = notebook.start("train", *training, "--out", run)
    killing.wait_for(lambda: len(list(run.glob("checkpoints/epoch*/manifest.json"))) >= 2, second)
    notebook.disconnect(second)
    notebook.finish("train", "--resume", run)

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(r["epoch"] for r in records if r["split"] == "val") == 5
    assert "oom_kill 0" in (notebook.group / "memory.oom_control").read_text()
