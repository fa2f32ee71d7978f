"""A measured figure, and the page made of all of them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure of one run."""

    name: str
    """What was measured, as a reader would ask for it."""
    value: float
    unit: str = "x"
    """``x`` for a ratio; else ``s``, ``MB``, ``images/s`` ..."""
    target: float | None = None
    at_most: bool = False
    """The target is an upper bound (else a lower one)."""
    reference: str = ""
    """What a ratio was measured against, with its own value, in the same run."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target holds; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def row(self) -> str:
        """A row of the table."""
        goal = "" if self.target is None else f"{'≤' if self.at_most else '≥'} {self.target:g}"
        verdict = {True: "yes", False: "**no**", None: ""}[self.met]
        cells = (self.name, f"{self.value:.4g} {self.unit}", goal, verdict, self.reference, self.note)
        return "| " + " | ".join(c.replace("|", "/").replace("\n", " ") for c in cells) + " |"


def machine() -> dict[str, Any]:
    """The machine that a run was measured on, as far as it matters for reading the figures."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")), ""
        )
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def save(area: str, title: str, figures: Iterable[Figure], notes: str, seconds: float) -> None:
    """Keep the figures of one area; the page is made of all that were kept."""
    RESULTS.mkdir(exist_ok=True)
    record = {
        "title": title,
        "machine": machine(),
        "seconds": round(seconds, 1),
        "notes": notes.strip(),
        "figures": [asdict(f) for f in figures],
    }
    (RESULTS / f"{area}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def with_others(area: str, measured: Iterable[Figure]) -> list[Figure]:
    """The area's kept figures with these in the places of their names; new ones at the end."""
    path = RESULTS / f"{area}.json"
    kept = json.loads(path.read_text())["figures"] if path.exists() else []
    new = {figure.name: figure for figure in measured}
    return [new.pop(k["name"], Figure(**k)) for k in kept] + list(new.values())


def page(order: Iterable[str]) -> str:
    """``BENCHMARKS.md``."""
    parts = [
        "# Benchmarks\n\n"
        "Written by `make bench` (`python -m benchmarks AREA ...` for single areas). Ratios are against a reference\n"
        "measured in the same run, because machines are shared and noisy; absolute values are for orientation only.\n"
    ]
    for area in order:
        path = RESULTS / f"{area}.json"
        if not path.exists():
            parts.append(f"## {area}\n\nNot measured yet.\n")
            continue
        kept = json.loads(path.read_text())
        m = kept["machine"]
        head = f"## {kept['title']}\n\n{m['cores']} cores, {m['cpu']}, Python {m['python']}; {kept['seconds']:g} s.\n"
        table = "| what | measured | target | met | reference | note |\n|---|---|---|---|---|---|\n"
        rows = "\n".join(Figure(**f).row() for f in kept["figures"])
        notes = f"\n{kept['notes']}\n" if kept["notes"] else ""
        parts.append(f"{head}\n{table}{rows}\n{notes}")
    return "\n".join(parts)
