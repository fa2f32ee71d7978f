"""What workers write into the run folder, shown on the driver as it comes. Driver; a thread that reads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from brainenc.train.run_folder import RunFolder

Progress = Callable[[Mapping[str, Any]], None]
"""Called with each record as it is written."""
Note = Callable[[str], None]
"""Called with lines for a person."""

_POLL_S = 0.2


@contextmanager
def following(folder: RunFolder, progress: Progress, note: Note) -> Iterator[None]:
    """Show what workers write to the run folder as it comes."""
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(folder, progress, note, ended), name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _follow(folder: RunFolder, progress: Progress, note: Note, ended: threading.Event) -> None:
    records = _Tail(folder.metrics_file)
    lines = _Tail(folder.log_file)
    while True:
        last = ended.wait(_POLL_S)
        for text in lines.new():
            note(text.partition("] ")[2] or text)
        for text in records.new():
            with suppress(ValueError):
                progress(json.loads(text))
        if last:
            return


class _Tail:
    """Whole lines that were appended to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = path.stat().st_size if path.exists() else 0

    def new(self) -> list[str]:
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return whole.decode(errors="replace").splitlines()
