"""Turns what the driver found into a plan: disk, memory and time, checked before anything starts. No Ray."""

from __future__ import annotations

from pathlib import Path

from brainenc.extract.plan import ExtractPlan, collection_plans
from brainenc.extract.prepare import Survey
from brainenc.extract.reading import is_url
from brainenc.guard.probe import Probe, space


def plan_of(found: Survey) -> ExtractPlan:
    """What is left to do and whether it fits; nothing is timed."""
    collections = collection_plans(found.wanted, found.existing)
    room = None if is_url(found.config.store) else space(Path(found.config.store).absolute())
    return ExtractPlan(
        store=found.config.store, collections=collections, images_left=sum(t.n_rows for t in found.tasks),
        disk_needed_bytes=sum(c.bytes_left for c in collections), disk_free_bytes=room.free if room else None,
        actors=found.actors, micro_batch=max(w.micro_batch for w in found.wanted), device=found.device,
        memory_limit_bytes=Probe().ram().limit,
    )  # fmt: skip
