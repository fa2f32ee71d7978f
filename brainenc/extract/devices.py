"""The device a worker computes on: what there is, what it is called, when it is out of memory. Worker and driver.

torch is imported where it is needed: a repeat that finds nothing to do gets by without it.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
from pathlib import Path
from typing import Any

from brainenc import allocator

_LIBRARIES = ("transformers", "open_clip_torch", "timm", "torchvision", "pillow", "numpy")


def device_fraction(device: str) -> float | None:
    """Share of the GPU's memory that is used, by whomever; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    free, total = torch.cuda.mem_get_info()
    return 1 - free / total


def gpu_count() -> int:
    """CUDA devices that torch sees on this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_name(device: str) -> str:
    """What receipts call it: ``cpu``, or the GPU's model, because equal bytes are promised per kind of device."""
    import torch

    return str(torch.cuda.get_device_name(device)) if device.startswith("cuda") else "cpu"


def environment(device: str, threads: int, micro_batch: int) -> dict[str, Any]:
    """What a shard was computed with, for its receipt. Neither clock nor host: equal work leaves equal receipts."""
    import torch

    versions = {name: library_version(name) for name in _LIBRARIES}
    return {
        "device": device_name(device),
        "threads": threads,
        "micro_batch": micro_batch,
        "brainenc": library_version("brainenc"),
        "torch": torch.__version__,
        **{name: version for name, version in versions.items() if version},
    }


def release_memory(device: str) -> None:
    """Give back what a failed pass left; only under pressure, because freeing and asking again costs time."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    else:
        allocator.give_back()


def usable_cores() -> int:
    """Cores that this process may run on: the affinity mask or a control group's quota, whichever is tighter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = _cpu_quota()
    return max(1, min(cores, int(quota))) if quota else cores


def _cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    if (root / "cpu.max").exists():
        limit, period = (root / "cpu.max").read_text().split()[:2]
        return None if limit == "max" else int(limit) / int(period)
    v1 = root / "cpu" / "cpu.cfs_quota_us"
    if v1.exists() and int(v1.read_text()) > 0:
        return int(v1.read_text()) / int(v1.with_name("cpu.cfs_period_us").read_text())
    return None


def library_version(distribution: str) -> str:
    """Of an installed distribution; empty where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
