"""``brainenc doctor``."""

from __future__ import annotations

import json

import click

from brainenc.guard.machine import Machine, examine, troubles
from brainenc.guard.probe import Reading
from brainenc.units import format_bytes

EXAMPLE = """
\b
Example:
  brainenc doctor
  brainenc doctor /content/drive/MyDrive runs --json
"""


@click.command(epilog=EXAMPLE)
@click.argument("folders", nargs=-1, metavar="[FOLDER]...")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def command(folders: tuple[str, ...], as_json: bool) -> None:
    """The machine, its limits as seen from inside, GPUs, Ray, disk; what will not work.

    FOLDERs are where stores and runs will lie; the current one by default.
    """
    machine = examine(folders or (".",))
    found = troubles(machine)
    if as_json:
        click.echo(json.dumps({**machine.to_dict(), "troubles": found}))
        return
    click.echo("\n".join(_lines(machine)))
    ending = ["What will not work, or not well:", *(f"  - {text}" for text in found)]
    click.echo("\n" + "\n".join(ending if found else ["Nothing is in the way."]))


def _lines(machine: Machine) -> list[str]:
    lines = [f"{machine.system}, Python {machine.python}, {machine.cores} cores" + (", Colab" if machine.colab else "")]
    lines.append("  ".join(f"{name} {version}" for name, version in machine.versions.items()))
    lines += ["", "Memory (what counts is the fullest):", *_memory(machine.reading)]
    lines += ["", "GPUs:", *(f"   {_use(g.used, g.limit)}  {g.name}" for g in machine.reading.gpus)]
    lines += [] if machine.reading.gpus else ["   none"]
    lines += ["", "Disk:"]
    lines += [f"   {_room(f.free, f.total)}  {f.path} ({f.file_system or '?'})" for f in machine.folders]
    monitor = "off" if machine.ray_threshold is None else f"kills at {machine.ray_threshold:.0%}"
    address = machine.ray_address or "none, a local one is started"
    loop = f"in Python ({machine.why_not_compiled})" if machine.why_not_compiled else "in C"
    lines += ["", f"Ray: memory monitor {monitor}; address {address}"]
    return [*lines, f"Memory guard: the watcher's loop is {loop}"]


def _memory(reading: Reading) -> list[str]:
    lines = [
        f" {'*' if level == reading.ram else ' '} {_use(level.used, level.limit)}  {level.source}"
        for level in reading.levels
    ]
    if reading.pressure is not None:
        some, full = reading.pressure
        lines.append(f"   pressure: some {some:.1f} %, full {full:.1f} % of the last 10 s")
    if reading.shm is not None:
        lines.append(f"   {_room(reading.shm.free, reading.shm.total)}  /dev/shm")
    return lines


def _use(used: int, limit: int) -> str:
    return f"{used / limit:6.1%}  {format_bytes(used)} of {format_bytes(limit)}"


def _room(free: int, total: int) -> str:
    return f"{format_bytes(free)} free of {format_bytes(total)}"
