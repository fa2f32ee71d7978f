"""Runs whose folder is not a local one: where they are worked on, here and on the nodes of a cluster."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from brainenc.errors import UsageError
from brainenc.featurestore.places import local_path
from brainenc.featurestore.places.mount import MountPlace, needs_staging
from brainenc.featurestore.places.object import ObjectPlace
from brainenc.featurestore.places.scratch import cache_root
from brainenc.redact import redact
from brainenc.train.mirror import EVERY_S, RunMirror, Target
from brainenc.train.run_folder import RunFolder

_addresses: dict[Path, str] = {}
"""Of this process: local folder -> where its run belongs. Not in a file, because an address may hold keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Elsewhere:
    """What a worker has to know of a run whose folder is not on a disk that all nodes share."""

    address: str
    """Of the run."""
    owner: str
    """Whose name is on it."""
    folder: str
    """Where the driver works on it."""
    host: str
    """The driver's machine and cache: who shares both, shares the folder."""


def is_elsewhere(run: str | Path) -> bool:
    """Whether a run folder's address is one that cannot be worked on in place."""
    path = local_path(str(run))
    return path is None or needs_staging(path)


def has_run(run: str | Path) -> bool:
    """Whether a run was begun there."""
    if not is_elsewhere(run):
        return RunFolder(run).config_file.exists()
    target, folder = _open(run)
    return RunMirror(target, folder).has_run()


@contextlib.contextmanager
def local_run(
    run: str | Path, *, new: bool = False, note: Callable[[str], None] = lambda text: None, every_s: float = EVERY_S
) -> Iterator[Path]:
    """The local folder of a run to train in, its own if it is local.

    Args:
        run: folder or URL.
        new: a new run; else one that goes on.
        note: called with lines for a person.
        every_s: seconds between two times that records are sent.

    Raises:
        UsageError: there is a run already, or none.
        TransferFailed, TakenOver: at the end, what was not sent; it lies in the local folder.
    """
    if not is_elsewhere(run):
        yield Path(run)
        return
    target, folder = _open(run)
    mirror = RunMirror(target, folder, every_s=every_s)
    _prepare(mirror, new)
    sent = "handed over, not confirmed" if isinstance(target, MountPlace) else "sent"
    note(f"{target.url} is worked on in {folder}; every {every_s:.0f} s, and after each checkpoint, it is {sent}.")
    with mirror:
        _addresses[folder] = str(run)
        try:
            yield folder
        finally:
            del _addresses[folder]


def address_of(folder: Path) -> str | None:
    """Where the run that is worked on in this local folder belongs, None if it is here. May hold keys."""
    return _addresses.get(folder)


def resume_command(out: str | Path, address: str | None = None) -> str:
    """What a person types to go on with a run, without credentials.

    Args:
        out: the local folder that it is worked on in; the command names the run's own place.
        address: of the Ray it was on, which the run itself does not know.
    """
    run = redact(address_of(Path(out)) or str(out))
    return f"brainenc train --resume {shlex.quote(run)}" + (f" --address {shlex.quote(address)}" if address else "")


def elsewhere(folder: Path) -> Elsewhere | None:
    """For the driver to hand to its workers: where the run in this local folder belongs, None if it is here.

    Sends what the driver has made so far, which workers on other nodes begin from.
    """
    address = _addresses.get(folder)
    if address is None:
        return None
    mirror = RunMirror(_open(address)[0], folder)
    mirror.push()
    return Elsewhere(address=address, owner=mirror.owner, folder=str(folder), host=_host())


@contextlib.contextmanager
def on_this_node(run: Elsewhere | None, *, sends: bool = True, every_s: float = EVERY_S) -> Iterator[Path | None]:
    """The local folder of a run for one worker, with the newest of what any node has sent in it.

    On the driver's node that is the driver's own folder, which the driver sends. On another one it is a folder of its
    own, which one of its workers sends: checkpoints as they become whole, records every 30 s and at the end.

    Args:
        run: what :func:`elsewhere` gave the driver.
        sends: whether this worker is the one of its node.
        every_s: seconds between two times that records are sent.

    Yields:
        The folder; None where the run's own path will do.
    """
    if run is None:
        yield None
        return
    target, folder = _open(run.address)
    drivers = run.host == _host()
    folder = Path(run.folder) if drivers else folder
    with _alone_on(folder):
        mirror = RunMirror(target, folder, owner=run.owner, every_s=every_s)
        mirror.merge()
    with contextlib.nullcontext() if drivers or not sends else mirror:
        yield folder


@contextlib.contextmanager
def _alone_on(folder: Path) -> Iterator[None]:
    """One process of this machine at a time: the first to come may have to clear what an older run left."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _host() -> str:
    return f"{os.uname().nodename}:{cache_root().absolute()}"


@contextlib.contextmanager
def run_to_look_at(run: str | Path) -> Iterator[Path]:
    """The local folder of a run to read and add results to, while it may be going on somewhere.

    Raises:
        UsageError: there is no run.
    """
    if not is_elsewhere(run):
        yield Path(run)
        return
    target, folder = _open(run)
    mirror = RunMirror(target, folder)
    if not mirror.is_ours():
        mirror = RunMirror(target, folder.with_name(f"{folder.name}.look"))
        _refuse_unless_there(mirror)
        mirror.fetch()
    before = mirror.stamps()
    yield mirror.folder
    mirror.push_changed(before)


def _open(run: str | Path) -> tuple[Target, Path]:
    path = local_path(str(run))
    target: Target = MountPlace.open(path, create=True) if path is not None else ObjectPlace.open(str(run), create=True)
    tag = hashlib.sha256(target.url.encode()).hexdigest()[:12]
    return target, cache_root().absolute() / "runs" / f"{target.url.rstrip('/').rpartition('/')[2]}-{tag}"


def _prepare(mirror: RunMirror, new: bool) -> None:
    if new and mirror.has_run():
        raise UsageError(
            f"{mirror.target.url} holds a run already. Go on with it by `{resume_command(mirror.target.url)}`, or "
            "choose another --out."
        )
    if new:
        shutil.rmtree(mirror.folder, ignore_errors=True)  # of a run that was never sent
        return
    if mirror.is_ours():
        mirror.merge()  # what other nodes made
        return
    _refuse_unless_there(mirror)
    mirror.fetch()


def _refuse_unless_there(mirror: RunMirror) -> None:
    if not mirror.has_run():
        raise UsageError(f"{mirror.target.url} is no run folder: it has no config.yaml. Give what --out was.")
