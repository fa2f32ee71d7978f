"""Training is killed in every way, and goes on from where it was. Slow: `make chaos`."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from brainenc.train import checkpoint
from brainenc.train.launch import train
from brainenc.train.run_folder import RunFolder

pytestmark = pytest.mark.chaos


def start(arguments: list[str]) -> subprocess.Popen:
    """``brainenc`` in a session of its own, so that all of its processes can be ended together."""
    program = f"import sys; sys.path[:0] = {sys.path!r}; from brainenc.cli.main import main; main({arguments!r})"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=env, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def command(small, out: Path, workers: str, epochs: int, *more: str) -> list[str]:
    return [
        "train", "--subject-dir", str(small.subject_dir), "--store", str(small.store), "--feature", "tiny/1.q",
        "--heads", "2", "--hidden", "16", "--feedforward", "32", "--batch-size", "8", "--epochs", str(epochs),
        "--threads", "1", "--workers", workers, "--out", str(out), "--no-predict", *more,
    ]  # fmt: skip


def wait_for(process: subprocess.Popen, path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists(), process.communicate(timeout=5)[0]


def steps(out: Path) -> int:
    return max((r["step"] for r in RunFolder(out).metrics()), default=0)


def state(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found = checkpoint.newest([RunFolder(out).checkpoints])
    moments = checkpoint.load_state(found.folder)["optimizer"]["state"]
    flat = {f"{i}.{name}": t for i, entry in moments.items() for name, t in entry.items()}
    return load_file(found.folder / checkpoint.WEIGHTS) | flat


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_the_run_ends_bit_equal(small, tmp_path, seed):
    """kill -9 five times, whatever is being written; the same command line goes on each time."""
    rng, epochs = random.Random(seed), 60
    whole = small.config(tmp_path / "whole", epochs=epochs, log_every=100)
    assert train(whole).status == "done"
    out, kills = tmp_path / "run", 0
    options = ("--snapshot-every", "0.2s", "--checkpoint-every", "0.5s")
    arguments = command(small, out, "0", epochs, *options)
    while kills < 5:
        process = start(arguments if not (out / "config.yaml").exists() else ["train", "--resume", str(out)])
        wait_for(process, out / "metrics.jsonl")
        time.sleep(rng.uniform(0.3, 2.5))
        done = process.poll() is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        if done:
            break
    process = start(["train", "--resume", str(out)])
    text, _ = process.communicate(timeout=200)

    assert process.returncode == 0, text
    assert equal(state(out), state(Path(whole.out)))


def test_a_run_that_lost_its_checkpoints_folder_is_resumed_from_a_snapshot(small, tmp_path):
    """What a shared disk that comes up empty looks like."""
    out = tmp_path / "run"
    process = start(command(small, out, "0", 100000, "--snapshot-every", "0.3s", "--checkpoint-every", "1h"))
    wait_for(process, out / ".snapshots")
    time.sleep(2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for found in checkpoint.list_checkpoints(out / "checkpoints"):
        checkpoint.discard(found.folder)
    before = steps(out)

    process = start(["train", "--resume", str(out), "--epochs", str(before // 5 + 3)])
    text, _ = process.communicate(timeout=200)

    assert process.returncode == 0, text
    assert ".snapshots" in (out / "train.log").read_text()
    assert steps(out) == 5 * (before // 5 + 3)


@pytest.mark.ray
def test_sigterm_to_the_driver_of_two_workers_saves_and_exits_75(small, tmp_path):
    out = tmp_path / "run"
    process = start(command(small, out, "2", 100000))
    wait_for(process, out / "metrics.jsonl")

    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=100)

    assert process.returncode == 75, text
    assert "the driver received SIGTERM" in text
    emergency = [c for c in checkpoint.list_checkpoints(out / "checkpoints") if c.emergency]
    assert checkpoint.verify(emergency[0].folder).position.step == steps(out)


@pytest.mark.ray
@pytest.mark.root
def test_sigterm_with_the_run_folder_on_a_full_disk_saves_elsewhere(make_small, tmp_path, small_disk):
    """No order can be written there, and no record; the coordinator tells the ranks. Epochs are long, for each ends
    with a checkpoint there."""
    out = small_disk / "run"
    process = start(command(make_small(tmp_path, n_train=2000, n_test=5), out, "1", 100000, "--snapshot-every", "0"))
    wait_for(process, out / "metrics.jsonl")
    with suppress(OSError), open(small_disk / "fill", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))

    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=100)

    assert process.returncode == 75, text
    assert "the order to stop could not be written" in text
    saved = Path(text.partition("Emergency checkpoint saved: ")[2].partition(" (")[0])
    assert small_disk not in saved.parents
    assert checkpoint.verify(saved).position.step > 0
    assert "Training failed" not in text, "no rank died of what it could not write"
    shutil.rmtree(saved.parent)


@pytest.mark.ray
def test_sigterm_to_every_process_at_once_loses_at_most_a_snapshot(small, tmp_path):
    """Ray's workers end by their own handler; the newest snapshot or checkpoint is where the run goes on."""
    out = tmp_path / "run"
    process = start(command(small, out, "2", 100000, "--snapshot-every", "0.5s", "--max-failures", "0"))
    wait_for(process, out / "metrics.jsonl")
    time.sleep(4)
    reached = steps(out)
    os.killpg(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=100)  # Ray's own processes are gone as well

    assert process.returncode == 75, text
    choice = checkpoint.newest([out / "checkpoints", *(out / ".snapshots").glob("*")])
    assert choice.manifest.position.step >= reached - 400
    process = start(["train", "--resume", str(out), "--workers", "0", "--epochs", str(steps(out) // 5 + 2)])
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text


@pytest.mark.ray
@pytest.mark.parametrize("attempt", range(3))
def test_after_a_rank_was_killed_the_end_is_bit_equal(small, tmp_path, ray_session, attempt):
    """Rank 0 or 1, in different steps; with dropout, at the same number of workers."""
    whole = small.config(tmp_path / "whole", epochs=4, workers="2")
    faults = ("kill@step=3,rank=1", "kill@step=9,rank=0", "kill@step=14,rank=1")
    killed = small.config(tmp_path / "killed", epochs=4, workers="2", drill=(faults[attempt],))
    assert train(whole).status == "done"

    result = train(killed)

    assert result.status == "done", result.reason
    assert equal(state(Path(killed.out)), state(Path(whole.out)))
    runs = {r["step"]: r["run"] for r in RunFolder(killed.out).metrics()}
    assert runs[max(runs)] == 1, "it was started again once; from where depends on what was saved by then"
    log = (Path(killed.out) / "train.log").read_text()
    assert log.count("Going on from") + log.count("beginning again") == 1, "it says where it went on"


@pytest.mark.ray
def test_an_elastic_run_starts_with_what_there_is(small, tmp_path, ray_session, losses):
    """``--workers 1:2`` on two CPUs."""
    plain = small.config(tmp_path / "plain", dropout=0.0)
    train(plain)

    result = train(small.config(tmp_path / "run", dropout=0.0, workers="1:2"))

    assert result.status == "done", result.reason
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.ray
def test_a_drill_of_memory_in_one_of_two_workers_stops_both_at_the_same_step(small, tmp_path, ray_session):
    config = small.config(
        tmp_path / "run", epochs=10**6, workers="2", guard={"on_critical": "stop"}, drill=("ram=0.99@step=5,rank=1",),
        log_every=10,
    )  # fmt: skip

    result = train(config)

    assert (result.status, result.exit_code) == ("stopped", 75)
    assert "RAM usage is 99.0%" in result.reason
    assert checkpoint.verify(Path(result.checkpoint)).position.step == result.step


@pytest.mark.root
def test_a_full_disk_ends_the_run_with_a_sentence_and_older_checkpoints_whole(small, tmp_path):
    """A real file system of 700 kB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    out = tmp_path / "run"
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(out)], check=True)
    try:
        process = start(command(small, out, "0", 200, "--snapshot-every", "0", "--keep", "50", "--no-guard"))
        text, _ = process.communicate(timeout=200)

        assert process.returncode == 1, text
        assert "No space left for a checkpoint" in text
        found = checkpoint.newest([out / "checkpoints"])
        assert found.folder is not None
        assert found.skipped == ()
    finally:
        subprocess.run(["umount", str(out)], check=True)
