"""The same rows in other people's stores: 32 random rows into one buffer. Runs in an environment of its own.

    python store_peers.py ROWS.npy SCRATCH     ->  {"zarr": {"batch": GB/s, "by hand": GB/s}, ...} on the last line

Each peer in the layout that suits it best (one row a chunk, no compression), written once, read warm; best of rounds.
Twice where it makes a difference: a batch as the peer's own pages read one (a list of indices where it takes one, else
samples that are collected and stacked, as a loader's collate does), and by hand, row after row straight into the
buffer, which is the fastest that anybody could make of it.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np

BATCH, BATCHES, ROUNDS = 32, 8, 3


def h5py_(rows, folder):
    import h5py

    path = folder / "rows.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=rows)  # contiguous: the fastest to read
    data = h5py.File(path)["x"]

    def chosen(batch, out):
        rows, places = np.unique(batch, return_inverse=True)  # it takes rising indices only
        np.take(data[rows], places, axis=0, out=out)

    def by_hand(batch, out):
        for target, row in enumerate(batch):
            data.read_direct(out, np.s_[row : row + 1], np.s_[target : target + 1])

    return chosen, by_hand


def zarr_(rows, folder):
    import zarr

    array = zarr.create_array(str(folder / "rows.zarr"), shape=rows.shape, chunks=(1, *rows.shape[1:]),
                              dtype=rows.dtype, compressors=None)  # fmt: skip
    array[:] = rows
    return lambda batch, out: np.copyto(out, array.oindex[batch])


def tensorstore_(rows, folder):
    import tensorstore as ts

    spec = {"driver": "zarr3", "kvstore": f"file://{folder}/rows.ts/", "metadata": {
        "shape": list(rows.shape), "data_type": "float16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, *rows.shape[1:]]}},
    }}  # fmt: skip
    store = ts.open(spec, create=True).result()
    store.write(rows).result()
    return lambda batch, out: np.copyto(out, store[batch].read().result())


def lance_(rows, folder):
    import lance
    import pyarrow as pa

    width = rows[0].size

    def batches():
        for row in rows:
            yield pa.record_batch([pa.FixedSizeListArray.from_arrays(pa.array(row.ravel()), width)], ["x"])

    schema = pa.schema([("x", pa.list_(pa.float16(), width))])
    data = lance.write_dataset(batches(), str(folder / "rows.lance"), schema=schema)

    def read(batch, out):
        column = data.take(list(map(int, batch))).column("x").combine_chunks()
        chunk = column if isinstance(column, pa.Array) else column.chunk(0)
        np.copyto(out, chunk.flatten().to_numpy(zero_copy_only=False).reshape(out.shape))

    return read


def datasets_(rows, folder):
    import datasets

    shape = rows.shape[1:]
    features = datasets.Features({"x": datasets.Array2D(shape, "float16")})
    made = datasets.Dataset.from_generator(lambda: ({"x": row} for row in rows), features=features,
                                           cache_dir=str(folder / "hf"))  # fmt: skip
    data = made.with_format("numpy")
    return lambda batch, out: np.copyto(out, data[batch]["x"])


def litdata_(rows, folder):
    import litdata
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder / "lit"), chunk_bytes="256MB")
    for index, row in enumerate(rows):
        writer.add_item(index, {"x": row})
    writer.done()
    writer.merge(1)
    return _by_sample(litdata.StreamingDataset(str(folder / "lit")))


def streaming_(rows, folder):
    from streaming import MDSWriter, StreamingDataset

    shape = ",".join(map(str, rows.shape[1:]))
    with MDSWriter(out=str(folder / "mds"), columns={"x": f"ndarray:float16:{shape}"}, size_limit=1 << 28) as writer:
        for row in rows:
            writer.write({"x": row})
    return _by_sample(StreamingDataset(local=str(folder / "mds"), shuffle=False, batch_size=1))


def _by_sample(data):
    """Data sets that give one sample at a time."""

    def collated(batch, out):
        np.stack([data[int(row)]["x"] for row in batch], out=out)

    def by_hand(batch, out):
        for target, row in enumerate(batch):
            out[target] = data[int(row)]["x"]

    return collated, by_hand


PEERS = {
    "datasets": datasets_, "litdata": litdata_, "streaming": streaming_, "zarr": zarr_, "tensorstore": tensorstore_,
    "h5py": h5py_, "lance": lance_,
}  # fmt: skip


def measure(read, rows):
    """Best GB/s over the rounds; every byte is compared in the first."""
    rng, out = np.random.default_rng(0), np.empty((BATCH, *rows.shape[1:]), rows.dtype)
    best = 0.0
    for attempt in range(ROUNDS):
        batches = [rng.integers(0, len(rows), BATCH) for _ in range(BATCHES)]
        started = time.perf_counter()
        for batch in batches:
            read(batch, out)
        best = max(best, BATCHES * out.nbytes / (time.perf_counter() - started) / 1e9)
        if attempt == 0 and not np.array_equal(out, rows[batches[-1]]):
            raise AssertionError("the rows that were read are not those that were written")
    return best


def main():
    """Measure every peer that works here; say why another does not."""
    warnings.simplefilter("ignore")
    rows, scratch, found = np.load(sys.argv[1], mmap_mode="r"), Path(sys.argv[2]), {}
    for name, make in PEERS.items():
        folder = scratch / name
        folder.mkdir()
        try:
            made = make(rows, folder)
            forms = made if isinstance(made, tuple) else (made, made)
            found[name] = {form: measure(read, rows) for form, read in zip(("batch", "by hand"), forms, strict=True)}
        except Exception as error:  # a peer that cannot do this on this machine is a finding, not a failure
            found[name] = f"{type(error).__name__}: {error}"[:200]
        print(name, found[name], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
