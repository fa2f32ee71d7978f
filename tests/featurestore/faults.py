"""A process that dies, or an operating system that refuses, at a chosen step; and what a store must be like then."""

import contextlib
import functools
import os
import signal

from brainenc.errors import BrainencError
from brainenc.featurestore import open_store
from brainenc.featurestore.collection import Collection
from tests.featurestore.making import KEY, fill, stimuli, values

STEPS = ("open", "posix_fallocate", "pwrite", "ftruncate", "fsync", "link", "unlink", "mkdir")
"""Every call by which the store changes a disk."""

N, ROW_SHAPE, PER_SHARD = 8, (3,), 3


def extract_all(folder, *, acknowledge=lambda shard: None, collection_class=Collection):
    """The same command again: creates what is not there, computes what is not sealed, commits."""
    store = open_store(folder, create=True)
    store.add_stimuli(stimuli(N))
    made = store.create_collection(
        KEY, identity={"w": 1}, rows_per_shard=PER_SHARD, row_shape=ROW_SHAPE, dtype="float16"
    )
    collection = collection_class(made.place, made.key, made.spec)
    for shard in sorted(set(range(collection.n_shards)) - collection.sealed()):
        fill(collection, values(N, ROW_SHAPE), shards=[shard])
        acknowledge(shard)
    collection.commit()


class Injector:
    """Replaces the calls in ``os``, so that the ``at``-th one does ``what``.

    ``"kill"``, an errno to raise, or ``"torn"``: only writes count, and half of that one's bytes are written first.
    """

    def __init__(self, at, what):
        self.at, self.what, self.count, self.hit = at, what, 0, None

    @contextlib.contextmanager
    def active(self):
        """Patch ``os``; nothing else is told."""
        real = {name: getattr(os, name) for name in STEPS}
        for name, call in real.items():
            setattr(os, name, functools.partial(self._step, name, call))
        try:
            yield self
        finally:
            for name, call in real.items():
                setattr(os, name, call)

    def _step(self, name, call, *args, **kwargs):
        if name == "open" and not args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            return call(*args, **kwargs)
        if self.what == "torn" and name != "pwrite":
            return call(*args, **kwargs)
        self.count += 1
        if self.count == self.at:
            self.hit = name
            if self.what == "torn":
                call(args[0], args[1][: len(args[1]) // 2], args[2])
            if isinstance(self.what, int):
                raise OSError(self.what, os.strerror(self.what))
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)


def run_and_die(folder, at, what="kill", **options):
    """Extract in a child that dies at its ``at``-th step.

    Returns:
        (died, shards whose seal had returned)
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with Injector(at, what).active():
                extract_all(folder, acknowledge=lambda shard: os.write(write, bytes([shard])), **options)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        acknowledged = set(pipe.read())
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed instead of dying"
    return os.WIFSIGNALED(status), acknowledged


def problems(folder, acknowledged=()):
    """What is wrong with a store after a death, whatever the moment: an empty list, if it is a good store."""
    found = []
    if not (folder / "store.json").exists() or not (folder / KEY / "manifest-000001.json").exists():
        return [f"shard {shard} was acknowledged in no collection" for shard in acknowledged]
    collection = open_store(folder).collection(KEY)
    receipts, shards = collection.found()
    for shard in sorted(receipts | shards | {entry.shard for entry in collection.manifest().shards}):
        try:
            actual = collection.inspect(shard)
            if shard in receipts and collection.receipt(shard) != actual:
                found.append(f"receipt {shard} speaks of other bytes")
        except (BrainencError, FileNotFoundError) as error:
            found.append(f"shard {shard}: {error}")
    found += [f"shard {shard} was acknowledged and has no receipt" for shard in acknowledged if shard not in receipts]
    found += [f"shard {entry.shard} is committed without a receipt" for entry in collection.manifest().shards
              if entry.shard not in receipts]  # fmt: skip
    return found


def public(files):
    """Without the partials that dead writers left."""
    return {name: data for name, data in files.items() if not name.rpartition("/")[2].startswith(".")}
