"""Training: epochs from the store against epochs from RAM, time to the first step, what the status word costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.figures import Figure

TITLE = "Training"
NOTES = """
Store against RAM: one process of two threads in a memory cgroup, the real size (batch 16, 961 x 768 tokens in float16,
19,004 + 20,544 vertices), blocks of 20 steps in turn, cache of the store dropped first. The RAM side indexes a tensor
of 64 rows in the training thread, which is what people do today. Times are sums over all blocks.
Command to first step: a small subject, from the process's start to the first line of `metrics.jsonl`.
"""

LIMIT = 2 << 30
"""The cgroup's memory limit: torch, a model of 33 million parameters with Adam and its activations take 1.4 GB."""
ROW = (962, 768)
STEPS, BLOCK, BATCH = 200, 20, 16
VERTICES = (19_004, 20_544)


def run() -> list[Figure]:
    """Measure."""
    with tempfile.TemporaryDirectory(prefix="bench-train-", dir=os.environ.get("BENCH_DIR")) as folder:
        root = Path(folder)
        return [*feed(root), *first_steps(root), *collective(), *snapshots(root)]


# ---------------------------------------------------------------------- store against RAM


def feed(root: Path) -> list[Figure]:
    """200 steps from a store three times the memory limit, interleaved with 200 from RAM."""
    from brainenc.featurestore.store import open_store

    rows = 3 * LIMIT // (2 * ROW[0] * ROW[1]) + 1
    rng = np.random.default_rng(0)
    block = rng.standard_normal((64, *ROW), dtype=np.float32).astype(np.float16)
    store = open_store(root / "store", create=True)
    ids = [f"nsd-{i:05d}" for i in range(rows)]
    with store.writer("bench/dino/11.q", ids=ids, row_shape=ROW, details={"n_prefix": 1, "grid": [31, 31]}) as writer:
        for first in range(0, rows, 64):
            writer.append(np.roll(block, first // 64, axis=2)[: rows - first])
    for side, n in zip(("lh", "rh"), VERTICES, strict=True):
        responses = np.lib.format.open_memmap(root / f"{side}.npy", mode="w+", dtype=np.float32, shape=(rows, n))
        for first in range(0, rows, 256):
            responses[first : first + 256] = rng.standard_normal((min(256, rows - first), n), dtype=np.float32)
        responses.flush()
    drop_cache(root)
    found = limited([sys.executable, "-m", "benchmarks.train", "feed", str(root)])
    ratio = found["store_s"] / found["ram_s"]
    size = 2 * rows * ROW[0] * ROW[1]
    return [
        Figure(
            name="200 steps from a store of three times the memory limit, against RAM", value=ratio, target=1.02,
            at_most=True, reference=f"RAM: {found['ram_s'] / STEPS * 1e3:.0f} ms a step",
            note=f"store {size / 1e9:.1f} GB, limit {LIMIT / 1e9:.1f} GB{found['limited']}",
        ),
        Figure(
            name="time waiting for data", value=100 * found["waited_s"] / found["store_s"], unit="%", target=2.0,
            at_most=True, reference=f"{found['store_s'] / STEPS * 1e3:.0f} ms a step",
        ),
        Figure(
            name="growth of anonymous memory from step 20 to 200", value=found["growth"] / 1e6, unit="MB", target=16.0,
            at_most=True, note=f"{found['anonymous'] / 1e6:.0f} MB at the end",
        ),
    ]  # fmt: skip


def drop_cache(folder: Path) -> None:
    """Pages in the cache are charged to whoever touched them first: without this, a memory limit proves nothing."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def limited(command: list[str]) -> dict:
    """Run under the memory limit and read the JSON that it prints; without root, without a limit, and says so."""
    from brainenc.guard.testing import MemoryLimit

    try:
        with MemoryLimit(LIMIT) as limit:
            done = subprocess.run(command, preexec_fn=limit.enter, capture_output=True, text=True, timeout=1800)
            note = ""
    except PermissionError:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        note = ", not in force (needs root)"
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "limited": note}


def _feed(root: Path) -> dict:
    """The child under the limit."""
    import torch

    from brainenc.datasets.cortex import made_up_atlas
    from brainenc.featurestore.store import open_store
    from brainenc.train.data import Loader, Samples
    from brainenc.train.encoders.base import EncoderConfig
    from brainenc.train.features import FeatureLayout, RowLayout
    from brainenc.train.model import build_encoder
    from brainenc.train.order import Order
    from brainenc.train.step import Stepper, StepSettings
    from brainenc.train.team import Solo

    torch.set_num_threads(2)
    view = open_store(root / "store")["bench/dino/11.q"]
    layout = FeatureLayout.of([RowLayout.of("11.q", ROW, view.details, None)])
    n = len(view)
    responses = tuple(np.load(root / f"{side}.npy", mmap_mode="r") for side in ("lh", "rh"))
    samples = Samples(
        views=[view], feature_rows=[np.arange(n)], responses=responses, response_rows=np.arange(n), ids=view.ids,
        layout=layout,
    )  # fmt: skip
    model = build_encoder(EncoderConfig(), made_up_atlas(VERTICES, 0).queries("rois_all"), channels=768, grid=(31, 31))
    stepper = Stepper(model, Solo(), StepSettings(seed=0), micro_batch=BATCH)
    ram = _Ram(view, responses, layout)
    times = {"store": 0.0, "ram": 0.0, "waited": 0.0}
    early = 0

    def take(batch: object, step: int) -> None:
        stepper.local(batch, step)
        stepper.update(5e-4)

    with Loader(samples, Order(n_samples=n, batch_size=BATCH, seed=0)) as loader:
        batches = loader.run(0, STEPS + 5)
        for step in range(5):  # first passes allocate
            take(next(batches), step)
            take(ram.batch(step), step)
        for block in range(STEPS // BLOCK):
            began = time.perf_counter()
            for step in range(BLOCK):
                take(ram.batch(block * BLOCK + step), step)
            times["ram"] += time.perf_counter() - began
            began = time.perf_counter()
            for step in range(BLOCK):
                take(next(batches), step)
                times["waited"] += loader.waited
            times["store"] += time.perf_counter() - began
            time.sleep(0.3)  # the thread fills its buffers again, so that it takes nothing from the block from RAM
            early = early or anonymous()
        late = anonymous()
        batches.close()
    return {
        "store_s": times["store"], "ram_s": times["ram"], "waited_s": times["waited"], "growth": late - early,
        "anonymous": late,
    }  # fmt: skip


class _Ram:
    """Batches by indexing tensors in RAM, in the training thread."""

    def __init__(self, view: object, responses: tuple, layout: object) -> None:
        import torch

        self._features = torch.from_numpy(view.gather(np.arange(64)))
        self._responses = [torch.from_numpy(np.array(r[:64])) for r in responses]
        self._layout, self._rng = layout, np.random.default_rng(0)
        self.count = self.global_count = BATCH

    def batch(self, _step: int) -> _Ram:
        rows = self._rng.permutation(64)[:BATCH]
        self._now = (self._features[rows], *(r[rows] for r in self._responses))
        return self

    def part(self, first: int, last: int) -> tuple:
        features, lh, rh = (t[first:last] for t in self._now)
        return self._layout.assemble([features]), lh, rh


def anonymous() -> int:
    """Anonymous memory of this process in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


# ---------------------------------------------------------------------- time to the first step


def first_steps(root: Path) -> list[Figure]:
    """From the command to the first record, with two workers and without Ray; the best of two each."""
    from brainenc.datasets.synthetic import synthesize
    from brainenc.featurestore.store import open_store

    rng = np.random.default_rng(0)
    subject, store_folder = root / "subj01", root / "small-store"
    synthesize(
        subject, features=lambda paths: rng.standard_normal((len(paths), 4, 4, 32)), n_train=60, n_test=8,
        vertices=(120, 130), seed=0,
    )  # fmt: skip
    from brainenc.datasets.algonauts import Subject

    store = open_store(store_folder, create=True)
    opened = Subject.open(subject)
    for split in ("train", "test"):
        ids = opened.ids(split)
        with store.writer(f"subj01-{split}/tiny/1.q", ids=ids, row_shape=(17, 32)) as writer:
            writer.append(rng.standard_normal((len(ids), 17, 32)).astype(np.float16))
    took = {}
    for workers in ("0", "2"):
        took[workers] = min(_first_step(root, subject, store_folder, workers, number) for number in range(2))
    return [
        Figure(name="command to first step, two workers", value=took["2"], unit="s", target=20.0, at_most=True),
        Figure(name="command to first step, --workers 0", value=took["0"], unit="s", target=6.0, at_most=True),
    ]


def _first_step(root: Path, subject: Path, store: Path, workers: str, number: int) -> float:
    out = root / f"run-{workers}-{number}"
    command = [
        "train", "--subject-dir", str(subject), "--store", str(store), "--feature", "tiny/1.q", "--heads", "4",
        "--out", str(out), "--workers", workers, "--epochs", "1", "--no-predict",
    ]  # fmt: skip
    program = f"import sys; from brainenc.cli.main import main; main({command!r})"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    took = time.perf_counter() - began
    _, err = process.communicate(timeout=120)
    if process.returncode:
        raise RuntimeError(f"training ended with {process.returncode}: {err.decode()[-2000:]}")
    return took


# ---------------------------------------------------------------------- the status word


def collective() -> list[Figure]:
    """What a step of two ranks pays for the word: exchange, verdict, guard."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.train", "collective", str(rank), f"{folder}/meet"],
                stdout=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        found = [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in processes]
    return [
        Figure(
            name="status collective and verdict, added to a step of two ranks", value=found[0]["median_ms"], unit="ms",
            target=1.0, at_most=True, note=f"95 % under {found[0]['p95_ms']:.2f} ms",
        )
    ]  # fmt: skip


def _collective(rank: int, meet: str) -> dict:
    import torch.distributed as dist

    from brainenc.guard.messages import NullGuard
    from brainenc.train.status import Word, decide
    from brainenc.train.team import Distributed

    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    team, guard = Distributed(timeout_s=60, local_rank=rank), NullGuard()
    times = []
    for step in range(2000):
        began = time.perf_counter()
        guard.pending()
        decide(team.exchange(Word(step=step, micro_batch=8, loss=1.0, samples=8).row()))
        guard.beat(epoch=0, step=step)
        times.append(time.perf_counter() - began)
    dist.destroy_process_group()
    return {"median_ms": float(np.median(times[200:])) * 1e3, "p95_ms": float(np.quantile(times[200:], 0.95)) * 1e3}


# ---------------------------------------------------------------------- snapshots and emergency checkpoints


def snapshots(root: Path) -> list[Figure]:
    """What rolling snapshots take from training, and how long a 40 M parameter model takes to be durable."""
    small, large = (_saving(root / name, width) for name, width in (("small", 8_000), ("large", 40_000)))
    return [
        Figure(
            name="rolling snapshots of a 96 MB training state, share of a core at one every 20 s",
            value=100 * (small["pause_s"] + small["thread_s"]) / 20, unit="%", target=1.0, at_most=True,
            note=f"held up for {small['pause_s'] * 1e3:.0f} ms, {small['thread_s'] * 1e3:.0f} ms of CPU beside it",
        ),
        Figure(
            name="emergency checkpoint of 40 M parameters with Adam, durable and verified", value=large["emergency_s"],
            unit="s", target=2.0, at_most=True, note=f"{large['bytes'] / 1e6:.0f} MB, local disk",
        ),
    ]  # fmt: skip


def _saving(root: Path, width: int) -> dict[str, float]:
    import torch

    from brainenc.train.checkpoint import Contents, Position
    from brainenc.train.run_folder import RunFolder
    from brainenc.train.saver import Saver
    from brainenc.train.snapshot import StateCopy
    from brainenc.train.step import _adamw

    model = torch.nn.Linear(1000, width)
    optimizer = _adamw(list(model.parameters()), 0.0)
    folder = RunFolder(root)
    folder.checkpoints.mkdir(parents=True)
    saver = Saver(folder, snapshots=root / "snapshots", keep=2)
    saver.use(StateCopy(model, optimizer))
    pauses, threads = [], []
    for step in range(1, 6):
        contents = Contents(
            position=Position(step=step, epoch=0), weights=model.state_dict, optimizer=optimizer.state_dict()
        )
        began, cpu = time.perf_counter(), time.process_time()
        pauses.append(saver.snapshot(contents))
        pause_cpu = time.process_time() - cpu
        saver.wait()
        threads.append(time.process_time() - cpu - pause_cpu)
    began = time.perf_counter()
    path = saver.emergency(contents, "measured")
    took = time.perf_counter() - began
    size = sum(file.stat().st_size for file in path.iterdir())
    return {
        "pause_s": float(np.median(pauses)), "thread_s": float(np.median(threads)), "emergency_s": took, "bytes": size,
    }  # fmt: skip


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    result = _feed(Path(arguments[0])) if kind == "feed" else _collective(int(arguments[0]), arguments[1])
    print(json.dumps(result))
