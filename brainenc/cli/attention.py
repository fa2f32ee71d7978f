"""``brainenc attention``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from brainenc.cli.local_out import LocalOut
from brainenc.cli.progress import Progress

EXAMPLE = """
\b
Example:
  brainenc attention runs/first --image nsd-00013 --image nsd-00027
  brainenc attention runs/first --split test --count 8 --out maps
"""


@click.command("attention", epilog=EXAMPLE)
@click.argument("run", metavar="RUN")
@click.option("--split", "part", type=click.Choice(["train", "test"]), default="train", show_default=True)
@click.option("--image", "stimuli", multiple=True, metavar="ID", help="Stimulus id of an image; again for more.")
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Without --image: how many, from the first.",
)
@click.option(
    "--out", type=LocalOut(path_type=Path), metavar="DIR", help="Folder to write to  [default: RUN/attention]"
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print the files as JSON.")
def command(
    run: str, part: Any, stimuli: tuple[str, ...], count: int, out: Path | None, device: str, as_json: bool
) -> None:
    """Show where each ROI looks: arrays of shape (images, ROIs, rows, columns), and colours on the images."""
    from brainenc.cli.on_the_fly import views_of_run
    from brainenc.train.attention import maps_of_run, n_files
    from brainenc.train.elsewhere import run_to_look_at
    from brainenc.train.evaluate import open_run

    files = []
    with run_to_look_at(run) as folder, Progress("attention", json_lines=as_json) as progress:
        opened = open_run(folder, device=device, open_views=views_of_run(folder))
        chosen = list(stimuli) or opened.subject.ids(part)[:count]
        target = out or opened.folder.path / "attention"
        total = n_files(opened.predictor.model, len(chosen))
        for path in maps_of_run(opened, part, chosen, target):
            files.append(path)
            progress.update(len(files), total)
    if as_json:
        click.echo(json.dumps([str(path) for path in files]))
        return
    click.echo(f"{target}: {len(files)} files, maps of {len(chosen)} images by {opened.checkpoint}")
