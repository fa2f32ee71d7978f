"""Turns what the driver found into a plan: disk, memory and time, checked before anything starts. No Ray."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from brainenc.extract.config import ExtractConfig
from brainenc.extract.measure import measure
from brainenc.extract.plan import ExtractPlan, collection_plans
from brainenc.extract.prepare import Survey, survey
from brainenc.extract.reading import is_url
from brainenc.guard.probe import Probe, space

RAY_START_S = 6.0
"""Starting a local Ray and Ray Data's first task, on two cores."""
RAY_WORKER_BYTES = 100 << 20
"""Ray and Ray Data in a worker's process, which the process that is measured does not load."""
_SAMPLE = 64
"""Images that are timed, again and again: enough to be typical, few enough to stay in the page cache."""


def plan_of(found: Survey) -> ExtractPlan:
    """What is left to do and whether it fits on the disk; nothing is timed."""
    collections = collection_plans(found.wanted, found.existing)
    room = None if is_url(found.config.store) else space(Path(found.config.store).absolute())
    return ExtractPlan(
        store=found.config.store, collections=collections, images_left=sum(t.n_rows for t in found.tasks),
        disk_needed_bytes=sum(c.bytes_left for c in collections), disk_free_bytes=room.free if room else None,
        actors=found.actors, micro_batch=max(w.micro_batch for w in found.wanted), device=found.device,
        memory_limit_bytes=Probe().ram().limit,
    )  # fmt: skip


def estimate(config: ExtractConfig, *, timed: bool = True) -> ExtractPlan:
    """The whole plan; with ``timed`` also time and memory, from a few batches done in processes of their own.

    Raises:
        As :func:`~brainenc.extract.prepare.survey`.
    """
    started = time.perf_counter()
    found = survey(config)
    surveyed_s = time.perf_counter() - started
    plan = plan_of(found)
    tasks = found.tasks
    if not timed or not tasks:
        return plan
    first = tasks[0]
    keys = {key for _, key in first.features}
    measured = measure(
        found.job, [w for w in found.wanted if w.key in keys], first.uris[:_SAMPLE], processes=found.actors
    )  # fmt: skip
    return replace(
        plan, actor_memory_bytes=measured.peak_bytes + RAY_WORKER_BYTES, seconds_per_image=measured.seconds_per_image,
        startup_s=surveyed_s + RAY_START_S + measured.startup_s,
    )  # fmt: skip
