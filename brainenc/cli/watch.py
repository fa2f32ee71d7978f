"""``brainenc watch RUN``."""

from __future__ import annotations

import json
import sys
import time

import click

from brainenc.cli.guard_records import history_of, state_of
from brainenc.guard.history import History

EXAMPLE = """
\b
Example:
  brainenc watch runs/first
  brainenc watch runs/first --once --json
"""
_BAR = 24


@click.command(epilog=EXAMPLE)
@click.argument("run", metavar="RUN|STORE")
@click.option("--every", type=float, default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Look once and end.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a look.")
def command(run: str, every: float, once: bool, as_json: bool) -> None:
    """Memory, guard state and progress of a run, live, until Ctrl-C. Reads files only.

    Of a store: the guard of the extraction into it from this machine.
    """
    live = sys.stdout.isatty() and not as_json and not once
    height = 0
    while True:
        history = history_of(run)
        if as_json:
            click.echo(json.dumps({"at": time.time(), **history.to_dict()}))
        else:
            lines = picture(history)
            if live and height:
                click.echo(f"\x1b[{height}A\x1b[J", nl=False)  # back to the first line, clear what follows
            height = len(lines)
            click.echo("\n".join(lines))
        if once:
            return
        try:
            time.sleep(every if live or as_json else max(every, 10.0))
        except KeyboardInterrupt:
            return


def picture(history: History) -> list[str]:
    """The run as it stands, a few lines."""
    p = history.progress
    lines = []
    if p:
        loss = p.get("loss")
        told = f"  loss {loss:.4f}" if isinstance(loss, float) else ""
        total = f"/{p['steps']}" if p.get("steps") else ""
        best = f"  best val_perf {history.best:.4f}" if history.best is not None else ""
        lines.append(f"epoch {p.get('epoch')}  step {p.get('step')}{total}{told}{best}")
    for name, line in sorted(history.workers.items()):
        lines.append(f"{name:12} {_filled(line['numbers'].get('fraction'))}  {state_of(line)}")
        gpus = enumerate(line["numbers"].get("gpus", []))
        lines += [f"{'  gpu' + str(i):12} {_filled(gpu['fraction'])}" for i, gpu in gpus]
    if history.open_order is not None:
        lines.append(f"ORDER: {history.open_order['do']} because {history.open_order['reason']}")
    lines += [
        f"incident {i['number']}: {i['order']['reason']}: {i['outcome']} {i['checkpoint'] or ''}"
        for i in history.incidents[-3:]
    ]
    return lines or ["nothing has been recorded yet"]


def _filled(fraction: float | None) -> str:
    if fraction is None:
        return "-" * _BAR + "       "
    full = round(min(1.0, fraction) * _BAR)
    return "#" * full + "." * (_BAR - full) + f" {fraction:6.1%}"
