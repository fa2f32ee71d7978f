"""Who would act first: the guard, Ray's memory monitor, or the kernel? Checked before a run starts. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from brainenc.guard.policy import Thresholds
from brainenc.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What else on this machine acts on memory. Bytes and fractions."""

    limit: int
    """Memory that this process may use."""
    ray_threshold: float | None = 0.95
    """Fraction of the node at which Ray's monitor kills; None: it is switched off, or there is no Ray."""
    object_store: int = 0
    """Size of Ray's object store: it lies in shared memory and counts as used once it was filled."""
    shm: int = 0
    """Size of ``/dev/shm``."""
    state_bytes: int = 0
    """Of a checkpoint; 0 when not known."""


def conflicts(thresholds: Thresholds, around: Surroundings) -> list[str]:
    """A sentence for everything that would keep the guard from acting first, and what to do."""
    found = list(thresholds.doubts())
    ray = around.ray_threshold
    if ray is not None and ray <= thresholds.ram_critical:
        found.append(
            f"Ray's memory monitor kills workers at {ray:.0%}, the guard acts at {thresholds.ram_critical:.0%}: Ray "
            "would be first, and kills helper actors before the worker that leaks. Lower --ram, or set "
            "RAY_memory_usage_threshold higher (or RAY_memory_monitor_refresh_ms=0) before Ray starts."
        )
    elif ray is not None and around.limit and (ray - thresholds.ram_critical) * around.limit < around.state_bytes:
        found.append(
            f"Between the guard's {thresholds.ram_critical:.0%} and Ray's {ray:.0%} lie "
            f"{format_bytes((ray - thresholds.ram_critical) * around.limit)}, less than the training state "
            f"({format_bytes(around.state_bytes)}): a leak may reach Ray's limit while the "
            "checkpoint is written. Lower --ram."
        )
    if around.limit and around.object_store > 0.3 * around.limit:
        found.append(
            f"Ray's object store may grow to {format_bytes(around.object_store)} of {format_bytes(around.limit)}: it "
            "counts as used memory and is not given back. Start Ray with a smaller --object-store-memory."
        )
    if around.shm and around.object_store > around.shm:
        found.append(
            f"Ray's object store ({format_bytes(around.object_store)}) does not fit into /dev/shm "
            f"({format_bytes(around.shm)}): it goes to disk and gets slow. In Docker, raise --shm-size."
        )
    return found
