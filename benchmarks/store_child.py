"""What ``benchmarks/store.py`` measures in processes of their own: ``python store_child.py TASK FOLDER [N]``."""

import json
import os
import sys
import time

import numpy as np

from brainenc.featurestore import StimulusSet, open_store

KEY, MANY = "bench/dinov2-base/11.q", "many/dinov2-base/11.token"


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def many(folder: str, n: str) -> None:
    """A store of very many very small shards; flushed once, by whoever wants it to last."""
    os.fsync = lambda _: None
    store = open_store(folder, create=True)
    store.add_stimuli(StimulusSet.from_ids("many", (f"nsd-{i:05d}" for i in range(int(n)))))
    collection = store.create_collection(MANY, identity={}, rows_per_shard=1, row_shape=(8,), dtype="float16")
    for shard in range(collection.n_shards):
        with collection.shard_writer(shard) as writer:
            writer.append(np.full((1, 8), shard % 1000))
            writer.seal()
    collection.commit()


def opened(folder: str) -> None:
    """Open, and read one row."""
    before, started = anonymous(), time.perf_counter()
    view = open_store(folder)[MANY]
    row = view[4321]
    seconds = time.perf_counter() - started
    assert row[0] == 321
    print(json.dumps({"seconds": seconds, "anonymous": anonymous() - before}))


def epochs(folder: str) -> None:
    """Ten epochs of random batches, slices now and then; anonymous memory after each."""
    view = open_store(folder)[KEY]
    out, rng, seen = np.zeros((32, *view.shape[1:]), view.dtype), np.random.default_rng(0), []
    started = time.perf_counter()
    for _ in range(10):
        order = rng.permutation(len(view))
        for start in range(0, len(order), 32):
            rows = order[start : start + 32]
            view.prefetch(order[start + 32 : start + 64])
            view.gather(rows, out=out[: len(rows)])
            if start % 320 == 0:
                float(view[int(rows[0])].max())  # through a map
        seen.append(anonymous())
    print(json.dumps({"seconds": time.perf_counter() - started, "anonymous": seen}))


if __name__ == "__main__":
    {"many": many, "open": opened, "epochs": epochs}[sys.argv[1]](*sys.argv[2:])
