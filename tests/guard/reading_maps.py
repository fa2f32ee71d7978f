"""Read a file larger than the memory limit at random through a map, with a guard on: prints every alarm it hears.

python reading_maps.py FILE SECONDS
"""

import json
import mmap
import random
import sys
import time

from brainenc.guard.worker import WorkerGuard, WorkerGuardConfig


class Listening(WorkerGuard):
    """Keeps what the watcher says."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alarms, self.readings = [], []

    def _hear(self, message):
        if message["kind"] == "decision" and message["level"] != "ok":
            self.alarms.append(message)
        if message["kind"] == "reading":
            self.readings.append(message)
        return super()._hear(message)


def main():
    path, seconds = sys.argv[1], float(sys.argv[2])
    random.seed(0)
    row, read = 1 << 20, 0
    with Listening("rank0", WorkerGuardConfig()) as guard, open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        rows = len(mapped) // row
        held = bytearray(b"\1") * (40 << 20)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            at = random.randrange(rows) * row
            read += len(bytes(mapped[at : at + row]))
        last = guard.readings[-1]
        spent = last["cpu_s"] - guard.readings[0]["cpu_s"]
        wall = last["at"] - guard.readings[0]["at"]
    fractions = [reading["levels"][0]["used"] / reading["levels"][0]["limit"] for reading in guard.readings]
    found = {"alarms": guard.alarms, "read": read, "held": len(held), "highest": max(fractions)}
    found |= {"watcher_cores": spent / wall if wall else 0.0, "limit": last["levels"][0]["limit"]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
