"""Thirty random kills of everything, a full disk, memory of all processes: extraction on purpose under faults."""

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time

import pytest

from benchmarks.extract import family_bytes
from brainenc.extract.miniature import save_miniature
from tests.extract.conftest import save_images, tree
from tests.extract.killing import family, finish, kill, receipts, start, wait_for, workers

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1500)]
MB = 10**6
STORES = int(os.environ.get("BRAINENC_CHAOS_STORES", "15"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A command for a store; and what it makes of it undisturbed."""
    root = tmp_path_factory.mktemp("work")
    images = save_images(root / "set", 240, size=224)
    backbone = save_miniature("dinov2", root / "mini", hidden_size=96, num_hidden_layers=6)

    def command(store, *more):
        return [
            "extract", "--images", str(images), "--store", str(store), "--backbone", str(backbone), "--feature", "5.q",
            "--feature", "4-5.token", "--rows-per-shard", "8", "--batch-size", "4", "--threads", "1", "--device", "cpu",
            "--commit-every", "1h", "--json", *more,  # the clock of a busy machine must not decide how often
        ]  # fmt: skip

    finish(start(command(root / "reference"), log=root / "log"), log=root / "log")
    return command, root / "reference"


def test_thirty_random_kills_end_byte_equal_and_no_sealed_shard_is_computed_twice(tmp_path, work):
    command, reference = work
    seed = int(os.environ.get("BRAINENC_CHAOS_SEED", time.time_ns() % 10**6))
    print(f"seed {seed}")
    chance = random.Random(seed)
    for n in range(STORES):  # two kills each: one of everything, one of a worker or the driver alone
        store, sealed = tmp_path / f"store{n}", {}
        for victims_of in (family, chance.choice([workers, lambda run: family(run)[:1]])):
            log = tmp_path / f"log{n}"
            run = start(command(store), log=log)
            target = len(sealed) + chance.randint(0, 30)
            wait_for(lambda s=store, t=target: s.exists() and len(receipts(s)) >= t, run)
            time.sleep(chance.random() * 0.2)
            kill(victims_of(run))
            if victims_of is workers:
                run.wait(180)
            else:
                kill(family(run))
                run.wait()
            assert sealed.items() <= receipts(store).items(), f"seed {seed}: a sealed shard was written again"
            sealed = receipts(store)
        summary = finish(start(command(store), log=tmp_path / f"end{n}"), log=tmp_path / f"end{n}")
        assert tree(store) == tree(reference), f"seed {seed}, store {n}"
        assert sealed.items() <= receipts(store).items()
        assert summary["shards_before"] >= len(sealed)
        assert summary["shards_sealed"] + summary["shards_before"] == len(receipts(reference))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_to_the_command_end_with_their_codes(tmp_path, work, number, code):
    command, reference = work
    run = start(command(tmp_path / "s"), log=tmp_path / "log")
    assert wait_for(lambda: len(receipts(tmp_path / "s")) >= 3, run)

    os.kill(run.pid, number)

    assert run.wait(60) == code, (tmp_path / "log").read_text()
    assert not family(run)
    finish(start(command(tmp_path / "s"), log=tmp_path / "log2"), log=tmp_path / "log2")
    shards = {name: data for name, data in tree(reference).items() if "manifest-" not in name}
    assert shards == {name: data for name, data in tree(tmp_path / "s").items() if "manifest-" not in name}


@pytest.mark.root
def test_a_full_disk_is_told_and_after_space_is_made_the_same_command_finishes(tmp_path, work):
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    command, reference = work
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(mount)], check=True)
    try:
        ballast = mount / "ballast"
        run = start(command(mount / "s"), log=tmp_path / "log")
        assert wait_for(lambda: len(receipts(mount / "s")) >= 3, run)
        free = os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize
        with contextlib.suppress(OSError):  # the run takes some of it meanwhile: then this is all there was
            ballast.write_bytes(bytes(free - 1_500_000))

        assert run.wait(120) == 1
        assert "space" in (tmp_path / "log").read_text().lower()
        assert not list((mount / "s").rglob("*.partial"))
        ballast.unlink()
        finish(start(command(mount / "s"), log=tmp_path / "log2"), log=tmp_path / "log2")
        shards = {name: data for name, data in tree(reference).items() if "manifest-" not in name}
        assert shards == {name: data for name, data in tree(mount / "s").items() if "manifest-" not in name}
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_memory_of_all_processes_does_not_grow_with_the_number_of_images(tmp_path):
    backbone = save_miniature("dinov2", tmp_path / "mini", image_size=56)
    peaks = {}
    for count in (500, 2000):
        images = save_images(tmp_path / f"set{count}", count, size=56)
        options = [
            "--backbone",
            str(backbone),
            "--feature",
            "3.q",
            "--rows-per-shard",
            "64",
            "--threads",
            "1",
            "--json",
        ]
        run = start(
            ["extract", "--images", str(images), "--store", str(tmp_path / f"s{count}"), *options], log=tmp_path / "log"
        )
        seen = []
        watch = threading.Thread(target=lambda r=run, s=seen: _watch(r, s))
        watch.start()
        assert run.wait(300) == 0, (tmp_path / "log").read_text()
        watch.join()
        assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["images"] == count
        peaks[count] = max(seen)

    assert peaks[2000] - peaks[500] <= max(0.05 * peaks[500], 64 * MB), peaks


def _watch(run, seen) -> None:
    while run.poll() is None:
        seen.append(family_bytes(run.pid))
        time.sleep(0.2)
