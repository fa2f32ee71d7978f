"""What the guard prints: the banner at start, the warning, the emergency block. Texts only; nothing is read here."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from brainenc.guard.policy import Thresholds
from brainenc.guard.probe import Reading
from brainenc.units import format_bytes

_RULE = "=" * 60


class Symbols(NamedTuple):
    """Marks in front of lines."""

    shield: str = "🛡️  "
    warning: str = "⚠️ "
    alarm: str = "🚨 "
    done: str = "✅ "
    failed: str = "❌ "


PLAIN = Symbols("", "WARNING: ", "!!! ", "OK: ", "FAILED: ")
"""For terminals and logs that cannot show the others."""


def symbols(encoding: str | None) -> Symbols:
    """Those that an output of this encoding can show."""
    try:
        "".join(Symbols()).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN
    return Symbols()


def say(text: str) -> None:
    """One block of text on standard error, also from a signal handler that interrupted a write to it."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (RuntimeError, ValueError, OSError):  # "reentrant call"; closed; a full disk, or a `tee` that has ended
        with contextlib.suppress(OSError):
            os.write(2, (text + "\n").encode(errors="replace"))


def _gb(n: float) -> str:
    return f"{n / 1e9:.1f}GB"


def resources(reading: Reading, allocations: Sequence[tuple[str, int, int, int]] = ()) -> str:
    """The machine as it is now.

    Args:
        reading: of the probe.
        allocations: of each GPU of torch: name, bytes allocated, reserved, total.
    """
    ram = reading.ram
    lines = [
        _RULE,
        "System Resource Check",
        _RULE,
        f"RAM: {_gb(ram.used)} / {_gb(ram.limit)} ({ram.fraction:.0%}), limit of {ram.source}",
    ]
    groups = [level for level in reading.levels if level.source != "host"]
    if groups and (tightest := min(groups, key=lambda level: level.limit)) != ram:
        lines += [
            f"     {_gb(tightest.used)} / {_gb(tightest.limit)} ({tightest.fraction:.0%}), limit of {tightest.source}, "
            "the tightest control group"
        ]
    if allocations:
        for name, allocated, reserved, total in allocations:
            lines += [
                f"GPU: {name}",
                f"GPU Memory: {_gb(allocated)} allocated",
                f"GPU Memory: {_gb(reserved)} reserved",
            ]
            lines += [f"GPU Total: {_gb(total)}"]
    else:
        lines += [f"GPU: {g.name}, {_gb(g.used)} / {_gb(g.limit)} used" for g in reading.gpus] or ["GPU: none"]
    lines += [f"Disk: {_gb(d.free)} free in {d.path}" for d in reading.disks]
    return "\n".join([*lines, _RULE])


def start(thresholds: Thresholds, *, every: int, eval_every: int, on_emergency: Sequence[str], marks: Symbols) -> str:
    """The guard is on: thresholds, how often it looks, what happens on emergency."""
    t = thresholds
    lines = [
        _RULE, f"{marks.shield}Automatic memory guard is ON", _RULE,
        "Thresholds:",
        f"  - GPU usage: warning at {t.gpu_warn:.0%}, emergency at {t.gpu_critical:.0%}",
        f"  - RAM usage: warning at {t.ram_warn:.0%}, emergency at {t.ram_critical:.0%}",
        *(f"  {marks.warning}{doubt}" for doubt in t.doubts()),
        "Checks:",
        f"  - Train: every {_batches(every)}",
        f"  - Eval:  every {_batches(eval_every)}",
        "  - Epoch start: always",
        "  - Beside the script: every 100 ms, every 10 ms above 70%",
        "On emergency:",
        *(f"  - {line}" for line in on_emergency),
        _RULE,
    ]  # fmt: skip
    return "\n".join(lines)


def _batches(n: int) -> str:
    return "batch" if n == 1 else f"{n} batches"


def warning(step: int, reason: str, marks: Symbols) -> str:
    """One line while it is only a warning."""
    return f"[Batch {step}] {marks.warning}{reason}"


def emergency(
    *,
    reason: str,
    epoch: int,
    step: int,
    saved: str,
    seconds: float,
    n_bytes: int,
    failures: Sequence[str],
    marks: Symbols,
    goes_on: bool = False,
    kept: bool = False,
) -> str:
    """What happened and where the checkpoint lies; ``saved`` is empty when it lies nowhere. ``goes_on``: it is not the
    end, because the batch is made smaller. ``kept``: it is an earlier one, to which there is nothing to add."""
    title = "MEMORY IS SHORT: saving, then a smaller batch" if goes_on and saved else "EMERGENCY STOP"
    lines = [_RULE, f"{marks.alarm}{title}", _RULE, f"Reason: {reason}", f"Current epoch: {epoch} (step {step})"]
    lines += [f"{marks.failed}could not save: {failure}" for failure in failures]
    if kept:
        lines += [f"{marks.done}Nothing was trained since the start: {saved} stays as it is."]
    elif saved:
        lines += [
            f"{marks.done}Emergency checkpoint saved: {saved} ({format_bytes(n_bytes)} in {seconds:.2f} s, verified)"
        ]
    else:
        lines += [
            f"{marks.failed}NOTHING WAS SAVED. Free disk space or give the guard `fallback_dirs`, then run again."
        ]
    return "\n".join([*lines, _RULE])


def farewell(path: str, marks: Symbols, *, short: bool) -> str:
    """The last lines: how to go on. ``short``: of memory, as far as is known."""
    lines = [
        f"{marks.done}Stopped safely (exit code 75). To resume, run the same command again: `guard.resume()` finds",
        f"   {path}",
    ]
    if short:
        lines.append("   If it stops again soon: a smaller batch, or fewer loader workers.")
    return "\n".join(lines)
