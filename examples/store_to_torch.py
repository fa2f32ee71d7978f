"""Features of a store in PyTorch: a row is the mapped memory itself, a batch one buffer that all cores fill.

    python examples/store_to_torch.py                                         # on a small store made on the spot
    python examples/store_to_torch.py --store features --key subj01-train/dinov2-base/11.q

The same rows feed any model: a ``DataLoader`` may shuffle them and have workers, which open the store themselves.
"""

import argparse
import tempfile

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from brainenc import open_store
from brainenc.featurestore.interop import torch_dataset

KEY = "mine-train/net/1.token"


def make_store(folder: str) -> str:
    """A small store of 200 images, 9 tokens of 16 channels each."""
    rows = np.random.default_rng(0).normal(size=(200, 9, 16))
    store = open_store(folder, create=True)
    with store.writer(KEY, ids=[f"nsd-{n:05d}" for n in range(200)], row_shape=rows.shape[1:]) as writer:
        writer.append(rows)
    return folder


def train(folder: str, key: str, epochs: int = 3) -> list[float]:
    """Fit a linear readout of the mean token to a made-up response; the loss of each epoch."""
    view = open_store(folder)[key]
    targets = np.stack([np.asarray(row, np.float32).mean() for row in view])
    dataset = torch_dataset(view, targets)  # rows are read-only: do not write to them
    first, _ = dataset[0]
    print(f"{len(dataset)} rows of {tuple(first.shape)} {first.dtype}")
    print(f"a single row is copied: {first.data_ptr() != view[0].ctypes.data}")

    torch.manual_seed(0)
    readout = nn.Linear(first.shape[-1], 1)
    optimizer = torch.optim.SGD(readout.parameters(), lr=0.5)
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for features, wanted in DataLoader(dataset, batch_size=32, shuffle=True):
            loss = nn.functional.mse_loss(readout(features.float().flatten(1, -2).mean(1))[:, 0], wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(wanted)
        losses.append(total / len(dataset))
        print(f"epoch {epoch}: loss {losses[-1]:.5f}")
    return losses


def main(argv: list[str] | None = None) -> list[float]:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="a folder or URL; without it one is made")
    parser.add_argument("--key", default=KEY)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        return train(options.store or make_store(scratch), options.key)


if __name__ == "__main__":
    main()
