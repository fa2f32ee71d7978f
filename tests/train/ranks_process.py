"""One rank as a process of its own, with real gloo between ranks; started by the tests.

Arguments: rank, size, rendezvous file, and a JSON file with one configuration for each run.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from brainenc.guard.messages import NullGuard
from brainenc.train.config import TrainConfig
from brainenc.train.drills import Drills, Planned
from brainenc.train.inputs import StoredViews
from brainenc.train.orders import FolderOrders, Hearing
from brainenc.train.run_folder import RunFolder
from brainenc.train.team import Distributed
from brainenc.train.worker import Surroundings, work


def main(rank: int, size: int, rendezvous: str, runs: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    for given in json.loads(runs.read_text()):
        config = TrainConfig.from_dict(given)
        folder = RunFolder(config.out)
        guard = Hearing(NullGuard(), [FolderOrders(folder)] if rank == 0 else [])
        drills = Drills(
            [Planned.parse(d) for d in config.drill],
            marks=folder.drill_marks,
            guard=guard,
            driver_pid=0,
            driver_host="",
        )
        around = Surroundings(
            team=Distributed(timeout_s=30, local_rank=rank), device=torch.device("cpu"), open_views=StoredViews(config),
            guard=guard, drill=drills, threads=1,
        )  # fmt: skip
        outcome = work(config, around)
        print(outcome.status, outcome.position.step, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
