"""Which Ray cluster a command works on: one that is named, or a small one of its own that is gone afterwards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from brainenc.errors import UsageError

OBJECT_STORE_BYTES = 150_000_000
"""Object store of a local Ray. Features never pass through it, and what it takes of /dev/shm counts as used memory;
Ray's own default would be 30 % of the machine."""


def resolve(address: str | None, *, command: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The cluster to join, or None for a local Ray of this command's own.

    The option wins over ``RAY_ADDRESS`` (which ``ray job submit`` sets for its jobs); ``local`` and ``none`` mean a
    local one even where that is set.

    Args:
        address: ``auto``, ``host:port``, ``local``, ``none`` or None (not given).
        command: what to run on the cluster instead, for the error.

    Raises:
        UsageError: a Ray Client address: local paths and signals would not hold.
    """
    chosen = address or environ.get("RAY_ADDRESS") or None
    if chosen is None or chosen in ("local", "none"):
        return None
    if chosen.startswith("ray://"):
        raise UsageError(
            f"{chosen} is a Ray Client address: the driver would run on this machine, where the cluster's paths do not "
            "hold and signals do not reach its workers. Use `ray job submit`: it runs the same command on the cluster: "
            f"ray job submit --address http://HEAD:8265 -- brainenc {command} ... --address auto"
        )
    if chosen != "auto" and ":" not in chosen:
        raise UsageError(f"--address {chosen!r} is neither auto, local nor host:port (for example 10.0.0.5:6379).")
    return chosen


def init_options(
    address: str | None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    memory_bytes: int | None = None,
    temp_dir: str | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Arguments of ``ray.init`` for what :func:`resolve` answered.

    A local Ray is asked for by name (``local``), so that one which happens to run on this machine is never joined by
    accident; it has no dashboard and a small object store. ``memory_bytes`` is what Ray may hand out, where a cgroup
    allows less than Ray can see.
    """
    common: dict[str, Any] = {"log_to_driver": not quiet, "logging_level": "ERROR" if quiet else "INFO"}
    if address is not None:
        return {"address": address, **common}
    options: dict[str, Any] = {
        "address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES,
        "num_cpus": num_cpus, "num_gpus": num_gpus, "_memory": memory_bytes, "_temp_dir": temp_dir, **common,
    }  # fmt: skip
    return {name: value for name, value in options.items() if value is not None}
