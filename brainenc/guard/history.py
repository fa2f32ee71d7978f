"""What a run's ``guard.jsonl`` and ``metrics.jsonl`` say about it now. Reads files; nothing need run any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brainenc import records
from brainenc.errors import UsageError
from brainenc.guard.incident import whole


@dataclass(kw_only=True, slots=True)
class History:
    """The last word of everybody, and every incident."""

    workers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Worker -> its last reading or warning."""
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """Accounts of the closed ones, one line each."""
    open_order: dict[str, Any] | None = None
    """An order whose incident is not over."""
    progress: dict[str, Any] = field(default_factory=dict)
    """The last training record."""
    best: float | None = None
    """Highest ``val_perf`` so far."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "workers": self.workers, "incidents": self.incidents, "open_order": self.open_order,
            "progress": self.progress, "best_val_perf": self.best,
        }  # fmt: skip


def read_history(run: str | Path) -> History:
    """Read a run folder.

    Raises:
        UsageError: there is no run.
    """
    folder = Path(run)
    found = History()
    paths = [folder / "guard.jsonl", folder / "metrics.jsonl"]
    if not any(path.exists() for path in paths):
        raise UsageError(
            f"{run} is no run folder (it has no guard.jsonl and no metrics.jsonl), and no store that features were "
            "extracted into from this machine. Give what --out was, or --store."
        )
    if paths[0].exists():
        for line in records.read(paths[0]):
            _take(found, line)
    if paths[1].exists():
        for line in records.read(paths[1]):
            if line.get("split") == "train":
                found.progress = line
            elif isinstance(line.get("val_perf"), float):
                found.best = max(line["val_perf"], found.best if found.best is not None else line["val_perf"])
    return found


def _take(found: History, line: Mapping[str, Any]) -> None:
    """One line. What it lacks, or has of another kind, is told as unknown: disks lose, and other tools write."""
    kind, worker = line.get("kind"), _text(line.get("worker"), "?")
    if kind == "coordinator" and line.get("successor") is False:  # a run begins: who took part in earlier ones is gone
        found.open_order, found.workers = None, {}
    elif kind == "closed":
        found.open_order = None
        for told in found.workers.values():
            told["leaving"] = told["leaving"] or "ended"
    elif kind == "silent" and worker in found.workers:
        found.workers[worker]["leaving"] = "silent"
    elif kind in ("reading", "warning"):
        found.workers[worker] = _reading(line)
    elif kind == "order":
        found.open_order = {**line, "do": _text(line.get("do"), "?"), "reason": _text(line.get("reason"), "?")}
    elif kind == "incident":
        incident = whole(line)
        found.open_order = None
        found.incidents = [i for i in found.incidents if i["number"] != incident["number"]] + [incident]


def _reading(line: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's word with all of its fields."""
    numbers = dict(line["numbers"]) if isinstance(line.get("numbers"), Mapping) else {}
    if not isinstance(numbers.get("fraction"), int | float):
        numbers.pop("fraction", None)
    gpus = numbers.get("gpus")
    numbers["gpus"] = [g for g in gpus if _has_fraction(g)] if isinstance(gpus, list) else []
    if not numbers["gpus"]:
        del numbers["gpus"]
    texts = {name: _text(line.get(name), "?") for name in ("node", "level")}
    whole_numbers = {name: _whole_number(line.get(name)) for name in ("epoch", "step")}
    return {**line, **texts, **whole_numbers, "leaving": _text(line.get("leaving"), ""), "numbers": numbers}


def _has_fraction(gpu: Any) -> bool:
    return isinstance(gpu, Mapping) and isinstance(gpu.get("fraction"), int | float)


def _text(value: Any, unknown: str) -> str:
    """For one line of a terminal: without what would steer it."""
    return "".join(c if c.isprintable() else "?" for c in value) if isinstance(value, str) else unknown


def _whole_number(value: Any) -> int:
    return value if isinstance(value, int) else -1
