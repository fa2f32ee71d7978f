"""``brainenc ensemble``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from brainenc.cli.local_out import LocalOut
from brainenc.redact import redact

EXAMPLE = """
\b
Example:
  brainenc ensemble runs/layer9 runs/layer11 runs/layer11-seed1 --out runs/ensemble
  brainenc submit runs/ensemble
"""


@click.command("ensemble", epilog=EXAMPLE)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--out", required=True, metavar="RUN", type=LocalOut(path_type=Path), help="Run folder to make.")
@click.option(
    "--temperature", type=float, default=40.0, show_default=True,
    help="0 weighs runs alike; the larger, the more a vertex's best run counts.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(runs: Sequence[str], out: Path, temperature: float, as_json: bool) -> None:
    """Combine the test predictions of runs, weighted per vertex by their validation correlation.

    The weight of a run at a vertex is the softmax over runs of its correlation times the temperature.
    """
    from brainenc.train.elsewhere import run_to_look_at
    from brainenc.train.ensemble import ensemble

    with ExitStack() as stack:
        folders = [stack.enter_context(run_to_look_at(run)) for run in runs]
        result = ensemble(folders, out, temperature=temperature)
    if as_json:
        click.echo((result.out / "ensemble.json").read_text().strip())
        return
    for i, run in enumerate(runs):
        score = "" if result.test_r is None else f", test r {result.test_r[str(result.runs[i])]:.4f}"
        click.echo(
            f"{redact(run)}: mean weight {result.shares['lh'][i]:.3f} (lh) {result.shares['rh'][i]:.3f} (rh){score}"
        )
    score = "" if result.test_r is None else f" test r {result.test_r['ensemble']:.4f};"
    click.echo(f"{result.out}:{score} submit it with `brainenc submit {shlex.quote(str(result.out))}`")
