"""One run of ``brainenc demo`` in the background, with the memory of all its processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil


def pss(pid: int) -> int:
    """Proportional set size of a process in bytes, 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


class Watched:
    """Largest sum of proportional set sizes of a command and all that it started, sampled while it runs."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.peak_bytes, self._root = 0, psutil.Process(process.pid)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(1.0):  # a look at all of them takes a tenth of a second of the demo's own time
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak_bytes = max(self.peak_bytes, sum(pss(one.pid) for one in family))

    def stop(self) -> int:
        self._end.set()
        self._thread.join()
        return self.peak_bytes


class DemoBeside:
    """The demo as a newcomer types it, in a session of its own, while something else goes on."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._result = folder, None
        command = [sys.executable, "-m", "brainenc", "demo", "--out", str(folder / "out"), "--json"]
        with open(folder / "stdout", "wb") as stdout, open(folder / "stderr", "wb") as stderr:
            self._process = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True)
        self._watched = Watched(self._process)

    def result(self) -> dict:
        """What it printed, where it is and what it took; waits for it."""
        if self._result is None:
            code = self._process.wait(timeout=360)
            assert code == 0, (self._folder / "stderr").read_text()[-4000:]
            printed = json.loads((self._folder / "stdout").read_text().splitlines()[-1])
            self._result = {"out": self._folder / "out", "peak_bytes": self._watched.stop(), **printed}
        return self._result

    def end(self) -> None:
        """Nothing of it stays, wherever it is."""
        self._process.terminate()  # which stops its Ray, too
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._watched.stop()
