"""``brainenc store``: list, inspect, verify, repair, tidy, copy, export and import feature stores."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from brainenc.cli.progress import Progress
from brainenc.cli.staging import stage_option, tell_handed_over
from brainenc.cli.store_transfer import cp_command, export_command, import_command
from brainenc.errors import BrainencError
from brainenc.featurestore.overview import collection_summary, environments
from brainenc.featurestore.recovery import Finding, Verification, debris, gc, repair, verify
from brainenc.featurestore.store import FeatureStore, open_store
from brainenc.redact import redact
from brainenc.units import format_bytes, format_seconds

json_option = click.option("--json", "as_json", is_flag=True, help="Print results as JSON.")
store_argument = click.argument("store", metavar="STORE")
keys_argument = click.argument("keys", metavar="[KEY]...", nargs=-1)


def _example(line: str) -> str:
    return f"\b\nExample: brainenc store {line}"


@click.group()
def command() -> None:
    """List, inspect, verify, repair, tidy, copy, export and import feature stores.

    STORE is a folder or URL, KEY a collection such as subj01-train/dinov2-base/11.q.
    """


@command.command(epilog=_example("ls brainenc-demo/store"))
@store_argument
@stage_option
@json_option
def ls(store: str, stage: bool | None, as_json: bool) -> int:
    """The collections of a store: rows, shape, size, how complete. Exit code 1 if one of them cannot be read."""
    opened = open_store(store, stage=stage)
    with Progress("ls", json_lines=as_json) as progress:
        keys = opened.keys()
        found, problems = [], []
        for done, key in enumerate(keys, 1):
            try:
                found.append(collection_summary(opened, key))
            except (BrainencError, OSError) as error:  # what is wrong with one hides no other
                problems.append({"key": key, "problem": redact(str(error))})
            progress.update(done, len(keys))
    if as_json:
        click.echo(json.dumps({"store": opened.url, "collections": found, "problems": problems}))
    else:
        _print_list(opened.url, found, problems)
    return 1 if problems else 0


def _print_list(url: str, found: Sequence[dict[str, Any]], problems: Sequence[dict[str, str]]) -> None:
    if not found and not problems:
        click.echo(f"{url} has no collections yet.")
    width = max((len(str(item["key"])) for item in found), default=0)
    for item in found:
        rows = f"{item['rows_present']}/{item['rows']} rows"
        shape = "x".join(str(n) for n in item["row_shape"])
        click.echo(
            f"{item['key']:<{width}}  {rows:>17}  {shape:>12}  {item['dtype']:<8}  {format_bytes(item['bytes'])}"
        )
    for item in problems:
        click.echo(f"BAD {item['key']}: {item['problem']}")


@command.command(epilog=_example("info brainenc-demo/store subj01-train/dino-mini/2.q"))
@store_argument
@click.argument("key")
@stage_option
@json_option
def info(store: str, key: str, stage: bool | None, as_json: bool) -> None:
    """All that is known about one collection: provenance, shards, what they were made with."""
    opened = open_store(store, stage=stage)
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


@command.command("verify", epilog=_example("verify gs://lab/features subj01-train/dinov2-base/11.q"))
@store_argument
@keys_argument
@stage_option
@json_option
def verify_command(store: str, keys: tuple[str, ...], stage: bool | None, as_json: bool) -> int:
    """Read back every byte and compare with the checksums; names each bad shard. Exit code 1 if there is one.

    Shards that are sealed but in no manifest are named, too: readers do not see them. While an extraction runs, that
    is what it will commit within the next minute; afterwards, the same extraction or `store repair` commits them.
    """
    result = _verified(open_store(store, stage=stage), keys, as_json)
    if as_json:
        click.echo(json.dumps(_as_json(result)))
    else:
        _print_verification(result)
    return 0 if result.whole else 1


@command.command("repair", epilog=_example("repair brainenc-demo/store --dry-run"))
@store_argument
@keys_argument
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@stage_option
@json_option
def repair_command(store: str, keys: tuple[str, ...], dry_run: bool, stage: bool | None, as_json: bool) -> int:
    """Verify, and mend: afterwards, the same extraction computes just what is lost.

    Bad and half-written shards are dropped; receipts that are torn or gone are written again from their shards;
    manifests that are torn, or of another collection, are removed, and a first one that is gone or wrong is written
    again; shards that were sealed but never committed are committed. Not beside a running extraction into the same
    collections.
    """
    opened = open_store(store, stage=stage)
    result = _verified(opened, keys, as_json)
    with Progress("repair", json_lines=as_json) as progress:
        left = [] if dry_run else repair(opened, result.findings, progress=lambda n, of, _: progress.update(n, of))
    flushed = opened.place.can.real_flush
    if as_json:
        told = {"dry_run": dry_run, "not_mended": [_finding(f) for f in left], "confirmed": flushed}
        click.echo(json.dumps({**_as_json(result), **told}))
    else:
        _print_verification(result)
        _print_repair(result.findings, left, dry_run)
        tell_handed_over(flushed or dry_run or not result.findings)
    return 1 if left else 0


@command.command("gc", epilog=_example("gc brainenc-demo/store --dry-run"))
@store_argument
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@stage_option
@json_option
def gc_command(store: str, dry_run: bool, stage: bool | None, as_json: bool) -> None:
    """Remove what dead writers left and manifests long superseded, and say how much that was."""
    opened = open_store(store, stage=stage)
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
    click.echo(f"{'Would remove' if dry_run else 'Removed'} {_many(len(found), 'file')}, {format_bytes(freed)}.")


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
    what = "all whole" if result.whole else _many(len(result.findings), "problem")
    click.echo(
        f"{_many(result.shards, 'shard')}, {format_bytes(result.bytes)} read in {format_seconds(result.seconds)} "
        f"({speed}/s): {what}."
    )


def _print_repair(findings: Sequence[Finding], left: Sequence[Finding], dry_run: bool) -> None:
    counts = {cure: sum(finding.cure == cure for finding in findings) for cure in _DONE}
    done = [f"{(_WOULD if dry_run else _DONE)[cure]} {_many(n, _WHAT[cure])}" for cure, n in counts.items() if n]
    text = ", ".join(done) or "nothing to mend"
    click.echo(f"{text[0].upper()}{text[1:]}.")
    if counts["drop"] and not dry_run:
        click.echo("Run the same extraction again: it computes just what was dropped.")
    for finding in left:
        click.echo(f"Cannot be mended: {finding.problem.rstrip('.')}.", file=sys.stderr)


_DONE = {"drop": "dropped", "receipt": "wrote again", "manifest": "removed or wrote again", "commit": "committed"}
_WOULD = {"drop": "would drop", "receipt": "would write again", "manifest": "would remove or write again",
          "commit": "would commit"}  # fmt: skip
_WHAT = {"drop": "shard", "receipt": "receipt", "manifest": "manifest", "commit": "sealed shard"}


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


for _command in (cp_command, export_command, import_command):
    command.add_command(_command)
