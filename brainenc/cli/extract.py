"""``brainenc extract``: features of images into a store."""

from __future__ import annotations

import json
from typing import Any

import click

from brainenc.cli.extract_options import config_from, source_options
from brainenc.cli.progress import Progress
from brainenc.cli.staging import tell_handed_over
from brainenc.extract.config import ExtractProgress, ExtractSummary
from brainenc.units import format_bytes, format_seconds, parse_seconds

EXAMPLE = """
\b
Example:
  brainenc extract --subject-dir data/subj01 --store features \\
      --backbone facebook/dinov2-base --feature 11.q --feature norm.token
"""
OWN = ("on_bad_image", "check_images", "max_attempts", "node_store")
"""Options that planning has not."""


@click.command("extract", epilog=EXAMPLE)
@source_options
@click.option(
    "--on-bad-image", type=click.Choice(("fail", "null")), default="fail", show_default=True,
    help="List unreadable images in one error after everything else is sealed, or leave their rows empty.",
)  # fmt: skip
@click.option(
    "--check-images", is_flag=True, help="Read all images again and compare them with those that features are of."
)
@click.option("--max-attempts", type=int, default=3, show_default=True, help="How often a shard may lose its worker.")
@click.option(
    "--commit-every",
    default="60s",
    show_default=True,
    metavar="TIME",
    help="How often readers get to see what is sealed.",
)
@click.option(
    "--node-store", metavar="DIR",
    help="Keep shards on this folder of each node's own disk, and move them into the store at the end; variables are "
    "the node's, as in '$TMPDIR'.",
)  # fmt: skip
def command(as_json: bool, debug: bool, commit_every: str, **options: Any) -> int:
    """Compute features of images with a frozen backbone, and add them to a store.

    Whatever the store has already is left alone, so that the same command goes on after any interruption, and another
    layer costs only that layer.
    """
    own = {name: options.pop(name) for name in OWN}
    config = config_from(options, commit_every_s=parse_seconds(commit_every), **own)
    from brainenc.extract.driver import extract  # late: torch takes seconds, which wrong usage need not wait for
    from brainenc.featurestore.places import is_staged

    with Progress("extract", json_lines=as_json) as shown:
        summary = extract(config, progress=lambda p: _show(shown, p))
    _print(summary, as_json, flushed=not is_staged(config.store, config.stage))
    return 0


def _show(shown: Progress, p: ExtractProgress) -> None:
    if p.note:
        shown.note(p.note)
    text: dict[str, Any] = {
        "images_per_s": round(p.images_per_s, 2),
        "shards": f"{p.shards_sealed}/{p.shards_total}",
    }
    if p.memory_bytes:
        text["RAM"] = format_bytes(p.memory_bytes)
    if p.gpu_fraction is not None:
        text["GPU"] = f"{p.gpu_fraction:.0%}"
    if p.retries:
        text["retries"] = p.retries
    shown.update(
        p.images_done, p.images_total, text=text, images_per_s=round(p.images_per_s, 3), seconds_left=p.seconds_left,
        shards_sealed=p.shards_sealed, shards_total=p.shards_total, retries=p.retries, memory_bytes=p.memory_bytes,
        memory_limit_bytes=p.memory_limit_bytes, gpu_fraction=p.gpu_fraction,
    )  # fmt: skip


def _print(summary: ExtractSummary, as_json: bool, *, flushed: bool) -> None:
    if as_json:
        click.echo(json.dumps({**summary.to_dict(), "confirmed": flushed}))
        return
    for warning in summary.warnings:
        click.echo(f"note: {warning}")
    if summary.reused:
        click.echo(f"{summary.reused} images had their rows in other stimulus sets already; those were copied.")
    if summary.images or summary.reused:
        click.echo(
            f"{summary.images} images at {summary.images_per_s:.3g} a second, {summary.shards_sealed} shards sealed "
            f"({summary.shards_before} were there), in {format_seconds(summary.seconds)}."
        )
    else:
        click.echo(f"Nothing to do: all {summary.shards_before} shards were there ({format_seconds(summary.seconds)}).")
    for uri, why in summary.missing.items():
        click.echo(f"missing row: {uri}: {why}")
    for key in summary.keys:
        click.echo(f"{summary.store}  {key}")
    tell_handed_over(flushed or not (summary.images or summary.reused))
