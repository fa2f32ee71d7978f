"""``brainenc evaluate``."""

from __future__ import annotations

import json
from typing import Any

import click

from brainenc.cli.progress import Progress
from brainenc.datasets.rois import REMAINDER, ROI_CLASSES

EXAMPLE = """
\b
Example:
  brainenc evaluate runs/first
  brainenc evaluate runs/first --split test --json
"""


@click.command(epilog=EXAMPLE)
@click.argument("run", metavar="RUN")
@click.option(
    "--split", "part", type=click.Choice(["val", "train", "test"]), default="val", show_default=True,
    help="test needs the organisers' responses, which a synthetic subject has.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print all scores as JSON.")
def command(run: str, part: Any, device: str, as_json: bool) -> None:
    """Score a run per hemisphere, ROI and stream, with its best weights."""
    from brainenc.cli.on_the_fly import views_of_run
    from brainenc.train.elsewhere import run_to_look_at
    from brainenc.train.evaluate import evaluate, evaluate_ridge, open_run

    with run_to_look_at(run) as folder, Progress("evaluate", json_lines=as_json) as progress:
        table = evaluate_ridge(folder, part)
        if table is None:
            opened = open_run(folder, device=device, open_views=views_of_run(folder))
            table = evaluate(opened, part, progress=progress.update, note=progress.note)
    click.echo(json.dumps(table) if as_json else "\n".join(_lines(table)))


def _lines(table: dict[str, Any]) -> list[str]:
    lines = [
        f"{table['n_images']} {table['split']} images, weights of {table['checkpoint']}",
        f"r {table['r_lh']:.4f} (lh) {table['r_rh']:.4f} (rh), val_perf {table['val_perf']:.4f}",
    ]
    if "score" in table:
        lines.append(f"noise-normalised score {table['score']:.2f} %")
    width = max(len(name) for name in table["rois"]["lh"])
    lines.append(f"{'ROI':{width}}   lh r  vertices    rh r  vertices")
    for name in table["rois"]["lh"]:
        if name == ROI_CLASSES["streams"][0]:
            lines.append(f"{'stream':{width}}   lh r  vertices    rh r  vertices")
        if name == REMAINDER:
            lines.append("outside all ROIs (streams cover it, too)")
        cells = [_cell(table["rois"][hemisphere][name]) for hemisphere in ("lh", "rh")]
        lines.append(f"{name:{width}} {'  '.join(cells)}")
    return lines


def _cell(entry: dict[str, Any]) -> str:
    r = "     -" if entry["r"] is None else f"{entry['r']:6.3f}"
    return f"{r} {entry['vertices']:9d}"
