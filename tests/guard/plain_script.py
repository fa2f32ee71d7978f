"""A training script of somebody who has never heard of Ray: run by the tests, with faults of its own.

python plain_script.py FOLDER [--epochs N] [--leak MB_PER_S] [--leak-at STEP] [--thread] [--mode epochs|five] ...
"""

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import torch

from brainenc.guard import MemoryGuard
from brainenc.guard.policy import PolicyConfig

MB = 1 << 20
kept = []


def leak(mb_per_s, piece=8 * MB):
    """Allocate and touch at a rate; 0 is as fast as the machine can."""
    start, done = time.perf_counter(), 0
    while True:
        kept.append(b"\1" * piece)
        done += piece
        if mb_per_s:
            time.sleep(max(0.0, start + done / (mb_per_s * MB) - time.perf_counter()))


class Average:
    """As many keep one: what it hands out is a copy."""

    def __init__(self, n_bytes):
        self.weight = torch.ones(n_bytes // 4)

    def state_dict(self):
        return {"weight": self.weight.clone()}

    def load_state_dict(self, state):
        self.weight = state["weight"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--leak", type=float, default=-1)
    parser.add_argument("--leak-at", type=int, default=-1)
    parser.add_argument("--hold", type=int, default=0)
    parser.add_argument("--thread", action="store_true")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--drill-at", type=int, default=-1)
    parser.add_argument("--fallback", type=Path)
    parser.add_argument("--from-thread", action="store_true")
    parser.add_argument("--average", type=int, default=0, help="bytes of an average whose state is a copy")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kept.append(b"\1" * args.hold)  # before the guard looks: a data set in memory, say
    if args.from_thread:
        outcome = []
        worker = threading.Thread(target=lambda: outcome.append(run(args)))
        worker.start()
        worker.join()
        sys.exit(outcome[0] if outcome else 75)
    run(args)


def run(args):
    model = torch.nn.Sequential(torch.nn.Linear(8, args.width), torch.nn.Dropout(0.1), torch.nn.Linear(args.width, 8))
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 7)
    data = torch.utils.data.TensorDataset(torch.randn(args.batches * 4, 8))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    log = open(args.folder / "log.jsonl", "a")  # noqa: SIM115
    total = 0
    more = {"average": Average(args.average)} if args.average else {}
    with MemoryGuard(
        model=model, optimizer=opt, scheduler=schedule, save_dir=args.folder, policy=PolicyConfig(dwell_s=0.5),
        fallback_dirs=[args.fallback] if args.fallback else [], reserve="4MiB", stateful=more,
    ) as guard:  # fmt: skip
        start = guard.resume()
        for epoch in guard.epochs(args.epochs):
            for step, (x,) in guard.batches(loader):
                print(json.dumps({"epoch": epoch, "step": step, "at": time.monotonic()}), file=log, flush=True)
                if total == args.drill_at:
                    guard.drill("ram", 0.95)
                if total == args.leak_at:
                    if args.thread:
                        threading.Thread(target=leak, args=(args.leak,), daemon=True).start()
                    else:
                        leak(args.leak)
                opt.zero_grad()
                loss = (model(x) ** 2).mean()
                loss.backward()
                opt.step()
                schedule.step()
                time.sleep(args.step_s)
                total += 1
    torch.save(model.state_dict(), args.folder / "final.pt")
    print(json.dumps({"resumed": start.path, "done": True}), file=log, flush=True)


if __name__ == "__main__":
    main()
