"""``brainenc demo``."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import click

from brainenc.cli.local_out import LocalOut
from brainenc.cli.progress import Progress

EXAMPLE = """
\b
Example:
  brainenc demo --out /tmp/demo
"""


@click.command(epilog=EXAMPLE)
@click.option(
    "--out",
    type=LocalOut(file_okay=False, path_type=Path),
    default=Path("brainenc-demo"),
    show_default=True,
    help="Where to leave the subject, the backbone, the store and the run.",
)
@click.option("--epochs", type=int, help="Train for so many epochs instead of the demo's own number.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(out: Path, epochs: int | None, as_json: bool) -> None:
    """The whole path on a small subject made on the spot, under two minutes on two cores.

    Makes a synthetic subject in the Algonauts 2023 layout, whose responses are read out of a small DINOv2; extracts
    that DINOv2's features into a store with Ray Data; trains the transformer encoder from the store with Ray Train;
    and compares what was reached with what could be. Nothing is downloaded.
    """
    from brainenc.demo import DemoConfig, closing_lines, run_demo

    config = DemoConfig(out=out.expanduser().absolute())
    if epochs is not None:
        config = replace(config, epochs=epochs)
    result = run_demo(config, lambda name: Progress(name, json_lines=as_json))
    if as_json:
        click.echo(json.dumps(asdict(result) | {"share": result.share}, default=str))
    else:
        click.echo("\n".join(closing_lines(result)))
