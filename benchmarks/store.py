"""The store: gather against a plain copy and against others, cold reads, writing, opening, epochs beyond memory."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.figures import Figure
from brainenc.featurestore import FeatureView, StimulusSet, open_store
from brainenc.featurestore.recovery import verify
from brainenc.guard.testing import MemoryLimit, can_limit_memory, drop_cache

TITLE = "Feature store"
NOTES = """
Rows of 962 x 768 float16 (1.48 MB), 1,500 of them, in shards of 172. Each side of a ratio is the best of several
rounds, taken in turn within one run: the machine is shared. Peers read the same rows, uncompressed and one row a chunk,
in an environment of their own (`.venv-peers`), best of three rounds, twice: a batch as the peer's own pages read one
(a list of indices where it takes one, else samples that are collected and stacked, as a loader's collate does), and by
hand, row after row straight into the buffer (h5py's `read_direct` without chunks; one sample copied as it comes). By
hand the best of them reads at half of what the machine copies, so that no gather can be much more than twice as fast:
that ratio has no target.
"""
ROW, N, PER_SHARD, BATCH = (962, 768), 1500, 172, 32
ROW_BYTES = 2 * ROW[0] * ROW[1]
KEY = "bench/dinov2-base/11.q"
PEERS = ("datasets", "litdata", "mosaicml-streaming", "zarr", "tensorstore", "h5py", "pylance")
EPOCH_LIMIT = 2 << 30
_HERE = Path(__file__).parent


def run() -> list[Figure]:
    """Measure."""
    with tempfile.TemporaryDirectory(prefix="bench-store-", dir=os.environ.get("BENCH_DIR")) as folder:
        root = Path(folder)
        batch = np.random.default_rng(0).normal(size=(BATCH, *ROW)).astype(np.float16)
        figures = writing(root, batch)
        view = build(root / "store", batch)
        figures += warm(view)
        figures += cold(view, root / "store")
        figures += peers(view, root)
        shutil.rmtree(root / "store")
        return figures + opening(root) + epochs(root)


def build(folder: Path, batch: np.ndarray, n: int = N) -> FeatureView:
    """A whole store of rows."""
    store = open_store(folder, create=True)
    with store.writer(KEY, ids=map(str, range(n)), row_shape=ROW, rows_per_shard=PER_SHARD) as writer:
        for start in range(0, n, BATCH):
            writer.append(batch[: min(BATCH, n - start)])
    return store[KEY]


def writing(root: Path, batch: np.ndarray, n: int = 512, rounds: int = 5) -> list[Figure]:
    """Shards, sealed and committed, against write and flush of the same bytes."""

    def plain() -> float:
        started = time.perf_counter()
        with open(root / "plain", "wb", buffering=0) as file:
            for _ in range(n // BATCH):
                file.write(batch)
            os.fsync(file.fileno())
        return n * ROW_BYTES / (time.perf_counter() - started) / 1e9

    def ours() -> float:
        store = open_store(root / "written", create=True)
        store.add_stimuli(StimulusSet.from_ids("bench", map(str, range(n))))
        started = time.perf_counter()
        made = store.create_collection(KEY, identity={}, rows_per_shard=256, row_shape=ROW, dtype="float16")
        for shard in range(made.n_shards):
            with made.shard_writer(shard) as writer:
                for _ in range(256 // BATCH):
                    writer.append(batch)
                writer.seal()
        made.commit()
        seconds = time.perf_counter() - started
        shutil.rmtree(root / "written")
        return n * ROW_BYTES / seconds / 1e9

    best_plain, best_ours = _in_turn([plain, ours], rounds)
    (root / "plain").unlink()
    return [Figure(name="Writing, sealing and committing", value=best_ours / best_plain, target=0.8,
                   reference=f"write and flush of one file: {best_plain:.2f} GB/s",
                   note=f"{best_ours:.2f} GB/s, checksums and reading back included")]  # fmt: skip


def warm(view: FeatureView) -> list[Figure]:
    """Batches of random rows from the page cache, against torch copying as many bytes."""
    import torch

    gather, target = _gatherer(view), torch.zeros(BATCH, *ROW, dtype=torch.float16)
    source = torch.ones(8 * BATCH, *ROW, dtype=torch.float16)  # more than any cache of the processor holds

    def copy() -> float:
        started = time.perf_counter()
        for k in range(24):
            target.copy_(source[(k % 8) * BATCH : (k % 8 + 1) * BATCH])
        return 24 * target.nbytes / (time.perf_counter() - started) / 1e9

    best_copy, best_gather = _in_turn([copy, gather], 12)
    return [Figure(name="Gather of 32 random rows, warm", value=best_gather / best_copy, target=0.5,
                   reference=f"torch copy of as many bytes: {best_copy:.1f} GB/s",
                   note=f"{best_gather:.1f} GB/s")]  # fmt: skip


def _gatherer(view: FeatureView) -> Callable[[], float]:
    out, rng = np.zeros((BATCH, *ROW), np.float16), np.random.default_rng(0)
    view.gather(np.arange(N))  # all in the page cache

    def gather() -> float:
        batches = [rng.integers(0, N, BATCH) for _ in range(24)]
        started = time.perf_counter()
        for rows in batches:
            view.gather(rows, out=out)
        return 24 * out.nbytes / (time.perf_counter() - started) / 1e9

    return gather


def cold(view: FeatureView, folder: Path, rounds: int = 5) -> list[Figure]:
    """One epoch in random order, known ahead, nothing in memory, against reading the files through with O_DIRECT."""
    files = sorted((folder / KEY).glob("shard-*.arrow"))
    buffer, out = mmap.mmap(-1, 8 << 20), np.zeros((BATCH, *ROW), np.float16)

    def direct() -> float:
        size, started = 0, time.perf_counter()
        for path in files:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            position = 0
            while (n := os.preadv(fd, [buffer], position)) > 0:
                position += n
            os.close(fd)
            size += position
        return size / (time.perf_counter() - started) / 1e9

    def epoch() -> float:
        view.release()
        drop_cache(files)
        order = np.random.default_rng(0).permutation(N)
        batches = [order[start : start + BATCH] for start in range(0, N, BATCH)]
        started = time.perf_counter()
        for rows in batches[:AHEAD]:
            view.prefetch(rows)
        for i, rows in enumerate(batches):
            if i + AHEAD < len(batches):
                view.prefetch(batches[i + AHEAD])
            view.gather(rows, out=out[: len(rows)])
        return N * ROW_BYTES / (time.perf_counter() - started) / 1e9

    def check() -> float:
        drop_cache(files)
        result = verify(open_store(folder))
        return result.bytes / result.seconds / 1e9

    best_direct, best_epoch, best_check = _in_turn([direct, epoch, check], rounds)
    return [Figure(name="Random rows, cold, order known ahead", value=best_epoch / best_direct, target=0.9,
                   reference=f"sequential direct I/O: {best_direct:.2f} GB/s",
                   note=f"{best_epoch:.2f} GB/s, {AHEAD} batches ahead"),
            Figure(name="Verifying every byte, from the disk", value=best_check / best_direct,
                   reference=f"sequential direct I/O: {best_direct:.2f} GB/s",
                   note=f"{best_check:.2f} GB/s")]  # fmt: skip


AHEAD = 4


def peers(view: FeatureView, root: Path) -> list[Figure]:
    """The best of the others on the same rows; ours before and after them, because the machine is shared."""
    python = _peer_python()
    if python is None:
        return []
    gather = _gatherer(view)
    before = max(gather() for _ in range(6))
    rows = root / "rows.npy"
    np.save(rows, view[:])
    (root / "peers").mkdir()
    done = subprocess.run([python, _HERE / "store_peers.py", rows, root / "peers"], capture_output=True, text=True,
                          timeout=1500, check=True)  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(root / "peers")
    rows.unlink()
    ours = max(before, *(gather() for _ in range(6)))
    failed = "".join(f"; {name} failed ({why})" for name, why in found.items() if isinstance(why, str))
    forms = {form: {name: speeds[form] for name, speeds in found.items() if isinstance(speeds, dict)}
             for form in ("batch", "by hand")}  # fmt: skip
    return [
        _against_best("Gather against the best peer, a batch as its pages read one", ours, forms["batch"], 5.0, failed),
        _against_best("Gather against the best peer, read row by row into the buffer by hand", ours, forms["by hand"]),
    ]


def _against_best(
    name: str, ours: float, speeds: dict[str, float], target: float | None = None, failed: str = ""
) -> Figure:
    best = max(speeds, key=lambda peer: speeds[peer])
    listing = ", ".join(f"{peer} {speed:.2f}" for peer, speed in sorted(speeds.items(), key=lambda item: -item[1]))
    return Figure(name=name, value=ours / speeds[best], target=target, reference=f"{best}: {speeds[best]:.2f} GB/s",
                  note=f"GB/s: ours {ours:.1f}, {listing}{failed}")  # fmt: skip


def opening(root: Path) -> list[Figure]:
    """A collection of 10,000 shards, in a fresh process."""
    subprocess.run([sys.executable, _HERE / "store_child.py", "many", root / "many", "10000"], check=True, timeout=900)
    found = [_child("open", root / "many") for _ in range(5)]
    shutil.rmtree(root / "many")
    best = min(found, key=lambda one: one["seconds"])
    return [
        Figure(name="Opening 10,000 shards", value=best["seconds"], unit="s", target=0.5, at_most=True,
               note="store, manifest and the first row; best of five processes"),
        Figure(name="Opening 10,000 shards, memory", value=best["anonymous"] / 1e6, unit="MB", target=100,
               at_most=True, note="anonymous memory on top of the imports"),
    ]  # fmt: skip


def epochs(root: Path) -> list[Figure]:
    """Ten epochs of random batches over three times the memory limit."""
    if not can_limit_memory():
        return []
    n = -(-3 * EPOCH_LIMIT // ROW_BYTES)
    batch = np.random.default_rng(0).normal(size=(BATCH, *ROW)).astype(np.float16)
    build(root / "large", batch, n).close()
    drop_cache(sorted((root / "large" / KEY).glob("shard-*.arrow")))
    with MemoryLimit(EPOCH_LIMIT) as limit:
        found = _child("epochs", root / "large", before=limit.enter)
        kills = limit.oom_kills()
    shutil.rmtree(root / "large")
    after_first, peak = found["anonymous"][0], max(found["anonymous"])
    return [
        Figure(name="Ten epochs over 3 times the memory limit", value=float(len(found["anonymous"])), unit="epochs",
               target=10, note=f"{n} rows, {n * ROW_BYTES / 1e9:.1f} GB, limit {EPOCH_LIMIT / 1e9:.1f} GB, "
               f"{found['seconds']:.0f} s, {kills} OOM kills"),
        Figure(name="Anonymous memory, growth after the first epoch", value=(peak - after_first) / 1e6, unit="MB",
               target=8, at_most=True, note=f"{after_first / 1e6:.0f} MB after the first, with the batch of 47 MB"),
    ]  # fmt: skip


def _in_turn(sides: list[Callable[[], float]], rounds: int) -> list[float]:
    """The best of each side over rounds in which each had its turn."""
    results = [[side() for side in sides] for _ in range(rounds)]
    return [max(column) for column in zip(*results, strict=True)]


def _child(task: str, folder: Path, before: Callable[[], None] | None = None) -> dict:
    done = subprocess.run([sys.executable, _HERE / "store_child.py", task, folder], capture_output=True, text=True,
                          preexec_fn=before, check=True, timeout=1200)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def _peer_python() -> Path | None:
    """Python of the peers' environment, made on first use; None where that cannot be (no network)."""
    folder = _HERE.parent / ".venv-peers"
    python = folder / "bin" / "python"
    uv = Path(sys.executable).parent / "uv"
    if not (folder / ".made").exists():
        try:
            subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
            subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "numpy", *PEERS], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no peers: their environment could not be made ({error})", file=sys.stderr)
            return None
        (folder / ".made").touch()
    return python
