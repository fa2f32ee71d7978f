"""``brainenc import-checkpoint``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from brainenc.cli.local_out import LocalOut

EXAMPLE = """
\b
Example:
  brainenc import-checkpoint checkpoint.pth --subject-dir data/subj01 \\
      --store features --feature dinov2-base/11.q --split idxs.npy --out runs/published
  brainenc evaluate runs/published
"""


@click.command("import-checkpoint", epilog=EXAMPLE)
@click.argument("checkpoint", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--subject-dir", required=True, metavar="DIR", type=click.Path(path_type=Path),
    help="The subject that it was trained on: its ROIs say which query answers for which vertex.",
)  # fmt: skip
@click.option("--out", required=True, metavar="RUN", type=LocalOut(path_type=Path), help="Run folder to make.")
@click.option("--store", metavar="URL", help="Where the features lie that it will be used with.")
@click.option("--feature", "features", multiple=True, metavar="FEATURE", help="Such as dinov2-base/11.q.")
@click.option(
    "--split", metavar="idxs.npy", type=click.Path(path_type=Path),
    help="Of the published run: image numbers, those for training first. Without it validation scores mean little.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print what was imported as JSON.")
def command(
    checkpoint: Path, subject_dir: Path, out: Path, store: str | None, features: tuple[str, ...], split: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Turn a checkpoint of the published code into a run folder of ours.

    `evaluate`, `predict` and `ensemble` take it, and `train --resume` goes on from its weights. Nothing in the file is
    executed: it is read with weights only.
    """
    from brainenc.train.published import import_published

    found = import_published(
        checkpoint, subject_dir, out, store=store, features=features, split=split,
        note=lambda text: click.echo(text, err=True),
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(found))
        return
    perf = "" if found["val_perf"] is None else f", val_perf {found['val_perf']:.4f} as recorded"
    click.echo(
        f"{found['run']}: {found['encoder']} with {found['readout']}, {found['n_parameters']:,} parameters, "
        f"after epoch {found['epoch']}{perf}."
    )
