"""What runs in each of Ray Train's workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from brainenc.guard.messages import NullGuard, StepGuard
from brainenc.train.alone import make_drills
from brainenc.train.config import TrainConfig
from brainenc.train.elsewhere import on_this_node
from brainenc.train.orders import FolderOrders, Hearing
from brainenc.train.run_folder import RunFolder


def run_rank(given: dict[str, Any]) -> Any:
    """The training function of one Ray Train worker; in its training thread."""
    import ray.train
    import ray.train.torch
    import torch

    from brainenc.train.team import Distributed
    from brainenc.train.worker import Relief, Surroundings, work

    config, context, relief = TrainConfig.from_dict(given["config"]), ray.train.get_context(), Relief()
    team = Distributed(timeout_s=config.status_timeout_s, local_rank=context.get_local_rank())
    gpu = torch.cuda.is_available() and config.device != "cpu"
    with (
        on_this_node(given["elsewhere"], sends=context.get_local_rank() == 0) as here,
        _rank_guard(config, given["coordinator"], team.rank, gpu=gpu, relief=relief) as guard,
    ):
        if here is not None:
            config = replace(config, out=str(here), split=str(RunFolder(here).split_file))
        folder = RunFolder(config.out)
        around = Surroundings(
            team=team, device=ray.train.torch.get_device() if gpu else torch.device("cpu"), open_views=given["views"],
            guard=Hearing(guard, [FolderOrders(folder)] if team.rank == 0 else []), relief=relief,
            threads=config.threads or max(1, _cores() // context.get_local_world_size()),
            drill=make_drills(config, guard, *given["driver"]),
        )  # fmt: skip
        return work(config, around)


@contextmanager
def _rank_guard(
    config: TrainConfig, coordinator: Any, rank: int, *, gpu: bool, relief: Callable[[], None]
) -> Iterator[StepGuard]:
    if coordinator is None:
        yield NullGuard()
        return
    from brainenc.guard.actors import worker_guard
    from brainenc.train import guarding

    with worker_guard(
        coordinator, rank, config=guarding.worker_config(config), with_gpu=gpu, relief=(relief,)
    ) as guard:
        yield guard


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
