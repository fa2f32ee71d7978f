"""The Ray that a run is on: joined or started, and what its nodes hold. Driver."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from brainenc.addresses import init_options, resolve
from brainenc.errors import UsageError
from brainenc.guard import signals
from brainenc.train.config import TrainConfig, Workers


@dataclass(frozen=True, kw_only=True, slots=True)
class RayThere:
    """What the driver has to know of the Ray that it is connected to."""

    gpus: int
    """Of all nodes that are there now."""
    may_grow: bool
    """It is not this run's own: other machines may belong to it, and an autoscaler may bring more."""
    head: str = ""
    """Where its head listens, ``host:port``."""

    @property
    def lost(self) -> bool:
        """Nothing listens there any more. Ray itself waits a minute, and then ends this process."""
        host, _, port = self.head.rpartition(":")
        if not host:
            return False
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except (ConnectionRefusedError, TimeoutError):
            return True
        except OSError as error:  # of others this process may be the cause: no files left, no network
            return error.errno == errno.EHOSTUNREACH
        return False


@contextmanager
def joined(config: TrainConfig, workers: Workers | None) -> Iterator[RayThere]:
    """Ray, joined or started. One that was running in this process already is used and left alone."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if workers is not None and workers.low < workers.high:
        # A lost node counts as there for a while: try with what is left soon.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of Ray's processes, which call us in a thread: arenas of threads hold some megabytes each, and keep nothing large.
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield RayThere(gpus=_gpus_of_ray(), may_grow=True, head=_head())
        return
    address = resolve(config.address, command="train")
    least = workers.high if workers is not None else _gpus_here()
    with signals.keeping():  # it installs one that ends the run on the spot
        ray.init(**init_options(address, num_cpus=max(os.cpu_count() or 1, least)))
    try:
        if address is None:
            yield RayThere(gpus=min(_gpus_of_ray(), _gpus_here()), may_grow=False, head=_head())
        else:  # what torch sees here says nothing about other machines
            yield RayThere(gpus=_gpus_of_ray(), may_grow=True, head=_head())
    finally:
        # How the run ended is known and saved: Ray's own handler would turn a late SIGTERM into a failure.
        with signals.handling(lambda number, frame: None):
            ray.shutdown()


def default_workers(device: str, gpus: int) -> Workers:
    """One for each GPU that there is, where GPUs are to be used; else 1.

    Args:
        device: what was asked for.
        gpus: of this machine, or of all nodes of the cluster that was joined.
    """
    number = max(1, gpus) if _wants_gpu(device, gpus) else 1
    return Workers(low=number, high=number)


def about_gpus(config: TrainConfig, workers: Workers, each: Mapping[str, float], there: RayThere) -> str:
    """What a person should know before waiting, or computing on CPUs; empty where there is nothing to say.

    Raises:
        UsageError: GPUs are asked for that will never be there.
    """
    if "GPU" in each and there.gpus < workers.low:
        if there.may_grow:
            return f"Ray has {there.gpus} GPUs now and {workers.low} are needed: training begins when they have come."
        raise UsageError(
            f"--device {config.device} with --workers {workers} needs {workers.low} GPUs, and this machine has "
            f"{there.gpus} that torch can use; `brainenc doctor` says why. On a cluster, give its --address."
        )
    if config.device == "auto" and there.gpus == 0 and there.may_grow:
        return (
            "Ray has no GPU now, so workers compute on CPUs. Where nodes with GPUs come when they are asked for, ask "
            "for them: --device cuda --workers N."
        )
    return ""


def per_worker(device: str, gpus: int) -> dict[str, float]:
    """What a worker takes of a node."""
    return {"CPU": 1.0, **({"GPU": 1.0} if _wants_gpu(device, gpus) else {})}


def room_without(leaving: Collection[str], workers: Mapping[str, int], each: Mapping[str, float]) -> int:
    """Workers that the nodes which stay can hold: those of this run that are there, and what is free."""
    from ray._private.state import available_resources_per_node

    free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    return sum(
        workers.get(node, 0) + int(min(there.get(name, 0.0) // wanted for name, wanted in each.items()))
        for node, there in free.items()
        if node not in leaving
    )


def _wants_gpu(device: str, gpus: int) -> bool:
    return device.startswith("cuda") if device != "auto" else gpus > 0


def _head() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _gpus_of_ray() -> int:
    import ray

    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(there.get("GPU", 0))


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
