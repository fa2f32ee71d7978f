"""Features of a store as a Ray dataset: blocks are read by the workers, where Ray runs them.

    python examples/store_to_ray.py                                           # on a small store made on the spot
    python examples/store_to_ray.py --store features --key subj01-train/dinov2-base/11.q

On a cluster give an address that every node reaches: the workers open the store themselves.
"""

import argparse
import tempfile

import numpy as np

from brainenc import open_store

KEY = "mine-train/net/1.token"


def make_store(folder: str) -> str:
    """A small store of 200 images, 9 tokens of 16 channels each."""
    rows = np.random.default_rng(0).normal(size=(200, 9, 16))
    store = open_store(folder, create=True)
    with store.writer(KEY, ids=[f"nsd-{n:05d}" for n in range(200)], row_shape=rows.shape[1:]) as writer:
        writer.append(rows)
    return folder


def norms(folder: str, key: str) -> dict[str, float]:
    """Stimulus id -> length of the image's mean token."""

    def measure(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        features = batch["features"].astype(np.float32)
        mean = features.reshape(len(features), -1, features.shape[-1]).mean(1)
        return {"id": batch["id"], "norm": np.linalg.norm(mean, axis=1)}

    rows = open_store(folder).to_ray(key, rows_per_block=64)  # columns id, row, features
    return {row["id"]: float(row["norm"]) for row in rows.map_batches(measure).iter_rows()}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="a folder or URL that every node reaches; without it one is made")
    parser.add_argument("--key", default=KEY)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        found = norms(options.store or make_store(scratch), options.key)
    longest = max(found, key=found.__getitem__)
    print(f"{len(found)} images; the longest mean token is that of {longest}: {found[longest]:.3f}")
    return found


if __name__ == "__main__":
    main()
