"""`ray job submit` from outside: progress and exit codes come back, a stop is a safe one, figures are scraped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def head():
    """`ray start --head` with its dashboard, as cluster.yaml starts it; all its processes end with the fixture."""
    pytest.importorskip("aiohttp_cors", reason="jobs need ray[default] (pip install 'brainenc[cluster]')")
    port, dashboard, metrics = free_port(), free_port(), free_port()
    scratch = tempfile.mkdtemp(prefix="bjob", dir="/tmp")  # short: socket paths are limited
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}"]
    # Its default is one port of the whole machine, which another Ray may have: then no job can be submitted.
    ports += [f"--dashboard-agent-listen-port={free_port()}"]
    sizes = ["--num-cpus=4", "--object-store-memory=100000000", f"--temp-dir={scratch}"]
    command = [BIN / "ray", "start", "--head", "--block", "--dashboard-host=127.0.0.1", *ports, *sizes]
    process = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/version", timeout=2), 90)
        yield {"jobs": f"http://127.0.0.1:{dashboard}", "metrics": f"http://127.0.0.1:{metrics}/metrics"}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
        shutil.rmtree(scratch, ignore_errors=True)


def wait_for(look, seconds: float):
    """Until ``look`` answers something; its errors mean not yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := look():
                return found
        except OSError as error:
            if time.monotonic() > deadline:
                raise AssertionError(f"nothing after {seconds} s: {error}") from error
        assert time.monotonic() < deadline, f"nothing after {seconds} s"
        time.sleep(0.3)


@pytest.fixture
def client(head):
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(head["jobs"])


def submit(client, *arguments: object) -> str:
    """The interpreter by its full path: `python` on a cluster may be another one. A job that was stopped has no exit
    code in Ray's records, so the shell around it says it."""
    command = " ".join(map(str, [sys.executable, "-m", "brainenc", *arguments]))
    return client.submit_job(entrypoint=f"trap : TERM; {command}; code=$?; echo exit code $code; exit $code")


def end_of(client, job: str, seconds: float = 240):
    wait_for(lambda: client.get_job_status(job).is_terminal(), seconds)
    return client.get_job_info(job), client.get_job_logs(job)


def extraction(pictures: Path, store: Path, backbone: str) -> list[object]:
    what = ["--images", pictures, "--store", store, "--backbone", backbone, "--feature", "3.token"]
    how = ["--batch-size", 4, "--rows-per-shard", 8, "--actors", 2, "--threads", 1, "--address", "auto"]
    return ["extract", *what, *how]


def gauges(head, run: object) -> dict[str, float]:
    """What Prometheus would see of one run: name -> value."""
    text = urllib.request.urlopen(head["metrics"], timeout=5).read().decode()
    lines = [line for line in text.splitlines() if line.startswith("ray_brainenc_") and f'run="{run}"' in line]
    return {line.partition("{")[0].removeprefix("ray_brainenc_"): float(line.rpartition(" ")[2]) for line in lines}


def scrape(head, client, job: str, run: object, wanted: set[str], moving: str) -> dict[str, float]:
    """The first scrape in a run that has all of these, once one of them is not 0 any more."""
    while wanted - (found := gauges(head, run)).keys() or not found[moving]:
        assert not client.get_job_status(job).is_terminal(), (found, client.get_job_logs(job))
        time.sleep(0.5)
    return found


def test_an_extraction_from_outside_is_read_and_scraped(head, client, many_pictures, miniature, tmp_path):
    store = tmp_path / "store"
    job = submit(client, *extraction(many_pictures, store, miniature))

    found = scrape(
        head, client, job, store,
        {"images_done", "images_per_s", "shards_sealed", "memory_bytes", "memory_fraction", "guard_level"},
        moving="images_per_s",
    )  # fmt: skip
    client.stop_job(job)
    _, logs = end_of(client, job)

    assert "exit code 75" in logs
    assert "\r" not in logs
    done = re.findall(r"extract: (\d+)/6000", logs)
    assert 0 < found["images_done"] <= int(done[-1])
    assert found["images_per_s"] > 0
    assert 0 < found["memory_fraction"] < 1
    assert found["guard_level"] == 0


def test_a_training_from_outside_is_scraped(head, client, learnt, tmp_path):
    out = tmp_path / "run"
    job = submit(client, "train", *learnt, "--out", out, "--workers", 2, "--epochs", 100000, "--address", "auto")

    names = {"step_s", "samples_per_s", "data_wait_share", "loss", "val_perf", "memory_fraction", "guard_level"}
    found = scrape(head, client, job, out, names, moving="step_s")
    client.stop_job(job)
    _, logs = end_of(client, job)

    assert "exit code 75" in logs
    assert found["step_s"] > 0
    assert 0 <= found["data_wait_share"] <= 1
    assert 0 < found["memory_fraction"] < 1
    seen = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert found["loss"] in {r["loss"] for r in seen if r["split"] == "train"}, "the run's own records say the same"


def test_a_wrong_command_tells_its_exit_code(client, pictures, miniature, tmp_path):
    job = submit(client, *extraction(pictures, tmp_path / "store", miniature), "--feature", "99.q")
    info, logs = end_of(client, job)

    assert info.driver_exit_code == 2
    assert "99" in logs


def test_a_stopped_job_stops_safely_and_goes_on(client, many_pictures, miniature, tmp_path):
    store, pictures = tmp_path / "store", tmp_path / "pictures"
    pictures.mkdir()
    for picture in sorted(many_pictures.iterdir())[:480]:
        (pictures / picture.name).symlink_to(picture)
    job = submit(client, *extraction(pictures, store, miniature))
    wait_for(lambda: len(list(store.rglob("shard-*.json"))) >= 2, 120)
    client.stop_job(job)
    info, logs = end_of(client, job)
    sealed = {p: p.stat().st_mtime_ns for p in store.rglob("shard-*.json")}

    again, again_logs = end_of(client, submit(client, *extraction(pictures, store, miniature), "--json"))

    assert info.status == "STOPPED"
    assert info.driver_exit_code is None, "docs/cluster.md says so"
    assert "Stopped safely" in logs, logs
    assert "exit code 75" in logs
    assert again.driver_exit_code == 0, again_logs
    assert {p: p.stat().st_mtime_ns for p in sealed} == sealed
    summary = json.loads(next(line for line in reversed(again_logs.splitlines()) if '"images"' in line))
    assert summary["shards_before"] == len(sealed)
