"""What workers write into the run folder, shown on the driver as it comes. Driver; a thread that reads."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from brainenc.guard import banner
from brainenc.train.run_folder import RunFolder

Progress = Callable[[Mapping[str, Any]], None]
"""Called with each record as it is written."""
Note = Callable[[str], None]
"""Called with lines for a person."""

_POLL_S = 0.2


@contextmanager
def following(folder: RunFolder, progress: Progress, note: Note) -> Iterator[None]:
    """Show what workers, and the guard, write to the run folder as it comes."""
    with _tailing(
        [
            (_Tail(folder.log_file), lambda text: note(text.partition("] ")[2] or text)),
            (_Tail(folder.guard_file), lambda text: _warn(json.loads(text), note)),
            (_Tail(folder.metrics_file), lambda text: progress(json.loads(text))),
        ]
    ):
        yield


@contextmanager
def following_guard(folder: RunFolder, note: Note) -> Iterator[None]:
    """The guard's warnings alone, where everything else comes another way: a run in this process."""
    with _tailing([(_Tail(folder.guard_file), lambda text: _warn(json.loads(text), note))]):
        yield


def _warn(record: Mapping[str, Any], note: Note) -> None:
    """A warning of the guard as a line; whatever else it records is not for the terminal."""
    if record.get("kind") == "warning":
        text = f"{record['worker']}: {record['reason']}"
        note(banner.warning(int(record["step"]), text, banner.symbols(sys.stderr.encoding)))


@contextmanager
def _tailing(files: Sequence[tuple[_Tail, Callable[[str], None]]]) -> Iterator[None]:
    ended = threading.Event()
    thread = threading.Thread(target=_tail, args=(files, ended), name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _tail(files: Sequence[tuple[_Tail, Callable[[str], None]]], ended: threading.Event) -> None:
    while True:
        last = ended.wait(_POLL_S)
        for file, show in files:
            for text in file.new():
                with suppress(ValueError):  # a line that a crash has torn
                    show(text)
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
