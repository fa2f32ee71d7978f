"""``brainenc guard status|probe|drill``."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from brainenc.cli.guard_records import history_of, state_of
from brainenc.cli.local_out import LocalOut
from brainenc.cli.progress import Progress
from brainenc.errors import BrainencError, UsageError
from brainenc.guard import banner
from brainenc.guard.history import History
from brainenc.guard.incident import account
from brainenc.guard.policy import Meter, Policy, PolicyConfig, Thresholds, Timing
from brainenc.guard.probe import take_reading
from brainenc.units import format_bytes

EXAMPLE = """
\b
Example:
  brainenc guard probe
  brainenc guard status runs/first
  brainenc guard status features
  brainenc guard drill
"""


class _Group(click.Group):
    """Knows what else people look for here."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] == "watch":
            raise UsageError(f"`brainenc guard` has no `watch`: it is `brainenc {shlex.join(args[:2])}`.")
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, epilog=EXAMPLE)
def command() -> None:
    """Memory as the guard sees it, and drills."""


@command.command(epilog="\b\nExample:\n  brainenc guard status runs/first --json")
@click.argument("run", metavar="RUN|STORE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(run: str, as_json: bool) -> None:
    """What the guard of a run has seen: every worker's last word, and the account of every incident.

    Of a store: the same about the last extraction into it from this machine.
    """
    history = history_of(run)
    if as_json:
        click.echo(json.dumps(history.to_dict()))
        return
    click.echo("\n".join(_workers(history)))
    for incident in history.incidents:
        click.echo("\n" + account(incident, gone=_is_gone(incident["checkpoint"])))


@command.command(epilog="\b\nExample:\n  brainenc guard probe --disk runs --batch-size 8")
@click.option("--disk", "disks", multiple=True, metavar="FOLDER", help="Also tell the free space there.")
@click.option("--batch-size", type=int, help="Judge by the thresholds for this batch size.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def probe(disks: tuple[str, ...], batch_size: int | None, as_json: bool) -> None:
    """What is used and what may be, now, and what the guard would make of it."""
    row = Thresholds.preset(4 if batch_size is None else batch_size)
    thresholds = Thresholds.for_batch_size(row)
    for disk in disks:
        if not Path(disk).exists():  # its nearest parent that exists may lie on another disk
            raise UsageError(f"--disk {disk}: there is no such folder or file. Name one that exists.")
    reading = take_reading(*(disks or (".",)))
    meters = [Meter("ram", reading.ram.used, reading.ram.limit)]
    meters += [Meter(f"gpu{i}", g.used - g.slack, g.limit) for i, g in enumerate(reading.gpus)]
    decision = Policy(PolicyConfig(thresholds=thresholds)).look(0.0, meters, Timing())
    if as_json:
        named = {"batch_size": row, **asdict(thresholds)}
        click.echo(
            json.dumps({**reading.to_dict(), "thresholds": named, "level": decision.level, "reason": decision.reason})
        )
        return
    click.echo(banner.resources(reading))
    for level in reading.levels if len(reading.levels) > 1 else ():  # one alone is the line above
        click.echo(f"{level.fraction:6.1%}  {format_bytes(level.used)} of {format_bytes(level.limit)}  {level.source}")
    t, other = thresholds, "" if batch_size in (None, row) else f", whose row is used for {batch_size}"
    click.echo(
        f"Thresholds for a batch of {row}{other}: RAM warning at {t.ram_warn:.0%}, emergency at {t.ram_critical:.0%}; "
        f"GPU warning at {t.gpu_warn:.0%}, emergency at {t.gpu_critical:.0%}."
    )
    click.echo(f"This is {decision.level}: {decision.reason}.")


@command.command(epilog="\b\nExample:\n  brainenc guard drill --fault sigterm")
@click.option(
    "--fault", type=click.Choice(["ram", "gpu", "oom", "sigterm"]), default="ram", show_default=True,
    help="What happens in the middle of a small training.",
)  # fmt: skip
@click.option("--out", type=LocalOut(file_okay=False), help="Keep the files here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.argument("words", nargs=-1, metavar="")
def drill(fault: str, out: str | None, as_json: bool, words: tuple[str, ...]) -> None:
    """A fire drill on this machine: a small training is struck, saves, exits 75, resumes, and ends bit-equal.

    For a drill of a run of your own, see `brainenc train --drill`.
    """
    if words:
        raise UsageError(
            f"`brainenc guard drill` takes its fault as an option, found {shlex.join(words)!r}: write `brainenc guard "
            "drill --fault ram`. In a run of your own it is `brainenc train ... --drill ram=0.95@step=40`."
        )
    from brainenc.cli import guard_practice

    with tempfile.TemporaryDirectory() as scratch, Progress("drill", json_lines=as_json) as progress:
        report = guard_practice.practise(Path(out or scratch), fault, progress.note)
    if not out:
        report["saved"] = ""  # it went with the scratch folder
    if as_json:
        click.echo(json.dumps(report))
    if not report["passed"]:
        raise _DrillFailed(f"The drill failed: {report['failure']}")
    if not as_json:
        done = banner.symbols(sys.stdout.encoding).done
        where = f" {report['saved']}" if out else ""
        click.echo(f"{done}Drill passed: saved{where}, exit code 75, resumed, final weights bit-equal.")
        if report["invented"]:
            click.echo(f"This machine has no GPU: {report['invented']}")


def _is_gone(checkpoint: str | None) -> bool:
    """Whether it is not there any more; nobody can tell where its folder is one of another machine."""
    return checkpoint is not None and Path(checkpoint).parent.is_dir() and not Path(checkpoint).exists()


class _DrillFailed(BrainencError):
    """What should have saved the training did not."""


def _workers(history: History) -> list[str]:
    if not history.workers:
        raise UsageError("No worker has reported to the guard: it was switched off, or the run has only just begun.")
    width = max(12, *map(len, history.workers))
    lines = [f"{'worker':{width}} {'node':16} {'epoch':>5} {'done':>14}  memory   state"]
    for name, line in sorted(history.workers.items()):
        fraction = line["numbers"].get("fraction")
        used = f"{fraction:6.1%}" if fraction is not None else "     -"
        extracts = line.get("role") == "extract"
        epoch, done = ("-", f"{max(0, line['step'])} images") if extracts else (line["epoch"], f"step {line['step']}")
        lines.append(f"{name:{width}} {line['node'][:16]:16} {epoch:>5} {done:>14}  {used}   {state_of(line)}")
    return lines
