"""What the guard has written down about a run, or about the extractions into a store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brainenc.extract.guard_record import guard_folder
from brainenc.guard.history import History, read_history


def history_of(run_or_store: str) -> History:
    """The record of a run folder; of a store, that of the extractions into it from this machine.

    Raises:
        UsageError: there is neither.
    """
    is_run = any((Path(run_or_store) / name).exists() for name in ("guard.jsonl", "metrics.jsonl"))
    extractions = guard_folder(run_or_store)
    if not is_run and (extractions / "guard.jsonl").exists():
        return read_history(extractions)
    return read_history(run_or_store)


def state_of(worker: Mapping[str, Any]) -> str:
    """A worker's last word: its level, and how it left."""
    if worker["leaving"] == "ended":  # it had no time for a farewell of its own
        return f"{worker['level']} (ended)"
    return str(worker["leaving"] or worker["level"])
