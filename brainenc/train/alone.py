"""A run of one rank in this process, without Ray; and what every driver does about drills."""

from __future__ import annotations

import os
import socket

from brainenc.guard import signals
from brainenc.guard.messages import StepGuard
from brainenc.train.config import TrainConfig
from brainenc.train.drills import Drills, Planned
from brainenc.train.fitting import Outcome
from brainenc.train.follow import Note, Progress, following_guard
from brainenc.train.inputs import OpenViews
from brainenc.train.orders import FolderOrders, Hearing, SignalOrders
from brainenc.train.run_folder import RunFolder


def train_alone(config: TrainConfig, views: OpenViews, progress: Progress, note: Note) -> Outcome:
    """One rank in this process, no Ray."""
    import torch

    from brainenc.train import guarding
    from brainenc.train.team import Solo
    from brainenc.train.worker import Relief, Surroundings, work

    wanted = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    folder, relief = RunFolder(config.out), Relief()
    with guarding.alone(config, gpu=wanted.startswith("cuda"), relief=relief) as (guard, record_stop):
        asked = SignalOrders(record_stop)
        around = Surroundings(
            team=Solo(), device=torch.device(wanted), open_views=views, on_record=progress, on_note=note, relief=relief,
            guard=Hearing(guard, [asked, FolderOrders(folder)]), threads=config.threads,
            drill=make_drills(config, guard, os.getpid(), socket.gethostname()),
        )  # fmt: skip
        with signals.asked_to_stop(asked.ask), following_guard(folder, note):
            return work(config, around)


def make_drills(config: TrainConfig, guard: StepGuard, driver_pid: int, driver_host: str) -> Drills:
    """The faults that this rank was promised."""
    planned = [Planned.parse(text) for text in config.drill]
    marks = RunFolder(config.out).drill_marks
    return Drills(planned, marks=marks, guard=guard, driver_pid=driver_pid, driver_host=driver_host)
