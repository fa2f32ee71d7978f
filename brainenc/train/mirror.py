"""A run folder on an object store or a mounted drive: worked on locally, handed over as it grows.

Training needs a folder where names change, files grow and flushes count; `gs://` and Drive are none. So the run lies on
local disk, below the cache folder, and a thread of the driver sends what is new: a checkpoint as soon as it is whole,
its manifest last; records and small files whole, every 30 s and at the end. Whoever goes on with the run, here or
elsewhere, takes what is newest first.

Who that is, a mark beside the run tells: a random owner's name and a number that grows. A machine whose name is on the
mark has everything that is there, and perhaps more. Another one takes all of it and puts its own name there; the first,
if it still runs, notices and sends nothing more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from brainenc import atomic
from brainenc.errors import BrainencError, TakenOver
from brainenc.featurestore.download import download
from brainenc.featurestore.places.base import Place
from brainenc.redact import redact

log = logging.getLogger(__name__)

EVERY_S = 30.0
"""Between two times that records are sent. GCS allows one write a second to an object."""
_LOOK_S = 2.0
_GROWING = (".jsonl", ".log")
_MARK, _STATE, _CHECKPOINTS, _MANIFEST = "mirror.json", ".mirror.json", "checkpoints", "manifest.json"


class Target(Place, Protocol):
    """A place whose files may also be replaced."""

    def replace(self, name: str, data: bytes) -> None:
        """Write a file or replace it."""
        ...

    def replace_file(self, name: str, path: Path) -> None:
        """The same with a local file's bytes."""
        ...


@dataclass(kw_only=True)
class _State:
    """What this machine knows to be at the target. Kept beside the run, so that a restart goes on from it."""

    owner: str
    push: int = 0
    sent: dict[str, list[int]] = field(default_factory=dict)
    """Name -> size and modification time when it was sent."""
    checkpoints: dict[str, str] = field(default_factory=dict)
    """Name -> hash of the manifest that was sent."""


class RunMirror:
    """Keeps a run folder and its place the same. Driver; a context manager whose thread sends.

    Args:
        target: where the run is to be.
        folder: where it is worked on.
        every_s: seconds between two times that records are sent.
        owner: whose name is on the run, where other machines of the same run send too; None: this folder's own.
    """

    def __init__(self, target: Target, folder: Path, *, every_s: float = EVERY_S, owner: str | None = None) -> None:
        self.target, self.folder, self._every_s = target, folder, every_s
        self._state = self._load_state()
        if owner is not None and (self._state is None or self._state.owner != owner):
            shutil.rmtree(folder, ignore_errors=True)  # of another time
            self._state = _State(owner=owner)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._sending = threading.Lock()

    # ---- taking

    def has_run(self) -> bool:
        """Whether there is a run at the target."""
        return self.target.size("config.yaml") is not None

    @property
    def owner(self) -> str:
        """Whose name this folder puts on the run."""
        assert self._state is not None, "claimed before"
        return self._state.owner

    def is_ours(self) -> bool:
        """Whether this folder has everything that is at the target."""
        return self._state is not None and self._mark().get("owner") == self._state.owner

    def fetch(self) -> None:
        """Take the run as it is at the target, replacing what is here."""
        shutil.rmtree(self.folder, ignore_errors=True)
        atomic.make_dirs(self.folder)
        state = _State(owner=secrets.token_hex(8))
        for entry in self.target.list():
            if entry.name == _MARK:
                continue
            self._take(entry.name, entry.size)
            state.sent[entry.name] = _stamp(self.folder / entry.name)
        for manifest in (self.folder / _CHECKPOINTS).glob(f"*/{_MANIFEST}"):
            state.checkpoints[manifest.parent.name] = _digest(manifest)
        self._state = state
        self._save_state(state)

    def merge(self) -> None:
        """Take what other machines of the same run have sent and this one lacks: after a rank has moved between them.

        Checkpoints that are not here (and were not pruned here), records that have grown, pointers that point further.
        """
        state = self._state
        assert state is not None, "a run of this owner"
        atomic.make_dirs(self.folder)
        there = {entry.name: entry.size for entry in self.target.list() if entry.name != _MARK}
        whole = {name.split("/")[1] for name in there if name.endswith(f"/{_MANIFEST}")}
        for name in whole - state.checkpoints.keys():
            for file in (one for one in there if one.startswith(f"{_CHECKPOINTS}/{name}/")):
                self._take(file, there[file])
            state.checkpoints[name] = _digest(self.folder / _CHECKPOINTS / name / _MANIFEST)
        for file in (one for one in there if one.count("/") < 2 and self._is_news(one, there[one])):
            self._take(file, there[file])
            state.sent[file] = _stamp(self.folder / file)
        self._save_state(state)

    def _is_news(self, name: str, size: int) -> bool:
        path = self.folder / name
        if not path.exists():
            return not name.startswith("predictions/")
        if path.suffix in _GROWING:
            return size > path.stat().st_size
        if path.parent.name != _CHECKPOINTS:
            return False
        try:
            here, there = json.loads(path.read_bytes()), json.loads(self.target.read(name))
        except ValueError:
            return True
        return bool(there.get("step", 0) > here.get("step", 0))

    def _take(self, name: str, size: int) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = atomic.partial_name(path)
        with open(aside, "wb") as file:
            download(self.target, name, file.fileno(), size)
        aside.replace(path)

    # ---- sending

    def claim(self) -> None:
        """Put this machine's name on the run."""
        atomic.make_dirs(self.folder)
        self._state = self._state or _State(owner=secrets.token_hex(8))
        self._save_state(self._state)
        self._put_mark(self._state)

    def push(self) -> None:
        """Send what is new: first what a checkpoint cannot be gone on from without, and the records up to it; then
        checkpoints; then what points to them. So a machine that dies in between loses nothing that is spoken of.

        Raises:
            TakenOver: another machine has taken the run.
            TransferFailed, NoSpace: the target did not take it; the next push tries again.
        """
        with self._sending:
            state = self._state
            assert state is not None, "claimed before"
            if self._mark().get("owner") != state.owner:
                raise TakenOver(
                    f"{self.target.url} is being gone on with by another machine. What this one made since lies in "
                    f"{self.folder}; it is not sent."
                )
            whole = self._manifests()  # before the records: what became whole later has records that are not sent yet
            self._push_files(state, lambda name: not _is_pointer(name))
            self._push_checkpoints(state, whole)
            self._push_files(state, lambda name: _is_pointer(name) and self._points_there(name, state))
            state.push += 1
            self._save_state(state)
            self._put_mark(state)

    def push_changed(self, since: dict[str, list[int]]) -> None:
        """Send files other than checkpoints that have changed, without claiming the run: scores, predictions."""
        for name, path in self._files():
            if since.get(name) != _stamp(path):
                self.target.replace_file(name, path)

    def stamps(self) -> dict[str, list[int]]:
        """Size and time of all files but checkpoints."""
        return {name: _stamp(path) for name, path in self._files()}

    # ---- while training

    def __enter__(self) -> RunMirror:
        self.claim()
        self._thread = threading.Thread(target=self._run, name="brainenc-mirror", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._thread is not None
        self._stop.set()
        self._thread.join()
        try:
            self.push()
        except BrainencError as error:
            if kind is None:
                raise
            log.warning("the end of the run was not sent: %s", error)

    def _run(self) -> None:
        waited = 0.0
        while not self._stop.wait(_LOOK_S if self._every_s > _LOOK_S else self._every_s):
            waited += _LOOK_S
            if waited < self._every_s and not self._new_checkpoints():
                continue
            waited = 0.0
            try:
                self.push()
            except TakenOver as error:
                log.error("%s", error)
                return
            except (BrainencError, OSError) as error:
                log.warning("not sent yet, tried again: %s", redact(str(error)))

    # ---- inside

    def _new_checkpoints(self) -> bool:
        known = self._state.checkpoints if self._state else {}
        return any(path.parent.name not in known for path in self._manifests())

    def _manifests(self) -> list[Path]:
        return sorted((self.folder / _CHECKPOINTS).glob(f"[!.]*/{_MANIFEST}"))

    def _push_checkpoints(self, state: _State, whole: Sequence[Path]) -> None:
        here = {path.parent.name: path for path in whole}
        for name, manifest in here.items():
            with contextlib.suppress(FileNotFoundError):  # pruned under our hands; the next push removes it there
                digest = _digest(manifest)
                if state.checkpoints.get(name) != digest:
                    if not self._is_there(name, manifest):  # a rank on this machine may have taken it from there
                        self._push_checkpoint(manifest.parent)
                    state.checkpoints[name] = digest
                    self._save_state(state)
        for name in sorted(state.checkpoints.keys() - here.keys()):
            self._remove_checkpoint(name)
            del state.checkpoints[name]

    def _is_there(self, name: str, manifest: Path) -> bool:
        try:
            return self.target.read(f"{_CHECKPOINTS}/{name}/{_MANIFEST}") == manifest.read_bytes()
        except FileNotFoundError:
            return not manifest.exists()

    def _push_checkpoint(self, folder: Path) -> None:
        prefix = f"{_CHECKPOINTS}/{folder.name}"
        self.target.delete(f"{prefix}/{_MANIFEST}")  # whole only while its manifest is there
        for path in sorted(folder.iterdir()):
            if path.name != _MANIFEST and path.is_file():
                self.target.replace_file(f"{prefix}/{path.name}", path)
        self.target.replace_file(f"{prefix}/{_MANIFEST}", folder / _MANIFEST)

    def _remove_checkpoint(self, name: str) -> None:
        prefix = f"{_CHECKPOINTS}/{name}/"
        self.target.delete(f"{prefix}{_MANIFEST}")
        for entry in list(self.target.list(prefix)):
            self.target.delete(entry.name)

    def _push_files(self, state: _State, wanted: Callable[[str], bool]) -> None:
        for name, path in self._files():
            if not wanted(name):
                continue
            with contextlib.suppress(FileNotFoundError):
                stamp = _stamp(path)
                if state.sent.get(name) != stamp:
                    if path.suffix not in _GROWING or (self.target.size(name) or 0) <= stamp[0]:
                        self.target.replace_file(name, path)  # else another machine's are longer
                    state.sent[name] = stamp

    def _files(self) -> Iterator[tuple[str, Path]]:
        """All files but hidden ones and those inside checkpoints."""
        for path in sorted(self.folder.rglob("*")):
            parts = path.relative_to(self.folder).parts
            inside = parts[0] == _CHECKPOINTS and len(parts) > 2
            if path.is_file() and not inside and not any(part.startswith(".") for part in parts):
                yield "/".join(parts), path

    def _points_there(self, name: str, state: _State) -> bool:
        """Whether a pointer's checkpoint is at the target; else both are sent the next time."""
        try:
            return json.loads((self.folder / name).read_bytes()).get("checkpoint") in state.checkpoints
        except (FileNotFoundError, ValueError):
            return False

    def _mark(self) -> dict[str, object]:
        try:
            found = json.loads(self.target.read(_MARK))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _put_mark(self, state: _State) -> None:
        self.target.replace(_MARK, json.dumps({"owner": state.owner, "push": state.push}).encode())

    def _load_state(self) -> _State | None:
        try:
            return _State(**json.loads((self.folder / _STATE).read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _save_state(self, state: _State) -> None:
        atomic.replace(self.folder / _STATE, json.dumps(asdict(state)).encode())


def _is_pointer(name: str) -> bool:
    return name.startswith(f"{_CHECKPOINTS}/") and name.endswith(".json")


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
