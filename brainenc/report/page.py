"""``report.html``: one page about a run, with everything inside it, to be mailed or kept beside a paper."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from brainenc import atomic
from brainenc.datasets.algonauts import Subject
from brainenc.datasets.rois import HEMISPHERES
from brainenc.errors import DataError
from brainenc.report import figures
from brainenc.report.run_files import PARTS, RunFiles, best_correlations
from brainenc.units import format_seconds

PAGE = "report.html"

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.headline { font-size: 1.25rem; } .muted { opacity: .7; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; background: white; } pre { overflow-x: auto; }
"""

_ROI_HEAD = (
    "<tr><th>ROI</th>"
    + "".join(f'<th class="n">{h} {what}</th>' for h in HEMISPHERES for what in ("r", "ceiling"))
    + "</tr>"
)


def write_report(run: str | Path) -> Path:
    """Write ``RUN/report.html`` from whatever the run has left so far; missing parts are said to be missing.

    Returns:
        the page.

    Raises:
        UsageError: no run there.
    """
    files = RunFiles(run)
    subject = _subject(files)
    pictures = figures.has_matplotlib()
    body = [
        f"<h1>{html.escape(files.path.name)}</h1>",
        _headline(files, subject),
        _facts(files),
        *_ensemble(files),
        *_accuracy(files, subject, pictures),
        *_attention(files, subject, pictures),
        *_training(files, subject, pictures),
        *_memory(files, pictures),
        "<h2>Configuration</h2>",
        _folded("config.yaml", f"<pre>{html.escape(yaml.safe_dump(files.config, sort_keys=False))}</pre>"),
    ]
    if not pictures:
        body.append('<p class="muted">No pictures: matplotlib is not installed (pip install "brainenc[report]").</p>')
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(files.path.name)}: brainenc</title>'
        f"<style>{_STYLE}</style>{''.join(body)}</html>\n"
    )
    path = files.path / PAGE
    atomic.replace(path, page.encode())
    return path


def _subject(files: RunFiles) -> Subject | None:
    """The subject, unless its folder is gone: old runs outlive their data."""
    try:
        return files.subject()
    except DataError:
        return None


def _headline(files: RunFiles, subject: Subject | None) -> str:
    perf = _best_perf(files)
    if perf is None:
        return '<p class="headline">Not validated yet.</p>'
    text = f"Validation correlation <b>{perf:.4f}</b>"
    most = _max_val_perf(subject)
    if most:
        text += f" of {most:.4f} that can be reached ({perf / most:.0%})"
    if (scores := files.scores()) and isinstance(scores.get("score"), float):
        text += f"; noise-normalised score {scores['score']:.2f} %"
    return f'<p class="headline">{text}.</p>'


def _best_perf(files: RunFiles) -> float | None:
    found = [m["val_perf"] for m in files.metrics if m["split"] == "val" and m.get("val_perf") is not None]
    return max(found) if found else (files.scores() or {}).get("val_perf")


def _max_val_perf(subject: Subject | None) -> float | None:
    truth = subject.truth() if subject else None
    return float(truth["max_val_perf"]) if truth and "max_val_perf" in truth else None


def _facts(files: RunFiles) -> str:
    config = files.config
    encoder = config.get("encoder") if isinstance(config.get("encoder"), dict) else {}
    train = [m for m in files.metrics if m["split"] == "train"]
    val = [m for m in files.metrics if m["split"] == "val"]
    rows: list[tuple[str, Any]] = [
        ("subject", config.get("subject_dir")),
        ("features", ", ".join(config.get("features") or ())),
        ("encoder and readout", f"{(encoder or {}).get('encoder', '?')}, {files.readout}"),
        (
            "batch, learning rate, epochs",
            f"{config.get('batch_size')}, {config.get('learning_rate')}, {config.get('epochs')}",
        ),
        ("workers, seed", f"{config.get('workers')}, {config.get('seed')}"),
        ("steps done", max((m["step"] for m in files.metrics), default=0)),
        ("epochs validated", len(val)),
        ("samples a second", _median(train, "samples_per_s", "{:.1f}")),
        ("time waiting for data", _median(train, "data_wait_share", "{:.2%}")),
        ("restarts", max((int(m.get("run", 0)) for m in files.metrics), default=0)),
    ]
    cells = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows if v not in (None, "")
    )
    return f"<table>{cells}</table>"


def _median(records: Iterable[Mapping[str, Any]], name: str, form: str) -> str | None:
    values = [m[name] for m in records if m.get(name) is not None]
    return form.format(statistics.median(values)) if values else None


def _accuracy(files: RunFiles, subject: Subject | None, pictures: bool) -> list[str]:
    parts: list[str] = []
    for part in PARTS:
        if files.scores(part) is None:
            continue
        table = figures.roi_table(files, part)
        parts.append(f"<h2>Accuracy per ROI, {part} images</h2>")
        if pictures:
            draw = partial(figures.draw_accuracy, table, title=f"{part} images: mean r")
            parts.append(_image(draw, "accuracy per ROI"))
        rows = "".join(
            f"<tr><td>{html.escape(lh.name)}</td>{_cells(lh)}{_cells(rh)}</tr>"
            for lh, rh in zip(table["lh"], table["rh"], strict=True)
        )
        parts.append(_folded("as numbers", f"<table>{_ROI_HEAD}{rows}</table>"))
    if not parts:
        return [
            "<h2>Accuracy per ROI</h2>",
            '<p class="muted">Not scored yet: `brainenc evaluate` does it.</p>',
        ]
    if pictures and subject is not None:
        parts += _vertices(files, subject)
    return parts


def _vertices(files: RunFiles, subject: Subject) -> list[str]:
    r = {h: files.correlations(h) for h in HEMISPHERES}
    known = {h: values for h, values in r.items() if values is not None}
    if len(known) < len(HEMISPHERES):
        return []
    best = best_correlations(subject)
    return ["<h2>Each vertex</h2>", _image(lambda: figures.draw_vertices(known, best), "each vertex")]


def _cells(row: figures.RoiAccuracy) -> str:
    return "".join(f'<td class="n">{_number(v)}</td>' for v in (row.r, row.ceiling))


def _attention(files: RunFiles, subject: Subject | None, pictures: bool) -> list[str]:
    maps = files.attention()
    if not maps or not pictures:
        return []
    truth = (subject.truth() if subject else None) or {}
    rois = truth.get("rois", {})
    planted = {f"{h} {name}": tuple(entry["location"]) for h in rois for name, entry in rois[h].items()}
    words = "Mean attention over the images" + ("; the cross is the planted location." if planted else ".")
    draw = partial(figures.draw_attention, maps, planted)
    return [f"<h2>Where each ROI looks</h2><p>{words}</p>", _image(draw, "attention per ROI")]


def _ensemble(files: RunFiles) -> list[str]:
    if files.ensemble is None:
        return []
    test = files.ensemble.get("test_r") or {}
    rows = [
        f"<tr><td>{html.escape(str(run))}</td>"
        + "".join(f'<td class="n">{files.ensemble["shares"][h][i]:.3f}</td>' for h in HEMISPHERES)
        + f'<td class="n">{_number(test.get(str(run)))}</td></tr>'
        for i, run in enumerate(files.ensemble["runs"])
    ]
    rows.append(f'<tr><td>together</td><td></td><td></td><td class="n">{_number(test.get("ensemble"))}</td></tr>')
    head = '<tr><th>run</th><th class="n">lh weight</th><th class="n">rh weight</th><th class="n">test r</th></tr>'
    return [f"<h2>Ensemble</h2><table>{head}{''.join(rows)}</table>"]


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def _training(files: RunFiles, subject: Subject | None, pictures: bool) -> list[str]:
    if not files.metrics:
        return ['<h2>Training</h2><p class="muted">No step was recorded.</p>']
    parts = ["<h2>Training</h2>"]
    if pictures:
        parts.append(
            _image(lambda: figures.draw_curves(files.metrics, max_val_perf=_max_val_perf(subject)), "training curves")
        )
    return parts


def _memory(files: RunFiles, pictures: bool) -> list[str]:
    if not files.guard:
        return []
    parts = ["<h2>Memory and guard</h2>"]
    points = memory_points(files.guard)
    if pictures and points:
        parts.append(_image(lambda: figures.draw_memory(points), "used share of the memory limit"))
    told = [g for g in files.guard if g.get("kind") in ("warning", "order", "incident")]
    items = "".join(f"<li>{html.escape(_event(g))}</li>" for g in told)
    parts.append(f"<ul>{items}</ul>" if told else "<p>No warning, no order.</p>")
    return parts


def memory_points(guard: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Worker -> (minutes since the first reading, used share of the limit), from the lines of ``guard.jsonl``."""
    readings = [g for g in guard if g.get("kind") in ("reading", "warning") and _fraction(g) is not None]
    if not readings:
        return {}
    start = min(float(g["at"]) for g in readings)
    points: dict[str, list[tuple[float, float]]] = {}
    for g in readings:
        points.setdefault(str(g.get("worker")), []).append(((float(g["at"]) - start) / 60, _fraction(g) or 0.0))
    return points


def _fraction(line: Mapping[str, Any]) -> float | None:
    numbers = line.get("numbers")
    value = numbers.get("fraction") if isinstance(numbers, dict) else None
    return float(value) if isinstance(value, int | float) and "at" in line else None


def _event(line: Mapping[str, Any]) -> str:
    if line["kind"] == "incident":
        took = (line.get("closed_at") or 0) - (line.get("opened_at") or 0)
        after = f" after {format_seconds(took)}" if took > 0 else ""
        checkpoint = line.get("checkpoint") or "none"
        return f"incident {line.get('number')}: {line.get('outcome')}{after}, checkpoint {checkpoint}"
    who = f" ({line['worker']}, step {line.get('step')})" if "worker" in line else ""
    return f"{line['kind']}{': ' + str(line['order']) if 'order' in line else ''}{who}: {line.get('reason', '')}"


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _image(draw: Callable[[], bytes], what: str) -> str:
    return f'<p><img alt="{what}" src="data:image/png;base64,{base64.b64encode(draw()).decode()}"></p>'
