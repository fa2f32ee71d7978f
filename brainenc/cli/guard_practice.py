"""The small training of ``brainenc guard drill``: run undisturbed, struck, and resumed; the weights are compared.

``python -m brainenc.cli.guard_practice FOLDER FAULT`` is one of those runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EPOCHS, BATCHES, STRIKE_AT = 3, 12, 17


def practise(folder: Path, fault: str, note: Callable[[str], None]) -> dict[str, Any]:
    """Three runs and a comparison.

    Args:
        folder: for the files.
        fault: ``ram``, ``gpu``, ``oom``, ``sigterm``.
        note: takes a line for every stage.

    Returns:
        ``passed``, ``failure`` (a sentence), ``saved`` (the emergency file, under the name that it has in the end),
        ``exit_codes``, ``invented`` (a sentence: what of it was not real beyond the drill; else empty).
    """
    import torch

    from brainenc.guard.probe import take_reading

    report: dict[str, Any] = {"passed": False, "failure": "", "saved": "", "exit_codes": [], "invented": ""}
    if fault == "gpu" and not take_reading().gpus:
        report["invented"] = "its reading was invented, so that the path through a real GPU's memory was not tried."
    stages = (
        ("whole", "none", 0, "undisturbed"),
        ("struck", fault, 75, f"{fault} at step {STRIKE_AT}"),
        ("struck", "none", 0, "resumed"),
    )
    for name, what, wanted, told in stages:
        note(f"{name}: {told} ...")
        done = _run(folder / name, what)
        report["exit_codes"].append(done.returncode)
        if done.returncode != wanted:
            last = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
            return {**report, "failure": f"exit code {done.returncode}, wanted {wanted}: {last}"}
        report["saved"] = next((str(p) for p in sorted((folder / name).glob("emergency_*.pth*"))), "")
    whole, struck = (torch.load(folder / n / "final.pt", weights_only=True) for n in ("whole", "struck"))
    if not all(torch.equal(whole[key], struck[key]) for key in whole):
        return {**report, "failure": "the resumed training ended with other weights than the undisturbed one"}
    return {**report, "passed": True}


def _run(folder: Path, fault: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "brainenc.cli.guard_practice", str(folder), fault]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def train(folder: Path, fault: str) -> None:
    """One run: a small model with dropout on random data, in shuffled order."""
    import torch

    from brainenc.guard import MemoryGuard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = torch.utils.data.TensorDataset(torch.randn(BATCHES * 4, 16))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    step_count = 0
    with MemoryGuard(model=model, optimizer=optimizer, save_dir=folder, reserve="1MiB") as guard:
        guard.resume()
        for _ in guard.epochs(EPOCHS):
            for _, (x,) in guard.batches(loader):
                step_count += 1
                if step_count == STRIKE_AT:
                    _strike(fault, guard)
                loss = model(x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if fault in ("ram", "gpu") and step_count >= STRIKE_AT:
                    signal.pause()  # the watcher's signal comes within a tenth of a second
    torch.save(model.state_dict(), folder / "final.pt")


def _strike(fault: str, guard: Any) -> None:
    import torch

    if fault in ("ram", "gpu"):
        guard.drill({"ram": "ram", "gpu": "gpu0"}[fault], 0.95)
    elif fault == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault == "oom":
        raise torch.OutOfMemoryError("out of memory, as the drill wanted")


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2])
