"""``brainenc plan``: rows, bytes, disk, memory and time, before anything runs."""

from __future__ import annotations

import json
from typing import Any

import click

from brainenc.cli.extract_options import config_from, source_options

EXAMPLE = """
\b
Example:
  brainenc plan --subject-dir data/subj01 --store features \\
      --backbone facebook/dinov2-base --feature 8-11.q
"""


@click.command("plan", epilog=EXAMPLE)
@source_options
@click.option("--time/--no-time", "timed", default=True, show_default=True, help="Time a few batches for the estimate.")
def command(as_json: bool, debug: bool, timed: bool, **options: Any) -> int:
    """Say what an extraction will take, and whether it fits. Writes nothing; takes the options of `extract`."""
    config = config_from(options)
    from brainenc.extract.estimate import estimate  # late: torch takes seconds, which wrong usage need not wait for

    plan = estimate(config, timed=timed)
    if as_json:
        click.echo(json.dumps(plan.to_dict()))
    else:
        for line in plan.lines():
            click.echo(line)
        problem = plan.problem()
        click.echo(f"This does not fit: {problem}" if problem else "This fits.")
    return 1 if plan.problem() else 0
