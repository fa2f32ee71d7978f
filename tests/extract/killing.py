"""Runs ``brainenc extract`` as users do, and kills every process of it at a chosen moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil


def start(arguments: Sequence[str], *, log: Path) -> subprocess.Popen:
    """``brainenc ARGUMENTS`` in a session of its own, with its output in a file."""
    environ = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")}
    program = "from brainenc.cli.main import main; main()"
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdout=file, stderr=file, env=environ, start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen, *, log: Path, timeout: float = 180) -> dict:
    """Wait for a run that prints ``--json``; its summary."""
    code = process.wait(timeout)
    text = log.read_text()
    assert code == 0, text
    return json.loads(text.strip().splitlines()[-1])


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The driver and everything that it started, Ray's own processes and workers included."""
    with contextlib.suppress(psutil.NoSuchProcess):
        driver = psutil.Process(process.pid)
        return [driver, *driver.children(recursive=True)]
    return []


def kill(victims: Sequence[psutil.Process]) -> None:
    """SIGKILL, all at once."""
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    psutil.wait_procs(victims, timeout=30)


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that hold a model."""
    return [p for p in family(process) if _name(p).startswith("ray::MapWorker")]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, *, timeout: float = 120) -> bool:
    """Wait until it is so; False if the run ended before."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    raise TimeoutError("it never came to be")


def receipts(store: Path) -> dict[str, tuple[int, int]]:
    """Sealed shards: receipt -> (inode, mtime) of the shard's file, which change if it is written again."""
    found = {}
    for receipt in store.rglob("shard-*.json"):
        shard = receipt.with_suffix(".arrow")
        if shard.exists():
            stat = shard.stat()
            found[str(receipt.relative_to(store))] = (stat.st_ino, stat.st_mtime_ns)
    return found


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
