"""Extraction: speed against a bare loop over the same model, memory of all processes, what a repeat costs.

Real architectures with seeded weights and photographs' size of PNGs; every run is the command line in processes of its
own. Memory is the proportional share of anonymous and shared pages of every process, Ray's included: not RSS, which
counts libraries and maps again in each.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.figures import Figure

TITLE = "Extraction"
NOTES = """
Images a second are counted from a run's first micro-batch to its last receipt; start-up (imports, Ray, loading the
model) is reported apart, because it does not grow with the work. The bare loop has its images decoded and batched in
memory before its clock starts; extraction reads, hashes, decodes, converts, writes, checksums and flushes while its
clock runs. Both compute with one thread a process.
"""
MB = 10**6
_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4, "image_size": 518}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4, "image_size": 518}


def run(parts: Sequence[str] = ()) -> list[Figure]:
    """All figures, about twenty minutes on two cores; or those of some parts."""
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="be-bench-") as folder:
        root = Path(folder)
        for part in (one_actor, two_actors, pass_cost, plan_accuracy, memory_in_images, memory_in_layers, base_model,
                     repeat):  # fmt: skip
            if parts and part.__name__ not in parts:
                continue
            found = part(root)
            for figure in found:
                print(figure.row(), flush=True)
            figures += found
    return figures


def one_actor(root: Path) -> list[Figure]:
    """One actor against a bare loop; DINOv2-B at 434 px."""
    return _speed(root, 1, 0.97)


def two_actors(root: Path) -> list[Figure]:
    """Two actors against two bare loops side by side."""
    return _speed(root, 2, 0.95)


def _speed(root: Path, actors: int, target: float) -> list[Figure]:
    model, photos = _model(root, "base", **_BASE), _images(root / "photos", 96, 425)
    some = _linked(root / "some", photos, 48)
    before = _bare(model, some, processes=actors)
    given = some if actors == 1 else photos  # as many for each actor: three shards
    ours = _extract(root, given, model, ["11.q"], actors=actors, extra=["--rows-per-shard", "16"], watched=False)
    bare = (before + _bare(model, some, processes=actors)) / 2  # around ours: other work comes and goes
    return [
        Figure(
            name=f"images/s of {actors} actor(s) against {actors} bare loop(s)",
            value=ours["images_per_s"] / bare,
            target=target,
            reference=f"bare: {bare:.3g} images/s",
            note=f"start-up {ours['startup_s']:.1f} s",
        )
    ]


def pass_cost(root: Path) -> list[Figure]:
    """Eight features against one, same last layer."""
    model, images = _model(root, "small", **_SMALL), _images(root / "photos", 96, 425)
    one = _extract(root, images, model, ["11.token"])
    many = _extract(root, images, model, ["8-11.token", "8-11.q"])
    return [
        Figure(
            name="time of 8 features of one pass against 1",
            value=one["images_per_s"] / many["images_per_s"],
            target=1.1,
            at_most=True,
            reference=f"one feature: {one['images_per_s']:.3g} images/s",
        )
    ]


def plan_accuracy(root: Path) -> list[Figure]:
    """What `plan` says before against what happens."""
    model, images = _model(root, "small", **_SMALL), _images(root / "photos", 96, 425)
    options = _options(root / "planned", images, model, ["11.q"], 1)
    plan = json.loads(_brainenc(["plan", *options]).splitlines()[-1])
    begun = time.perf_counter()
    done = json.loads(_brainenc(["extract", *options]).splitlines()[-1])
    seconds = time.perf_counter() - begun
    size = sum(p.stat().st_size for p in (root / "planned").rglob("shard-*.arrow"))
    return [
        _off("time that plan says against what it took", plan["seconds"], seconds, f"took {seconds:.1f} s"),
        _off(
            "rate that plan says against what it was", 1 / plan["seconds_per_image"], done["images_per_s"],
            f"{done['images_per_s']:.3g} images/s",
        ),
        _off("disk that plan says against what was written", plan["disk_needed_bytes"], size, f"{size / MB:.0f} MB"),
        _off(
            "memory of a worker that plan says against its peak", plan["actor_memory_bytes"],
            done["peak_worker_bytes"], f"{done['peak_worker_bytes'] / MB:.0f} MB",
        ),
    ]  # fmt: skip


def _off(name: str, said: float, was: float, reference: str) -> Figure:
    """How far a forecast was off, up or down: at most a tenth."""
    ratio = said / was
    return Figure(
        name=name, value=100 * abs(ratio - 1), unit="% off", target=10, at_most=True, reference=reference,
        note=f"said {ratio:.3g} of it",
    )  # fmt: skip


def memory_in_images(root: Path) -> list[Figure]:
    """Peak memory of all processes for 500, 2,000 and 8,000 images of a small architecture."""
    model = _model(root, "mini", image_size=56)
    peaks = {}
    for count in (500, 2000, 8000):
        images = _images(root / f"tiny{count}", count, 56)
        peaks[count] = _extract(root, images, model, ["3.q"], extra=["--rows-per-shard", "128"], batch=32)["peak"]
    growth = max(peaks.values()) - peaks[500]
    allowed = max(0.05 * peaks[500], 64 * MB)
    return [
        Figure(
            name=f"peak memory, {count} images", value=peak / MB, unit="MB", note="all processes, anonymous and shared"
        )
        for count, peak in peaks.items()
    ] + [
        Figure(
            name="growth of peak memory from 500 to 8,000 images",
            value=growth / MB,
            unit="MB",
            target=allowed / MB,
            at_most=True,
            note="allowed: 5 % or 64 MB, whichever is larger",
        )
    ]


def memory_in_layers(root: Path) -> list[Figure]:
    """Peak memory of eight features against one, per further feature, in micro-batches of its output."""
    model, images = _model(root, "small", **_SMALL), _images(root / "photos", 96, 425)
    some = _linked(root / "thirtytwo", images, 32)
    one = _extract(root, some, model, ["11.token"])["peak"]
    many = _extract(root, some, model, ["4-11.token"])["peak"]
    batch = 8 * 962 * 384 * 4
    return [
        Figure(
            name="memory of each further layer, in micro-batches of its output",
            value=max(0, many - one) / 7 / batch,
            target=1.0,
            at_most=True,
            reference=f"one layer: {one / MB:.0f} MB; a micro-batch of output: {batch / MB:.1f} MB",
        )
    ]


def base_model(root: Path) -> list[Figure]:
    """DINOv2-B at 434 px, batch 8, 32 images."""
    model, images = _model(root, "base", **_BASE), _linked(root / "thirtytwo", _images(root / "photos", 96, 425), 32)
    done = _extract(root, images, model, ["11.q"], threads=2)
    return [
        Figure(
            name="DINOv2-B at 434 px, batch 8: peak memory of all processes",
            value=done["peak"] / MB,
            unit="MB",
            target=3000,
            at_most=True,
            note=f"{done['images_per_s']:.2f} images/s",
        )
    ]


def repeat(root: Path) -> list[Figure]:
    """The same command again when all is done, 10,000 images."""
    model, images = _model(root, "mini", image_size=56), _images(root / "tiny10000", 10_000, 56)
    options = [*_options(root / "again", images, model, ["3.q"], 1, batch=64), "--rows-per-shard", "512"]
    _brainenc(["extract", *options])
    begun = time.perf_counter()
    done = json.loads(_brainenc(["extract", *options]).splitlines()[-1])
    seconds = time.perf_counter() - begun
    assert not done["started_ray"]
    return [
        Figure(name="repeating a finished extraction of 10,000 images", value=seconds, unit="s", target=5, at_most=True)
    ]


def _model(root: Path, name: str, **sizes: int) -> Path:
    from brainenc.extract.miniature import save_miniature

    folder = root / "models" / name
    return folder if folder.exists() else save_miniature("dinov2", folder, **sizes)


def _images(folder: Path, count: int, size: int) -> Path:
    """PNGs that compress like photographs: smooth gradients with film grain."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(count)
    y, x = np.mgrid[0:size, 0:size] / size
    for n in range(count):
        smooth = 128 + 90 * np.sin(x * rng.uniform(2, 9) + y * rng.uniform(2, 9) + n)
        grain = rng.normal(0, 6, (size, size, 3))
        Image.fromarray(np.clip(smooth[..., None] + grain, 0, 255).astype(np.uint8)).save(folder / f"{n:05d}.png")
    return folder


def _linked(folder: Path, images: Path, count: int) -> Path:
    if not folder.exists():
        folder.mkdir()
        for path in sorted(images.iterdir())[:count]:
            os.link(path, folder / path.name)
    return folder


def _options(
    store: Path, images: Path, model: Path, features: Sequence[str], actors: int, *, threads: int = 1, batch: int = 8
) -> list[str]:
    chosen = [word for feature in features for word in ("--feature", feature)]
    return [
        "--images",
        str(images),
        "--store",
        str(store),
        "--backbone",
        str(model),
        *chosen,
        "--actors",
        str(actors),
        "--threads",
        str(threads),
        "--batch-size",
        str(batch),
        "--device",
        "cpu",
        "--json",
    ]


def _extract(
    root: Path,
    images: Path,
    model: Path,
    features: Sequence[str],
    *,
    actors: int = 1,
    threads: int = 1,
    batch: int = 8,
    extra: Sequence[str] = (),
    watched: bool = True,
) -> dict:
    """One run into a store that is dropped again: its summary, and ``peak``, the memory of all its processes.

    Not ``watched`` where speed is measured: reading the memory of every process takes a tenth of a core.
    """
    with tempfile.TemporaryDirectory(prefix="store-", dir=root) as store:
        options = _options(Path(store), images, model, features, actors, threads=threads, batch=batch)
        process = _start(["extract", *options, *extra])
        with _watched(process) if watched else contextlib.nullcontext([0]) as peak:
            out, err = process.communicate(timeout=900)
        if process.returncode:
            raise RuntimeError(err)
        return json.loads(out.splitlines()[-1]) | {"peak": peak[0]}


def _bare(model: Path, images: Path, *, processes: int) -> float:
    """Images a second of loops that do nothing but call the model on batches that are ready in memory."""
    program = f"""
import sys, time, torch
from pathlib import Path
from brainenc.extract.backbone import load_backbone
from brainenc.extract.features import Feature
from brainenc.extract.images import open_image
torch.set_num_threads(1)
backbone, features = load_backbone({str(model)!r}), [Feature("11", "q")]
files = sorted(Path({str(images)!r}).iterdir())[{"int(sys.argv[1])::" + str(processes)}]
pixels = [backbone.preprocess(open_image(f)) for f in files]
batches = [torch.stack(pixels[n:n + 8]) for n in range(0, len(pixels), 8)]
del pixels
print("ready", flush=True)
sys.stdin.readline()
begun = time.perf_counter()
with torch.inference_mode():
    for batch in batches:
        backbone.forward(batch, features)
print(len(files), time.perf_counter() - begun, flush=True)
"""
    loops = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(n)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environ(),
        )
        for n in range(processes)
    ]
    for loop in loops:
        assert loop.stdout.readline().strip() == "ready"
    for loop in loops:
        loop.stdin.write("go\n")
        loop.stdin.flush()
    results = [loop.communicate()[0].split() for loop in loops]
    return sum(int(count) for count, _ in results) / max(float(seconds) for _, seconds in results)


def _brainenc(arguments: Sequence[str]) -> str:
    process = _start(arguments)
    out, err = process.communicate(timeout=900)
    if process.returncode:
        raise RuntimeError(err)
    return out


def _start(arguments: Sequence[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", "from brainenc.cli.main import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environ(),
    )


def _environ() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")} | {
        "OMP_NUM_THREADS": "1"
    }


@contextlib.contextmanager
def _watched(process: subprocess.Popen, every_s: float = 0.3) -> Iterator[list[int]]:
    """The largest sum of memory over a process and all its descendants, in bytes."""
    peak = [0]
    end = threading.Event()

    def watch() -> None:
        while not end.wait(every_s):
            peak[0] = max(peak[0], family_bytes(process.pid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        end.set()
        thread.join()


def family_bytes(pid: int) -> int:
    """Proportional anonymous and shared memory of a process and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return sum(_own_bytes(p.pid) for p in [parent, *parent.children(recursive=True)])
    return 0


def _own_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    fields = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return 1024 * (fields.get("Pss_Anon", 0) + fields.get("Pss_Shmem", 0))
