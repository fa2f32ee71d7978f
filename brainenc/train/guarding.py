"""How a run is guarded: its thresholds from the configuration, the guard of a run without Ray, and what is printed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from brainenc.errors import UsageError
from brainenc.guard import banner
from brainenc.guard.messages import NullGuard, StepGuard
from brainenc.guard.office import LocalLink, Office
from brainenc.guard.policy import PolicyConfig, Thresholds
from brainenc.guard.probe import take_reading
from brainenc.guard.worker import WorkerGuard, WorkerGuardConfig
from brainenc.train.config import TrainConfig
from brainenc.train.elsewhere import resume_command

_FIELDS = ("enabled", "ram", "gpu", "on_critical", "dwell_s")


def is_guarded(config: TrainConfig) -> bool:
    """Whether the run has a guard."""
    return bool(config.guard.get("enabled", True))


def on_critical(config: TrainConfig) -> Literal["stop", "shrink"]:
    """``shrink`` and go on, where that can be done; or ``stop``."""
    return "stop" if config.guard.get("on_critical") == "stop" else "shrink"


def thresholds(given: Mapping[str, Any]) -> Thresholds:
    """Thresholds of a run.

    Raises:
        UsageError: unknown names, or numbers that are no thresholds.
    """
    if unknown := sorted(set(given) - set(_FIELDS)):
        raise UsageError(f"The guard has no setting {', '.join(unknown)}. There is: {', '.join(_FIELDS)}.")
    default = Thresholds()
    ram = given.get("ram") or default.pair("ram")
    gpu = given.get("gpu") or default.pair("gpu")
    return Thresholds(ram_warn=ram[0], ram_critical=ram[1], gpu_warn=gpu[0], gpu_critical=gpu[1])


def worker_config(config: TrainConfig) -> WorkerGuardConfig:
    """How each worker is guarded."""
    policy = PolicyConfig(
        thresholds=thresholds(config.guard), dwell_s=float(config.guard.get("dwell_s", PolicyConfig().dwell_s))
    )
    return WorkerGuardConfig(policy=policy, on_critical=on_critical(config))


@contextmanager
def alone(
    config: TrainConfig, *, gpu: bool, relief: Callable[[], None]
) -> Iterator[tuple[StepGuard, Callable[[str], None]]]:
    """The guard of a run in one process: guard, and what records an order to stop that came by a signal."""
    if not is_guarded(config):
        yield NullGuard(), lambda reason: None
        return
    office = Office(config.out, resume=resume_command(config.out))
    extra: dict[str, Any] = {}
    if gpu:
        from brainenc.guard import pytorch

        extra = {"uuids": pytorch.gpu_uuids(), "slack": pytorch.gpu_slack}
    try:
        with WorkerGuard("rank0", worker_config(config), LocalLink(office), relief=(relief,), **extra) as guard:
            yield guard, lambda reason: _trip(office, reason)
    finally:
        office.close()


def _trip(office: Office, reason: str) -> None:
    office.trip("stop", reason)


def start_banner(settings: Mapping[str, Any]) -> str:
    """The machine as it is, and what the guard will do with these settings."""
    marks = banner.symbols(sys.stderr.encoding)
    action = {
        "stop": ["Save an emergency checkpoint (emergency_epoch<E>_step<S>)", "Exit safely with code 75, resumable"],
        "shrink": [
            "Save an emergency checkpoint (emergency_epoch<E>_step<S>)",
            "Halve the micro-batch and go on; still critical after that: stop with code 75, resumable",
        ],
    }["stop" if settings.get("on_critical") == "stop" else "shrink"]
    started = banner.start(thresholds(settings), every=1, eval_every=1, on_emergency=action, marks=marks)
    return f"{banner.resources(take_reading())}\n{started}"


def emergency_block(*, reason: str, epoch: int, step: int, saved: str, seconds: float, n_bytes: int) -> str:
    """What happened and where the checkpoint lies."""
    return banner.emergency(
        reason=reason, epoch=epoch, step=step, saved=saved, seconds=seconds, n_bytes=n_bytes, failures=(),
        marks=banner.symbols(sys.stderr.encoding),
    )  # fmt: skip
