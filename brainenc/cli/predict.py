"""``brainenc predict``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from brainenc.cli.local_out import LocalOut
from brainenc.redact import redact

EXAMPLE = """
\b
Example:
  brainenc predict runs/first
"""


@click.command(epilog=EXAMPLE)
@click.argument("run", metavar="RUN")
@click.option("--out", type=LocalOut(file_okay=False, path_type=Path), help="Folder; default RUN/predictions.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print the paths as JSON.")
def command(run: str, out: Path | None, device: str, as_json: bool) -> None:
    """Predict responses to the test images: lh_pred_test.npy and rh_pred_test.npy, float32."""
    from brainenc.cli.on_the_fly import views_of_run
    from brainenc.train.elsewhere import run_to_look_at
    from brainenc.train.evaluate import open_run, predict

    with run_to_look_at(run) as folder:
        paths = predict(open_run(folder, device=device, open_views=views_of_run(folder)), out)
    written = [str(path).replace(str(folder), redact(run.rstrip("/"))) for path in paths]  # where the run is
    click.echo(json.dumps(written) if as_json else "\n".join(written))
