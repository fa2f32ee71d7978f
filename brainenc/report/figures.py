"""Pictures of a run, drawn by matplotlib where it is installed (``brainenc[report]``)."""

from __future__ import annotations

import importlib.util
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainenc import atomic
from brainenc.datasets.rois import HEMISPHERES, ROI_CLASSES, Hemisphere
from brainenc.errors import DataError, UsageError
from brainenc.report.run_files import RunFiles, best_correlations
from brainenc.scoring import roi_means

ACCURACY = "accuracy_per_roi.png"

_CLASS_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee", "#999999")
"""Paul Tol's bright scheme: told apart with every kind of colour vision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoiAccuracy:
    """What is drawn for one ROI."""

    name: str
    roi_class: str
    r: float | None
    """Mean correlation over its vertices; None: no vertex."""
    ceiling: float | None
    """Mean of the best that can be reached; None: not known."""


def accuracy_per_roi(run: str | Path, part: str = "val") -> Path | None:
    """Draw accuracy per ROI against its ceiling into ``RUN/accuracy_per_roi.png``.

    Args:
        run: a run folder whose split has been scored (training scores ``val``, `brainenc evaluate` the others).
        part: ``"val"``, ``"test"`` or ``"train"``.

    Returns:
        the picture, or None where matplotlib is not installed.

    Raises:
        UsageError: no run there, or one without scores.
    """
    files = RunFiles(run)
    table = roi_table(files, part)
    if not has_matplotlib():
        return None
    path = files.path / ACCURACY
    atomic.replace(path, draw_accuracy(table, title=_title(files, part)))
    return path


def roi_table(files: RunFiles, part: str = "val") -> dict[Hemisphere, list[RoiAccuracy]]:
    """Accuracy and ceiling of each ROI of each hemisphere, in published order.

    Raises:
        UsageError: the split has not been scored.
    """
    scores = files.scores(part)
    if scores is None:
        raise UsageError(
            f"{files.path} has no scores of its {part} images: run `brainenc evaluate {shlex.quote(str(files.path))} "
            f"--split {part}`."
        )
    try:
        subject = files.subject()
    except DataError:  # old runs outlive their data: accuracies without ceilings
        subject = None
    best = best_correlations(subject) if subject else None
    table: dict[Hemisphere, list[RoiAccuracy]] = {}
    for hemisphere in HEMISPHERES:
        ceilings = roi_means(best[hemisphere], subject.rois.masks(hemisphere)) if subject and best else {}
        table[hemisphere] = [
            RoiAccuracy(name=name, roi_class=_class_of(name), r=entry["r"], ceiling=_known(ceilings.get(name)))
            for name, entry in scores["rois"][hemisphere].items()
        ]
    return table


def draw_accuracy(table: Mapping[Hemisphere, Sequence[RoiAccuracy]], *, title: str) -> bytes:
    """A PNG: one bar a ROI and hemisphere, a black line at its ceiling, colours by class."""
    figure = _figure((11.0, 6.4))
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    classes = [*ROI_CLASSES, "remainder"]
    for axis, hemisphere in zip(axes, HEMISPHERES, strict=True):
        rows = table[hemisphere]
        colours = [_CLASS_COLOURS[classes.index(row.roi_class)] for row in rows]
        axis.bar(range(len(rows)), [row.r or 0.0 for row in rows], color=colours, width=0.72)
        known = [(i, row.ceiling) for i, row in enumerate(rows) if row.ceiling is not None]
        if known:
            at, height = zip(*known, strict=True)
            axis.hlines(
                height, np.array(at) - 0.42, np.array(at) + 0.42, colors="black", linewidth=1.8, label="ceiling"
            )
        for i, row in enumerate(rows):
            if row.r is None:
                axis.text(i, 0.01, "no vertex", rotation=90, ha="center", va="bottom", fontsize=7, color="#777777")
        axis.set_ylabel(f"{'left' if hemisphere == 'lh' else 'right'}: mean r")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[1].set_xticks(range(len(table["rh"])), [row.name for row in table["rh"]], rotation=90)
    axes[0].set_title(title, loc="left")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 1.14))
    return _png(figure)


def draw_curves(metrics: Sequence[Mapping[str, Any]], *, max_val_perf: float | None) -> bytes:
    """A PNG: loss of each step and epoch, and the validation correlation against what can be reached."""
    figure = _figure((11.0, 3.4))
    left, right = figure.subplots(1, 2)
    train = [m for m in metrics if m["split"] == "train" and m.get("loss") is not None]
    val = [m for m in metrics if m["split"] == "val"]
    left.plot(
        [m["step"] for m in train], [m["loss"] for m in train], color="#bbbbbb", linewidth=0.8, label="training step"
    )
    left.plot(
        [m["step"] for m in val], [m.get("loss") for m in val], "o-", color="#4477aa", markersize=3, label="validation"
    )
    left.set(xlabel="step", ylabel="loss")
    left.legend(frameon=False)
    right.plot([m["step"] for m in val], [m.get("val_perf") for m in val], "o-", color="#228833", markersize=3)
    if max_val_perf is not None:
        right.axhline(max_val_perf, color="black", linewidth=1.2)
        right.text(0.01, max_val_perf, "can be reached", va="bottom", transform=right.get_yaxis_transform())
    right.set(xlabel="step", ylabel="val_perf (mean r)", ylim=(min(0.0, *right.get_ylim()), None))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#eeeeee", linewidth=0.6)
    return _png(figure)


def draw_vertices(r: Mapping[Hemisphere, Any], best: Mapping[Hemisphere, Any] | None) -> bytes:
    """A PNG: each vertex's correlation against its ceiling, or how the correlations are distributed without one."""
    figure = _figure((11.0, 3.6))
    for axis, hemisphere in zip(figure.subplots(1, 2, sharey=best is not None), HEMISPHERES, strict=True):
        values = np.nan_to_num(r[hemisphere])
        if best is None:
            axis.hist(values, bins=60, color="#4477aa")
            axis.set(xlabel=f"{hemisphere}: r", ylabel="vertices")
        else:
            axis.plot(best[hemisphere], values, ".", markersize=2, alpha=0.4, color="#4477aa", rasterized=True)
            axis.plot([0, 1], [0, 1], color="black", linewidth=1)
            axis.set(xlabel=f"{hemisphere}: best r of each vertex", ylabel="r", xlim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def draw_memory(points: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """A PNG: used share of the memory limit over time (minutes, fraction), one line a worker."""
    figure = _figure((11.0, 2.8))
    axis = figure.subplots()
    for i, (worker, line) in enumerate(points.items()):
        minutes, used = zip(*line, strict=True)
        axis.plot(minutes, used, color=_CLASS_COLOURS[i % len(_CLASS_COLOURS)], linewidth=1.2, label=worker)
    axis.set(xlabel="minutes", ylabel="used share of the limit", ylim=(0, 1))
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def draw_attention(maps: Mapping[str, Any], planted: Mapping[str, tuple[float, float]]) -> bytes:
    """A PNG: where each ROI looks, one panel a ROI.

    Args:
        maps: "lh V1v" -> attention over the image, shape (rows, columns), in the order to be drawn.
        planted: the same names -> (row, column) of the true location, fractions of the image; drawn as a cross.
    """
    columns = 10
    rows = -(-len(maps) // columns)
    figure = _figure((11.0, 1.35 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, attention) in zip(panels, maps.items(), strict=False):
        axis.imshow(attention, cmap="viridis", extent=(0, 1, 1, 0))
        if name in planted:
            axis.plot(planted[name][1], planted[name][0], "+", color="white", markersize=7)
        axis.set_title(name, fontsize=7)
    for axis in panels:
        axis.set_axis_off()
    return _png(figure)


def has_matplotlib() -> bool:
    """Whether pictures can be drawn at all."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(size: tuple[float, float]) -> Any:
    # Not pyplot: it would start a display and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _title(files: RunFiles, part: str) -> str:
    scores = files.scores(part) or {}
    perf = scores.get("val_perf")
    name = {"val": "validation", "test": "test", "train": "training"}[part]
    reached = f", mean r {perf:.3f}" if isinstance(perf, float) else ""
    return f"{files.path.name}: accuracy on {name} images{reached}"


def _class_of(roi: str) -> str:
    return next((c for c, rois in ROI_CLASSES.items() if roi in rois), "remainder")


def _known(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else value
