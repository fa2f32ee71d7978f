"""The JSON-lines files that a run leaves behind: one object a line, appended, never rewritten.

A process may die in the middle of a line, and a resumed run repeats steps: :func:`read` drops torn lines, and
:func:`standing` those that a later run did again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends objects to a file, a whole line in one write. Threads may share one; so may processes (``O_APPEND``),
    but for a line that a full disk tears: it costs the next one of another process, too."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock = threading.Lock()
        self._torn = _ends_torn(self.path)
        """The last line has no end (a writer died, or the disk was full): it must not swallow the next object."""

    def write(self, **fields: Any) -> None:
        """Append one object. NaN and infinity become null: JSON has neither.

        Raises:
            OSError: it could not be written; later ones may be.
        """
        line = json.dumps(_finite(fields), separators=(",", ":"), allow_nan=False) + "\n"
        with self._lock:
            left = (b"\n" if self._torn else b"") + line.encode()
            while left:  # once, unless the disk gets full
                done = os.write(self._fd, left)
                left, self._torn = left[done:], done < len(left)

    def close(self, *, flush: bool = True) -> None:
        """Close; with ``flush`` what was written survives a power cut."""
        if self._fd >= 0:
            if flush:
                os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Every whole object in the file, in order; lines that are no JSON object (torn by a death) are skipped."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def standing(lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The metrics of a run as if it had never been interrupted.

    A later run (its counter ``run``) went on from some step: what older ones wrote from there on is superseded.

    Args:
        lines: records with ``step``, ``split`` and ``run``, as :func:`read` gives them; others are left out.
    """
    lines = [line for line in lines if "split" in line]
    began: dict[int, tuple[int, bool]] = {}
    for line in lines:
        run = int(line.get("run", 0))
        began[run] = min(began.get(run, _place(line)), _place(line))
    for line in lines:
        if all(_place(line) < place for run, place in began.items() if run > int(line.get("run", 0))):
            yield line


def _place(line: dict[str, Any]) -> tuple[int, bool]:
    """Order of a record in a run: by step, and a validation after the training step that it follows."""
    return int(line.get("step", 0)), line["split"] != "train"


def _ends_torn(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
