"""``python -m benchmarks [AREA ...]``: measure, keep, and write ``BENCHMARKS.md``.

``AREA.PART`` measures a part of an area again (of those that have parts) and leaves its other figures as they were.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path

from benchmarks import figures

AREAS = ("store", "backbones", "extract", "encoders", "train", "scoring", "guard", "cluster")
"""Each is a module here with ``TITLE``, ``run() -> list[Figure]`` and ``NOTES`` (also what did not work)."""


def main(names: list[str]) -> int:
    unknown = sorted({name.partition(".")[0] for name in names} - set(AREAS))
    if unknown:
        print(f"No such area: {', '.join(unknown)}. There is: {', '.join(AREAS)}.", file=sys.stderr)
        return 2
    missed = 0
    for name in names or AREAS:
        area, _, part = name.partition(".")
        module = import_module(f"benchmarks.{area}")
        print(f"== {module.TITLE}", flush=True)
        started = time.perf_counter()
        measured = module.run((part,)) if part else module.run()
        kept = figures.with_others(area, measured) if part else measured
        figures.save(area, module.TITLE, kept, module.NOTES, time.perf_counter() - started)
        for figure in measured:
            print(figure.row(), flush=True)
        missed += sum(f.met is False for f in measured)
    (Path(__file__).parents[1] / "BENCHMARKS.md").write_text(figures.page(AREAS))
    print(f"{missed} target(s) missed; see BENCHMARKS.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
