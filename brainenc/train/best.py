"""Which checkpoint of a run is the best: told by the checkpoints themselves, each of which knows its own score.

``best.json`` only repeats it. A writer that dies between a checkpoint and its pointer, or a pointer that is lost, must
not cost the best weights: a run that goes on, and whoever predicts with a run, looks here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from brainenc.errors import CheckpointUnusable
from brainenc.train import checkpoint
from brainenc.train.checkpoint import Found, Manifest, Position
from brainenc.train.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The whole checkpoint with the highest score."""

    folder: Path
    position: Position
    val_perf: float
    skipped: tuple[str, ...] = ()
    """Why each one with a higher score was passed over."""


def find(folder: RunFolder, run_id: str | None = None) -> Best | None:
    """The checkpoint with the highest score that verifies, the first of equals; None: none has a score.

    Args:
        folder: of the run.
        run_id: pass over checkpoints of another run that was in this place.
    """
    skipped: list[str] = []
    for perf, found, manifest in _ranked(folder, run_id):
        try:
            checkpoint.verify(found.folder)
        except (CheckpointUnusable, OSError) as error:
            skipped.append(str(error))
            continue
        return Best(folder=found.folder, position=manifest.position, val_perf=perf, skipped=tuple(skipped))
    return None


def settle(folder: RunFolder, run_id: str, note: Callable[[str], None]) -> Best | None:
    """Have ``best.json`` point to :func:`find`'s checkpoint; the one rank that writes checkpoints calls it."""
    best, pointed = find(folder, run_id), folder.pointed("best") or {}
    if best is None:
        if pointed:
            note(f"best.json names {pointed.get('checkpoint')}, but no whole checkpoint of this run has a score.")
        return None
    for why in best.skipped:
        note(f"Passed over as the best: {why}")
    if pointed.get("checkpoint") != best.folder.name or pointed.get("val_perf") != best.val_perf:
        was = f"names {pointed.get('checkpoint')} ({pointed.get('val_perf')})" if pointed else "is missing"
        note(f"best.json {was}: the best is {best.folder.name}, val_perf {best.val_perf:.4f}, and it says so again.")
        position = best.position
        folder.point(
            "best", checkpoint=best.folder.name, epoch=position.epoch, step=position.step, val_perf=best.val_perf
        )
    return best


def recorded(folder: RunFolder, run_id: str | None = None) -> float | None:
    """The highest score of a checkpoint that is there, by the manifests alone: cheap, and not verified."""
    return next((perf for perf, _, _ in _ranked(folder, run_id)), None)


def _ranked(folder: RunFolder, run_id: str | None) -> list[tuple[float, Found, Manifest]]:
    """Checkpoints with a score, the best first; of equals the earliest, as training keeps it."""
    pointed = folder.pointed("best") or {}
    ranked = []
    for found in checkpoint.list_checkpoints(folder.checkpoints):
        try:
            manifest = checkpoint.read_manifest(found.folder)
        except (CheckpointUnusable, OSError):
            continue
        perf = manifest.position.val_perf
        if perf is None and pointed.get("checkpoint") == found.folder.name:  # written before checkpoints knew it
            perf = pointed.get("val_perf")
        if isinstance(perf, float | int) and perf == perf and run_id in (None, manifest.config.get("id", "")):
            ranked.append((float(perf), found, manifest))
    return sorted(ranked, key=lambda r: (-r[0], r[1].step, r[1].emergency))
