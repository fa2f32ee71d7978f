"""``--stage``, and what a command says where a flush is no flush."""

from __future__ import annotations

import click

stage_option = click.option(
    "--stage/--no-stage",
    default=None,
    help="Treat a folder as a mounted drive, or not; by default found out by its mount and by how it was written.",
)


def tell_handed_over(real_flush: bool) -> None:
    """Say that what was written may not have arrived."""
    if not real_flush:
        click.echo("Handed over to the drive, not confirmed: the next run that uses it reads it back.", err=True)
