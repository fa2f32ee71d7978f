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


def own_bytes(pid: int) -> int:
    """Anonymous memory of a process and its part of what is shared, 0 when it is gone. Not the pages of libraries and
    stores that it maps: the kernel takes those back when memory is short."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


class Watched:
    """The most memory that a command and all that it started had at once, sampled while it runs."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.peak_bytes, self._root = 0, psutil.Process(process.pid)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(2.0):  # a look at all of them takes a tenth of a second of the demo's own time
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak_bytes = max(self.peak_bytes, sum(own_bytes(one.pid) for one in family))

    def stop(self) -> int:
        self._end.set()
        self._thread.join()
        return self.peak_bytes


class DemoBeside:
    """The demo as a newcomer types it, while something else goes on: three commands in turn, each in a session of its
    own: the demo, the same command again, and the same training on shuffled responses.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.out, self._folder = folder / "out", folder
        self.peak_bytes = 0
        self._process: subprocess.Popen | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def result(self, name: str) -> dict:
        """What one of the commands printed: ``demo``, ``again`` or ``shuffled``. Waits for all of them."""
        self._thread.join(timeout=380)
        assert (self._folder / f"{name}.stdout").exists(), f"{name} was not run: what came before it failed"
        assert (self._folder / f"{name}.code").read_text() == "0", (self._folder / f"{name}.stderr").read_text()[-4000:]
        return json.loads((self._folder / f"{name}.stdout").read_text().splitlines()[-1])

    def end(self) -> None:
        """Nothing of it stays, wherever it is."""
        self._ended.set()
        if (process := self._process) is not None and process.poll() is None:
            process.terminate()  # which stops its Ray, too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self._thread.join()

    def _work(self) -> None:
        what = ["--subject-dir", self.out / "data" / "subj01", "--store", self.out / "store"]
        feature = ["--feature", "dino-mini/2.q", "--shuffle-responses", "--epochs", 2, "--lr", 0.002]
        out = ["--workers", 0, "--out", self._folder / "shuffled"]
        for name, arguments in {
            "demo": ["demo", "--out", self.out],
            "again": ["demo", "--out", self.out],
            "shuffled": ["train", *what, *feature, *out],
        }.items():
            if self._ended.is_set() or not self._run(name, [*map(str, arguments), "--json"]):
                return

    def _run(self, name: str, arguments: list[str]) -> bool:
        with open(self._folder / f"{name}.stdout", "wb") as stdout, open(self._folder / f"{name}.stderr", "wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "brainenc", *arguments], stdout=stdout, stderr=err, start_new_session=True
            )
        watched = Watched(self._process)
        code = self._process.wait()
        self.peak_bytes = max(self.peak_bytes, watched.stop())
        (self._folder / f"{name}.code").write_text(str(code))
        return code == 0
