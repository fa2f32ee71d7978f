"""Small stores for tests."""

import numpy as np

from brainenc.featurestore import Stimulus, StimulusSet, open_store

KEY = "subj01-train/dinov2-mini/3.q"


def ids(n):
    return [f"nsd-{i:05d}" for i in range(n)]


def stimuli(n, name="subj01-train"):
    return StimulusSet(name, (Stimulus(i, f"images/{i}.png", 100 + row, str(row)) for row, i in enumerate(ids(n))))


def values(n, row_shape=(4, 6), seed=0):
    """Float32 rows that every dtype holds, each different."""
    rng = np.random.default_rng(seed)
    return rng.integers(-128, 128, (n, *row_shape)).astype(np.float32)


def make_collection(folder, n=23, *, row_shape=(4, 6), rows_per_shard=5, dtype="float16", key=KEY, **more):
    store = open_store(folder, create=True)
    store.add_stimuli(stimuli(n, key.split("/")[0]))
    identity = more.pop("identity", {"weights": "abc", "layer": 3, "facet": "q"})
    return store.create_collection(
        key, identity=identity, rows_per_shard=rows_per_shard, row_shape=row_shape, dtype=dtype, **more
    )


def fill(collection, rows, *, shards=None, environment=None):
    """Write and seal shards, in batches of three rows."""
    for shard in range(collection.n_shards) if shards is None else shards:
        mine = rows[collection.rows(shard).start : collection.rows(shard).stop]
        with collection.shard_writer(shard, environment=environment or {"torch": "2"}) as writer:
            for start in range(0, len(mine), 3):
                writer.append(mine[start : start + 3])
            writer.seal(content_hashes=[f"{row:x}" for row in collection.rows(shard)])


def make_view(folder, n=23, **more):
    """A whole, committed collection: its view, and the rows that were written."""
    collection = make_collection(folder, n, **more)
    rows = values(n, collection.row_shape)
    fill(collection, rows)
    collection.commit()
    return collection.view(), rows


def tree(folder):
    """Every file of a store and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def sum_of_rows(view, results):
    """What a child process does with a view: sum all its rows, one gather each."""
    results.put(sum(float(view.gather([row], threads=2).astype(np.float64).sum()) for row in range(len(view))))
