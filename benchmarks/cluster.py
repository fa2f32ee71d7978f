"""What the driver does alone, at sizes that no test machine has: planner, manifests, coordinator."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import Figure

TITLE = "At the size of a cluster"
NOTES = """
10,000,000 rows in 100,000 shards, 1,000 workers, simulated in one process each; the pieces are the real ones, without
the network. Times are CPU seconds of one core. Memory is the peak resident set of a fresh process. docs/scaling.md says
what limits beyond that.
"""
ROWS, SHARDS, WORKERS = 10_000_000, 100_000, 1_000


def run() -> list[Figure]:
    """Measure, each in a process of its own."""
    figures: list[Figure] = []
    for part in PARTS:
        done = subprocess.run([sys.executable, __file__, part], stdout=subprocess.PIPE, text=True, check=True)
        figures += [Figure(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]
    return figures


def peak_mb() -> float:
    """Largest resident set of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def timed(call: Callable[[], object]) -> tuple[float, object]:
    """CPU seconds of this process, which nobody else on the machine changes much, and what the call returned."""
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def planner() -> list[dict[str, object]]:
    """Which shards are left of four collections, half of them sealed."""
    from brainenc.extract.plan import Wanted, outstanding

    per_shard = ROWS // SHARDS
    wanted = [
        Wanted(
            key=f"big/dinov2-base/{layer}.q", stimuli="big", feature=f"{layer}.q", row_shape=(962, 768),
            row_bytes=962 * 768 * 2, n_rows=ROWS, rows_per_shard=per_shard, micro_batch=25,
            sealed=frozenset(range(layer % 2, SHARDS, 2)),
        )
        for layer in range(4)
    ]  # fmt: skip
    seconds, tasks = timed(lambda: outstanding(wanted))
    assert isinstance(tasks, list)
    assert len(tasks) == SHARDS
    return [
        {"name": "plan 4 collections of 10^7 rows, 10^5 shards", "value": seconds, "unit": "s", "target": 10.0,
         "at_most": True},
        {"name": "memory of that plan", "value": peak_mb(), "unit": "MB", "target": 1000.0, "at_most": True},
    ]  # fmt: skip


def stimuli() -> list[dict[str, object]]:
    """The list of images itself: written once, read at every plan."""
    from brainenc.featurestore import Stimulus, StimulusSet, open_store

    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder) / "store", create=True)
        n = ROWS // 10
        made = StimulusSet("big", (Stimulus(f"nsd-{i:08d}", f"images/{i:08d}.png", 300_000, "1") for i in range(n)))
        store.add_stimuli(made)
        del made
        seconds, found = timed(lambda: open_store(Path(folder) / "store").stimuli("big"))
        assert len(found) == n  # type: ignore[arg-type]
    note = "a tenth of the rows; grows in proportion"
    return [
        {"name": "read the list of 10^6 images", "value": seconds, "unit": "s", "target": 1.0, "at_most": True,
         "note": note},
        {"name": "memory of making and reading it", "value": peak_mb(), "unit": "MB", "target": 250.0, "at_most": True,
         "note": "with 77 MB of Python and Arrow; grows in proportion"},
    ]  # fmt: skip


def manifests() -> list[dict[str, object]]:
    """A manifest of all shards: written by one commit, read at every open."""
    from brainenc.featurestore.schema import CollectionSpec, Manifest, ShardEntry

    spec = CollectionSpec(
        identity={"weights": "xxh3:0"}, row_shape=(962, 768), dtype="float16", n_rows=ROWS, stimuli="big",
        stimuli_checksum="0" * 32, format="arrow", rows_per_shard=ROWS // SHARDS, allow_64bit=False, details={},
    )  # fmt: skip
    per_shard = ROWS // SHARDS
    entries = tuple(
        ShardEntry(shard=i, rows=per_shard, bytes=per_shard * 1_477_632 + 4096, data_offset=1024, checksum=f"{i:032x}")
        for i in range(SHARDS)
    )  # fmt: skip
    writing, data = timed(lambda: Manifest(spec=spec, shards=entries).to_bytes())
    reading, manifest = timed(lambda: Manifest.from_bytes(bytes(data), "manifest"))  # type: ignore[call-overload]
    assert isinstance(manifest, Manifest)
    assert manifest.shards == entries
    return [
        {"name": "open a manifest of 10^5 shards", "value": reading, "unit": "s", "target": 1.0, "at_most": True},
        {"name": "write that manifest", "value": writing, "unit": "s",
         "note": f"{len(bytes(data)) / 1e6:.1f} MB a commit, once a minute"},  # type: ignore[call-overload]
        {"name": "memory of both", "value": peak_mb(), "unit": "MB"},
    ]  # fmt: skip


def coordinator() -> list[dict[str, object]]:
    """Ten seconds' worth of reports at 1 Hz, one incident, and the second in which everybody answers it."""
    from brainenc.guard.coordinator import Coordinator
    from brainenc.guard.messages import CheckpointAck, WorkerReport

    made = Coordinator()
    numbers = {"ram": {"used": 8_000_000_000, "limit": 12_000_000_000, "fraction": 0.67}}

    def answer(worker: str, order: str, step: int) -> CheckpointAck | None:
        path = f"/checkpoints/step{step}"
        return CheckpointAck(order_id=order, worker=worker, epoch=0, step=step, path=path) if order else None

    def reports(second: int, level: str = "ok", order: str = "") -> None:
        """All workers, evenly over a second, with the tick twice a second that the driver asks for."""
        for w in range(WORKERS):
            if w % (WORKERS // 2) == 0:
                made.tick(float(second) + w / WORKERS)
            made.report(
                WorkerReport(
                    worker=f"rank{w}", seq=second, node=f"node{w // 8}", pid=w, epoch=0, step=second, numbers=numbers,
                    level=level if w == 17 else "ok",  # type: ignore[arg-type]
                    ack=answer(f"rank{w}", order, second),
                ),
                float(second) + w / WORKERS,
            )  # fmt: skip

    calm = 10
    seconds, _ = timed(lambda: [reports(s) for s in range(calm)])
    incident, _ = timed(lambda: reports(calm, "critical"))
    answers, _ = timed(lambda: reports(calm + 1, order=made.incidents[0].order.id))
    assert made.incidents[0].outcome == "saved"
    return [
        {"name": "coordinator, 1,000 workers at 1 Hz, calm: share of a core", "value": 100 * seconds / calm,
         "unit": "%", "target": 10.0, "at_most": True},
        {"name": "the same in a second with an incident", "value": 100 * incident, "unit": "%"},
        {"name": "the same in the second in which everybody answers it", "value": 100 * answers, "unit": "%"},
    ]  # fmt: skip


PARTS = {"planner": planner, "stimuli": stimuli, "manifests": manifests, "coordinator": coordinator}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps(PARTS[sys.argv[1]]()))
