"""Turns what the driver found into a plan: disk, memory and time, checked before anything starts. No Ray."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from brainenc.addresses import resolve
from brainenc.extract.config import ExtractConfig
from brainenc.extract.plan import ExtractPlan, bytes_at_once, collection_plans
from brainenc.extract.prepare import Survey, survey
from brainenc.extract.site import site_of
from brainenc.featurestore.places import local_path
from brainenc.featurestore.places.mount import needs_staging
from brainenc.featurestore.places.scratch import cache_root
from brainenc.guard.probe import Probe, space
from brainenc.redact import redact

RAY_START_S = 6.0
"""Starting a local Ray and Ray Data's first task, on two cores."""
RAY_WORKER_BYTES = 100 << 20
"""Ray and Ray Data in a worker's process, which the process that is measured does not load."""
_SAMPLE = 64
"""Images that are timed, again and again: enough to be typical, few enough to stay in the page cache."""


def plan_of(found: Survey) -> ExtractPlan:
    """What is left to do and whether it fits on the disks; nothing is timed."""
    collections = collection_plans(found.wanted, found.existing)
    folder = local_path(found.config.store)
    room = space(folder.absolute()) if folder else None
    tasks = found.tasks
    staging = _staging(bytes_at_once(tasks, found.wanted, found.actors), found.config)
    return ExtractPlan(
        store=redact(found.config.store), collections=collections, images_left=sum(t.n_rows for t in tasks),
        disk_needed_bytes=sum(c.bytes_left for c in collections), disk_free_bytes=room.free if room else None,
        actors=found.actors, micro_batch=max(w.micro_batch for w in found.wanted), device=found.device,
        memory_limit_bytes=Probe().ram().limit, **staging,
    )  # fmt: skip


def _is_staged(config: ExtractConfig) -> bool:
    """Whether shards are written to a local disk first, and handed over from there."""
    if config.node_store is not None:  # they are made on the nodes' own disks, where they wait for the end
        return False
    folder = local_path(config.store)
    return folder is None or (needs_staging(folder) if config.stage is None else config.stage)


def _staging(needed: int, config: ExtractConfig) -> dict[str, Any]:
    """The plan's fields about the local disk."""
    if not _is_staged(config):
        return {}
    folder = cache_root()
    elsewhere = resolve(config.address, command="extract") is not None
    room = None if elsewhere else space(folder.absolute())
    return {
        "staging": str(folder), "staging_needed_bytes": needed, "staging_free_bytes": room.free if room else None,
    }  # fmt: skip


def estimate(config: ExtractConfig, *, timed: bool = True) -> ExtractPlan:
    """The whole plan; with ``timed`` also time and memory, from a few batches done in processes of their own.

    Raises:
        As :func:`~brainenc.extract.prepare.survey`.
    """
    started = time.perf_counter()
    with site_of(config) as site:
        found = survey(config, site=site)
        surveyed_s = time.perf_counter() - started
        plan = plan_of(found)
        if resolve(config.address, command="plan") is not None:
            plan = replace(plan, memory_limit_bytes=None)  # of this machine, on which nothing will be computed
        tasks = found.tasks
        if not timed or not tasks:
            return plan
        first = tasks[0]
        keys = {key for _, key in first.features}
        measured = site().measure(
            found.job, [w for w in found.wanted if w.key in keys], first.uris[:_SAMPLE], found.actors
        )  # fmt: skip
    return replace(
        plan, actor_memory_bytes=measured.peak_bytes + RAY_WORKER_BYTES, seconds_per_image=measured.seconds_per_image,
        startup_s=surveyed_s + RAY_START_S + measured.startup_s,
    )  # fmt: skip
