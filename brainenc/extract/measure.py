"""Measures in processes of their own what a worker takes: seconds an image, memory, the batch size that pays.

What is measured is a real worker's work, decoding and writing included, on the first images of the set; its shards go
to a scratch store. A fresh process each time, because memory is what a fresh process has when it peaks.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context

from brainenc import allocator
from brainenc.errors import ExtractionFailed
from brainenc.extract.config import ExtractJob
from brainenc.extract.outcome import ShardOutcome
from brainenc.extract.plan import ShardTask, Wanted, outstanding
from brainenc.featurestore.stimuli import Stimulus, StimulusSet
from brainenc.featurestore.store import open_store
from brainenc.guard.probe import Probe, anonymous_bytes
from brainenc.out_of_memory import is_out_of_memory

TIMED_S = 5.0
"""Timed long enough that a scheduler's whims average out."""
MOST_SHARDS = 24
_SHARD_BATCHES = 4
_SCRATCH = "measured"
_LARGEST_BATCH = 256
_GAIN = 0.95
"""A batch twice as large must cut the time of an image to this share, or it is not worth its memory."""
_SHARE_OF_LIMIT = 0.6
"""Of the memory limit; the rest is for Ray, the driver and everybody else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one worker takes."""

    seconds_per_image: float
    startup_s: float
    """From the start of its process to its first batch."""
    loaded_bytes: int
    """Anonymous memory with the model loaded."""
    peak_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One micro-batch size, tried."""

    size: int
    seconds_per_image: float
    peak_bytes: int


def measure(job: ExtractJob, wanted: Sequence[Wanted], uris: Sequence[str], *, processes: int = 1) -> Measured:
    """Time a worker at this work, beside ``processes - 1`` others, as they will be. Driver; blocks for some seconds.

    Args:
        job: what workers are told.
        wanted: collections of one stimulus set.
        uris: some of its images, done again and again.
        processes: how many actors there will be.

    Raises:
        ExtractionFailed: a shard failed, with what it failed with.
    """
    with _fresh_processes(processes) as pool:
        work = [pool.submit(_work, job, tuple(wanted), tuple(uris), time.time()) for _ in range(processes)]
        found = [future.result() for future in work]
    return Measured(
        seconds_per_image=sum(m.seconds_per_image for m in found) / len(found) / processes,
        startup_s=max(m.startup_s for m in found),
        loaded_bytes=max(m.loaded_bytes for m in found),
        peak_bytes=max(m.peak_bytes for m in found),
    )


def settle_micro_batch(job: ExtractJob, image_shape: tuple[int, int], features: Sequence[str]) -> int:
    """The micro-batch from which doubling pays no more, or no longer fits; for ``--batch-size auto``."""
    with _fresh_processes(1) as pool:
        trials = pool.submit(_try_batches, job, image_shape, tuple(features)).result()
    return choose_trial(trials, int(_SHARE_OF_LIMIT * Probe().ram().limit)).size


def choose_trial(trials: Sequence[Trial], memory_bytes: int) -> Trial:
    """The best of sizes that were tried in rising order.

    Raises:
        ExtractionFailed: not even one image fits.
    """
    if not trials:
        raise ExtractionFailed("Not even one image fits into memory. Take a smaller backbone or --image-size.")
    best = trials[0]
    for trial in trials[1:]:
        if trial.peak_bytes > memory_bytes or trial.seconds_per_image > _GAIN * best.seconds_per_image:
            break
        best = trial
    return best


@contextmanager
def _fresh_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    with _environment(MALLOC_ARENA_MAX="1"), ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        yield pool


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """What children find in their environment, unless somebody chose otherwise: here what workers of Ray find."""
    ours = {name: text for name, text in variables.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _work(job: ExtractJob, wanted: tuple[Wanted, ...], uris: tuple[str, ...], started: float) -> Measured:
    """In a process of its own: extract shard after shard into a scratch store until enough time has passed."""
    if job.device == "cpu":
        allocator.keep_freed_memory()  # as the worker will
    from brainenc.extract.extractor import Extractor

    with tempfile.TemporaryDirectory(prefix="be-measure-") as scratch, _peak() as peak:
        job, tasks = _scratch_work(job, wanted, uris, scratch)
        extractor = Extractor(job)
        loaded, startup = anonymous_bytes(os.getpid()), time.time() - started
        _images(extractor.extract(tasks[0]))  # memory pools, code paths and page caches warm up here
        begun, images, seconds = time.perf_counter(), 0, 0.0
        for task in tasks[1:]:
            images += _images(extractor.extract(task))
            seconds = time.perf_counter() - begun
            if seconds > TIMED_S:
                break
        extractor.close()
        return Measured(
            seconds_per_image=seconds / max(1, images), startup_s=startup, loaded_bytes=loaded, peak_bytes=peak()
        )


def _scratch_work(
    job: ExtractJob, wanted: tuple[Wanted, ...], uris: tuple[str, ...], scratch: str
) -> tuple[ExtractJob, list[ShardTask]]:
    """The same features of the same images, many times over, in a store of their own."""
    rows = _SHARD_BATCHES * wanted[0].micro_batch
    total = rows * MOST_SHARDS
    store = open_store(scratch, create=True)
    store.add_stimuli(StimulusSet(_SCRATCH, (Stimulus(f"{n:06d}", uris[n % len(uris)]) for n in range(total))))
    here = [
        replace(
            w, stimuli=_SCRATCH, key=f"{_SCRATCH}/b/{w.feature}", n_rows=total, rows_per_shard=rows, sealed=frozenset()
        )
        for w in wanted
    ]
    for w in here:
        store.create_collection(w.key, identity={}, rows_per_shard=rows, row_shape=w.row_shape, dtype=job.dtype)
    shape = job.image_shapes[wanted[0].stimuli]
    job = replace(job, store=scratch, stage=None, guard=False, on_bad_image="null", image_shapes={_SCRATCH: shape})
    files = [uris[n % len(uris)] for n in range(total)]
    return job, [replace(task, uris=tuple(files[task.start : task.stop])) for task in outstanding(here)]


def _images(outcome: ShardOutcome) -> int:
    if outcome.error is not None:
        raise outcome.error
    return outcome.rows


def _try_batches(job: ExtractJob, image_shape: tuple[int, int], features: tuple[str, ...]) -> list[Trial]:
    """In a process of its own: forward passes of 1, 2, 4 ... images until memory runs out or it pays no more."""
    import torch

    from brainenc.extract.extractor import load_for
    from brainenc.extract.features import Feature

    torch.set_num_threads(job.threads)
    backbone, wanted = load_for(job), [Feature.parse(f) for f in features]
    trials: list[Trial] = []
    size = 1
    while size <= _LARGEST_BATCH:
        with _peak() as peak:
            try:
                seconds = _time_pass(lambda n=size: backbone.forward(torch.zeros(n, 3, *image_shape), wanted))  # type: ignore[misc]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                break
        trials.append(Trial(size=size, seconds_per_image=seconds / size, peak_bytes=peak()))
        if len(trials) > 1 and trials[-1].seconds_per_image > _GAIN * trials[-2].seconds_per_image:
            break
        size *= 2
    return trials


def _time_pass(run: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of some passes; the device is waited for."""
    import torch

    fastest = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - begun)
    return fastest


@contextmanager
def _peak(every_s: float = 0.01) -> Iterator[Callable[[], int]]:
    """Samples this process's anonymous memory; call what it gives for the largest seen."""
    seen = [anonymous_bytes(os.getpid())]
    end = threading.Event()

    def sample() -> None:
        while not end.wait(every_s):
            seen[0] = max(seen[0], anonymous_bytes(os.getpid()))

    thread = threading.Thread(target=sample, name="peak", daemon=True)
    thread.start()
    try:
        yield lambda: seen[0]
    finally:
        end.set()
        thread.join()
