"""``brainenc store``: list, inspect, verify, repair, tidy, copy, export and import feature stores."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from brainenc.cli.progress import Progress
from brainenc.cli.store_transfer import cp_command, export_command, import_command
from brainenc.featurestore.overview import collection_summary, environments
from brainenc.featurestore.recovery import Finding, Verification, debris, gc, repair, verify
from brainenc.featurestore.store import FeatureStore, open_store
from brainenc.units import format_bytes, format_seconds

json_option = click.option("--json", "as_json", is_flag=True, help="Print results as JSON.")
store_argument = click.argument("store", metavar="STORE")
keys_argument = click.argument("keys", metavar="[KEY]...", nargs=-1)


@click.group()
def command() -> None:
    """List, inspect, verify, repair, tidy, copy, export and import feature stores.

    STORE is a folder or URL, KEY a collection such as subj01-train/dinov2-base/11.q.
    """


@command.command()
@store_argument
@json_option
def ls(store: str, as_json: bool) -> None:
    """The collections of a store: rows, shape, size, how complete.

    Example: brainenc store ls demo/store
    """
    opened = open_store(store)
    with Progress("ls", json_lines=as_json) as progress:
        keys = opened.keys()
        found = []
        for done, key in enumerate(keys, 1):
            found.append(collection_summary(opened, key))
            progress.update(done, len(keys))
    if as_json:
        click.echo(json.dumps({"store": opened.url, "collections": found}))
        return
    if not found:
        click.echo(f"{opened.url} has no collections yet.")
    width = max((len(str(item["key"])) for item in found), default=0)
    for item in found:
        rows = f"{item['rows_present']}/{item['rows']} rows"
        shape = "x".join(str(n) for n in item["row_shape"])
        click.echo(
            f"{item['key']:<{width}}  {rows:>17}  {shape:>12}  {item['dtype']:<8}  {format_bytes(item['bytes'])}"
        )


@command.command()
@store_argument
@click.argument("key")
@json_option
def info(store: str, key: str, as_json: bool) -> None:
    """All that is known about one collection: provenance, shards, what they were made with.

    Example: brainenc store info demo/store subj01-train/dinov2-mini/3.q
    """
    opened = open_store(store)
    with Progress("info", json_lines=as_json) as progress:
        made_in = environments(opened.collection(key), progress.update)
    summary = {**collection_summary(opened, key), "environments": made_in}
    if as_json:
        click.echo(json.dumps(summary))
        return
    for name, value in summary.items():
        if name == "bytes":
            value = format_bytes(value)
        click.echo(f"{name.replace('_', ' '):>16}: {value if isinstance(value, str) else json.dumps(value)}")
    if len(summary["environments"]) > 1:
        click.echo("Note: the shards were made in different environments, so equal only to rounding.", err=True)


@command.command("verify")
@store_argument
@keys_argument
@json_option
def verify_command(store: str, keys: tuple[str, ...], as_json: bool) -> int:
    """Read back every byte and compare with the checksums; names each bad shard. Exit code 1 if there is one.

    Example: brainenc store verify gs://lab/features subj01-train/dinov2-base/11.q
    """
    result = _verified(open_store(store), keys, as_json)
    if as_json:
        click.echo(json.dumps(_as_json(result)))
    else:
        _print_verification(result)
    return 0 if result.whole else 1


@command.command("repair")
@store_argument
@keys_argument
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@json_option
def repair_command(store: str, keys: tuple[str, ...], dry_run: bool, as_json: bool) -> int:
    """Verify, then drop bad and half-written shards, so that the next extraction computes just those.

    Not beside a running extraction into the same collections.

    Example: brainenc store repair demo/store
    """
    opened = open_store(store)
    result = _verified(opened, keys, as_json)
    with Progress("repair", json_lines=as_json) as progress:
        left = [] if dry_run else repair(opened, result.findings, progress=lambda n, of, _: progress.update(n, of))
    if as_json:
        click.echo(json.dumps({**_as_json(result), "dry_run": dry_run, "not_mended": [_finding(f) for f in left]}))
    else:
        _print_verification(result)
        _print_repair(result.findings, left, dry_run)
    return 1 if left else 0


@command.command("gc")
@store_argument
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@json_option
def gc_command(store: str, dry_run: bool, as_json: bool) -> None:
    """Remove what dead writers left and manifests long superseded, and say how much that was.

    Example: brainenc store gc demo/store --dry-run
    """
    opened = open_store(store)
    with Progress("gc", json_lines=as_json) as progress:
        found = []
        for item in debris(opened):
            found.append(item)
            progress.update(len(found), bytes=sum(one.bytes for one in found))
    freed = sum(item.bytes for item in found) if dry_run else gc(opened, found)
    if as_json:
        removed = [{"name": item.name, "bytes": item.bytes, "why": item.why} for item in found]
        click.echo(json.dumps({"store": opened.url, "dry_run": dry_run, "bytes": freed, "removed": removed}))
        return
    for item in found:
        click.echo(f"{item.name}: {format_bytes(item.bytes)}, {item.why}")
    click.echo(f"{'Would remove' if dry_run else 'Removed'} {len(found)} files, {format_bytes(freed)}.")


def _verified(store: FeatureStore, keys: Sequence[str], as_json: bool) -> Verification:
    with Progress("verify", json_lines=as_json) as progress:
        return verify(
            store,
            list(keys) or None,
            progress=lambda done, of, size: progress.update(done, of, read=format_bytes(size)),
        )


def _finding(finding: Finding) -> dict[str, Any]:
    return {"key": finding.key, "shard": finding.shard, "problem": finding.problem, "cure": finding.cure}


def _as_json(result: Verification) -> dict[str, Any]:
    return {
        "whole": result.whole, "shards": result.shards, "bytes": result.bytes, "seconds": result.seconds,
        "findings": [_finding(finding) for finding in result.findings],
    }  # fmt: skip


def _print_verification(result: Verification) -> None:
    for finding in result.findings:
        where = finding.key if finding.shard is None else f"{finding.key} shard {finding.shard}"
        click.echo(f"BAD {where}: {finding.problem}")
    speed = format_bytes(result.bytes / max(result.seconds, 1e-9))
    click.echo(
        f"{result.shards} shards, {format_bytes(result.bytes)} read in {format_seconds(result.seconds)} ({speed}/s): "
        f"{'all whole' if result.whole else f'{len(result.findings)} problems'}."
    )


def _print_repair(findings: Sequence[Finding], left: Sequence[Finding], dry_run: bool) -> None:
    dropped = sum(finding.cure == "drop" for finding in findings)
    papers = sum(finding.cure in ("receipt", "commit", "manifest") for finding in findings)
    word = "Would drop" if dry_run else "Dropped"
    click.echo(f"{word} {dropped} shards; {papers} receipts or manifests to be written again." if dry_run else
               f"{word} {dropped} shards, wrote {papers} receipts or manifests again.")  # fmt: skip
    if dropped and not dry_run:
        click.echo("Run the same extraction again: it computes just what was dropped.")
    for finding in left:
        click.echo(f"Cannot be mended: {finding.problem}", file=sys.stderr)


for _command in (cp_command, export_command, import_command):
    command.add_command(_command)
