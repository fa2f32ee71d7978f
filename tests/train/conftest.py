"""A small subject with stored features that training learns from in seconds."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from brainenc.datasets import layout
from brainenc.datasets.rois import ROI_CLASSES
from brainenc.featurestore.store import open_store
from brainenc.guard.messages import NullGuard, Order
from brainenc.train import checkpoint, prepare, worker
from brainenc.train.config import TrainConfig
from brainenc.train.encoders.base import EncoderConfig
from brainenc.train.inputs import StoredViews
from brainenc.train.run_folder import RunFolder
from brainenc.train.team import Solo
from brainenc.train.worker import Surroundings, work

GRID, WIDTH, VERTICES = (4, 4), 16, (30, 26)


@dataclass(frozen=True)
class Small:
    """Where the small subject and its features lie."""

    subject_dir: Path
    store: Path

    def config(self, out: Path, *, dropout: float = 0.1, **fields) -> TrainConfig:
        """A configuration that trains on it."""
        encoder = {"hidden": 16, "n_heads": 2, "feedforward": 32, "dropout": dropout} | fields.pop("encoder", {})
        given = {
            "subject_dir": str(self.subject_dir), "store": str(self.store), "features": ("tiny/1.q",), "out": str(out),
            "encoder": EncoderConfig(**encoder), "epochs": 2, "batch_size": 8, "workers": "0", "threads": 1,
            "guard": {"enabled": False},
        }  # fmt: skip
        return TrainConfig(**given | fields)


def make_subject(folder: Path, rng: np.random.Generator, features: np.ndarray, n_test: int) -> None:
    """Responses of V vertices, each a readout of the mean of some tokens, and noise."""
    n_train = len(features) - n_test
    for split, first, count in (("train", 0, n_train), ("test", n_train, n_test)):
        images = folder / layout.images_dir(split)
        images.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (i % 256,) * 3).save(images / layout.image_name(split, i + 1, first + i))
    (folder / "roi_masks").mkdir()
    for hemisphere, n_vertices in zip(("lh", "rh"), VERTICES, strict=True):
        signal = features[:n_train, 1:].mean(1) @ rng.normal(size=(WIDTH, n_vertices))
        responses = signal / signal.std(0) + 0.3 * rng.normal(size=signal.shape)
        file = folder / layout.responses_file("train", hemisphere)
        file.parent.mkdir(exist_ok=True)
        np.save(file, responses.astype(np.float32))
        for roi_class, rois in ROI_CLASSES.items():
            labels = rng.integers(0, len(rois) + 1, n_vertices)
            np.save(folder / layout.mask_file(hemisphere, roi_class, "challenge"), labels)
    for roi_class, rois in ROI_CLASSES.items():
        names = np.array(dict(enumerate(("Unknown", *rois))), dtype=object)
        np.save(folder / layout.mapping_file(roi_class), names, allow_pickle=True)


def _make(root: Path, *, n_train: int, n_test: int) -> Small:
    rng = np.random.default_rng(0)
    n = n_train + n_test
    features = rng.normal(size=(n, 1 + GRID[0] * GRID[1], WIDTH)).astype(np.float16)
    make_subject(root / "subj01", rng, features, n_test=n_test)
    store = open_store(root / "store", create=True)
    details = {"n_prefix": 1, "grid": list(GRID)}
    for split, rows in (("train", slice(0, n_train)), ("test", slice(n_train, n))):
        ids = [f"nsd-{i:05d}" for i in range(n)[rows]]
        for name, part in (("1.q", features[rows]), ("2.token", 2 * features[rows])):
            with store.writer(
                f"subj01-{split}/tiny/{name}", ids=ids, row_shape=part.shape[1:], details=details, rows_per_shard=16
            ) as writer:
                writer.append(part)
    return Small(root / "subj01", root / "store")


@pytest.fixture(scope="session")
def make_small():
    """Makes such a subject of another size in a folder."""
    return _make


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """45 training and 5 test images, 30 and 26 vertices, features of 1 + 4 x 4 tokens of 16."""
    return _make(tmp_path_factory.mktemp("small"), n_train=45, n_test=5)


class ThreadTeam:
    """A rank among others that are threads of this process: the loop's own rules, without the cost of processes.

    ``torch.manual_seed`` is one for all threads, so that only runs without dropout are repeatable.
    """

    def __init__(self, rank: int, size: int, shared: dict) -> None:
        self.rank, self.size, self.local_rank, self._shared = rank, size, rank, shared
        self._round = 0

    def _all(self, value) -> list:
        """Every rank's value. A rank that never comes breaks the barrier for all."""
        from brainenc.train.team import RankLost

        self._round += 1
        key, shared = self._round, self._shared
        with shared["lock"]:
            shared.setdefault(key, {})[self.rank] = value
        try:
            shared["barrier"].wait(timeout=90)
        except threading.BrokenBarrierError as error:
            raise RankLost(self.rank, "another thread", "broken barrier") from error
        values = [shared[key][r] for r in range(self.size)]
        with suppress(threading.BrokenBarrierError):  # everybody has read what it needs before round + 2 begins
            shared["barrier"].wait(timeout=90)
        return values

    def exchange(self, word):
        return np.stack(self._all(word.copy()))

    def exchange_text(self, text):
        return self._all(text)

    def sum(self, tensors):
        tensors = list(tensors)
        copies = self._all([t.clone() for t in tensors])
        for i, tensor in enumerate(tensors):
            tensor.copy_(sum(c[i] for c in copies))

    def sum_array(self, array):
        return sum(self._all(array.copy()))

    def broadcast(self, value, source):
        return self._all(value)[source]

    def fill(self, tensors, source):
        tensors = list(tensors)
        copies = self._all([t.detach().clone() for t in tensors])
        for tensor, found in zip(tensors, copies[source], strict=True):
            tensor.data.copy_(found)

    def close(self):
        pass


@pytest.fixture
def run_ranks(monkeypatch):
    """Run ``work(config)`` as one or more ranks; returns every rank's outcome, or raises what a rank raised."""
    lock, make = threading.Lock(), worker.make_model

    def one_at_a_time(*args):
        with lock:  # threads share one generator, and each seeds it before it draws its first weights
            return make(*args)

    monkeypatch.setattr(worker, "make_model", one_at_a_time)

    def run(config: TrainConfig, ranks: int = 1, around=lambda rank: {}) -> list:
        folder = RunFolder(config.out)
        views = StoredViews(config)
        if not folder.config_file.exists():
            folder.create(config)
            prepare.save_split(config, folder)
        shared = {"lock": threading.Lock(), "barrier": threading.Barrier(ranks)}

        def one(rank: int):
            team = Solo() if ranks == 1 else ThreadTeam(rank, ranks, shared)
            try:
                return work(
                    config, Surroundings(team=team, device=torch.device("cpu"), open_views=views, **around(rank))
                )
            except BaseException:
                shared["barrier"].abort()
                raise

        with ThreadPoolExecutor(ranks) as pool:
            return [f.result() for f in [pool.submit(one, rank) for rank in range(ranks)]]

    return run


class StopAt(NullGuard):
    """A guard that orders something once a step is finished."""

    def __init__(self, step: int, kind: str = "stop") -> None:
        self.step, self.kind, self.now, self.acks = step, kind, -1, []

    def pending(self):
        due = self.now >= self.step and not (self.acks and self.kind != "stop")
        return Order(kind=self.kind, reason=f"asked at step {self.step}") if due else None

    def beat(self, *, epoch: int, step: int) -> None:
        self.now = step

    def reserve(self, n_bytes: int, what: str) -> None:
        assert n_bytes > 0

    def saved(self, *, path: str, step: int, epoch: int, error: str = "") -> None:
        self.acks.append((path, step, epoch, error))

    def computing(self):
        return nullcontext()

    def updating(self):
        return nullcontext()


@pytest.fixture
def stop_at():
    """The class of a guard that orders something once a step is finished."""
    return StopAt


@pytest.fixture
def losses():
    """Training losses of a run by step, as if it had never been interrupted."""

    def read(out: Path) -> dict[int, float]:
        return {r["step"]: r["loss"] for r in RunFolder(out).metrics() if r["split"] == "train"}

    return read


@pytest.fixture
def final_state():
    """Weights and optimizer state of a run's newest checkpoint, as one dict of tensors."""

    def read(out: Path) -> dict[str, torch.Tensor]:
        found = checkpoint.newest([RunFolder(out).checkpoints])
        state = checkpoint.load_state(found.folder)["optimizer"]["state"]
        moments = {f"{i}.{name}": t for i, entry in state.items() for name, t in entry.items()}
        return load_file(found.folder / checkpoint.WEIGHTS) | moments

    return read
