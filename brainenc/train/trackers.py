"""Where figures of a run go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases by wish. Rank 0 only.

Training never fails because a figure could not be written, on a full disk or without a network: that is told once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from brainenc.endurance import Endurance
from brainenc.errors import UnknownName, UsageError
from brainenc.records import JsonLines

TRACKERS = ("tensorboard", "wandb")


class Tracker(Protocol):
    """All that a place for figures has to do."""

    def record(self, fields: Mapping[str, Any]) -> None:
        """One object: ``epoch, step, split`` and figures."""
        ...

    def close(self) -> None:
        """Flush."""
        ...


class JsonTracker:
    """``metrics.jsonl``."""

    def __init__(self, path: Path, run: int) -> None:
        self._lines, self._run = JsonLines(path), run

    def record(self, fields: Mapping[str, Any]) -> None:
        """Append one line."""
        self._lines.write(run=self._run, **fields)

    def close(self) -> None:
        """Flush to disk."""
        self._lines.close()


class TensorBoard:
    """Event files in ``RUN/tensorboard``; needs the ``tensorboard`` package, not the program."""

    def __init__(self, folder: Path) -> None:
        writer = _need("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"))

    def record(self, fields: Mapping[str, Any]) -> None:
        """Each number as a scalar ``<split>/<name>`` at the step."""
        for name, value in _figures(fields).items():
            self._writer.add_scalar(f"{fields['split']}/{name}", value, fields["step"])

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class WeightsAndBiases:
    """A run of project ``brainenc``; ``WANDB_MODE=offline`` keeps it on disk, in ``RUN/wandb``."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        # One id for one folder: a resumed run goes on in the same curves.
        self._run = _need("wandb", "wandb").init(
            project="brainenc", dir=str(folder), name=folder.name, id=folder.name, resume="allow", config=dict(config)
        )

    def record(self, fields: Mapping[str, Any]) -> None:
        """Each number as ``<split>/<name>`` at the step."""
        self._run.log({f"{fields['split']}/{k}": v for k, v in _figures(fields).items()}, step=fields["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class All:
    """Several trackers as one, by name. What fails in one of them is told, and the others have it all the same."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = trackers
        self._endurance = Endurance("Training")

    def record(self, fields: Mapping[str, Any]) -> None:
        """To each."""
        for name, tracker in self._trackers.items():
            with self._endurance.doing(f"writing figures to {name}"):
                tracker.record(fields)

    def close(self) -> None:
        """Each."""
        for name, tracker in self._trackers.items():
            with self._endurance.doing(f"closing {name}"):
                tracker.close()


def open_trackers(names: Sequence[str], folder: Path, *, run: int, config: Mapping[str, Any]) -> Tracker:
    """``metrics.jsonl`` and the named ones.

    Raises:
        UnknownName: no such tracker.
        UsageError: its package is not installed.
    """
    made: dict[str, Tracker] = {str(folder / "metrics.jsonl"): JsonTracker(folder / "metrics.jsonl", run)}
    for name in names:
        if name == "tensorboard":
            made[name] = TensorBoard(folder)
        elif name == "wandb":
            made[name] = WeightsAndBiases(folder, config)
        else:
            raise UnknownName("tracker", name, TRACKERS)
    return All(made)


def _figures(fields: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in fields.items() if k not in ("step", "split", "run") and isinstance(v, int | float)}


def _need(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(
            f"The {package} tracker needs the package {package}: pip install 'brainenc[tracking]'."
        ) from error
