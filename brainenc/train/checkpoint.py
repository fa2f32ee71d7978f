"""A checkpoint is a folder: ``model.safetensors``, ``state.pt``, and ``manifest.json`` with their hashes, written last.

It is written under a private name, flushed, read back, and renamed into place: what has its final name is whole, and
what is not whole (a copy cut short, a bit that flipped) is noticed by its hashes and passed over by :func:`newest`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import xxhash

from brainenc import atomic
from brainenc.errors import CheckpointUnusable, NoSpace
from brainenc.train.tensorfile import write_tensors

VERSION = 1
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
_NAME = re.compile(r"(emergency_)?epoch(\d+)_step(\d+)")
_BLOCK = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How far a run is. All else (place in the epoch, order of samples, random numbers) follows from it."""

    step: int
    """Finished optimizer steps."""
    epoch: int
    """Epoch of the last finished step, from 0."""
    validated: int = 0
    """Epochs whose validation is done."""
    micro_batch: int = 0
    """Largest number of samples in one forward; 0 when the run has not chosen yet."""
    best: float | None = None
    """Best ``val_perf`` so far."""
    val_perf: float | None = None
    """Score of these very weights, where they were validated: the best is found by it, without a pointer."""

    def name(self, *, emergency: bool = False) -> str:
        """Name of this position's checkpoint folder."""
        return f"{'emergency_' if emergency else ''}epoch{self.epoch}_step{self.step}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint folder holds."""

    position: Position
    files: Mapping[str, Mapping[str, Any]]
    """File name -> ``bytes`` and ``xxh3_128``."""
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Which features, responses and split the weights were trained on."""
    reason: str = ""
    """Why an emergency checkpoint was written."""
    version: int = VERSION

    def to_json(self) -> bytes:
        """As written to ``manifest.json``."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, default=str).encode() + b"\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What goes into a checkpoint. Tensors are read when it is written, so they must hold still until then."""

    position: Position
    weights: Callable[[], Mapping[str, torch.Tensor]]
    """``model.state_dict``, called when they are written: an encoder's state dict may be a copy in another order."""
    optimizer: Mapping[str, Any]
    """``optimizer.state_dict()``."""
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """What the learning rate and the place in the epoch follow from, beside the position."""
    random: Mapping[str, Any] = field(default_factory=dict)
    """Seed, and how random numbers derive from it: no generator has a state that matters between two steps."""

    def state(self) -> dict[str, Any]:
        """What goes into ``state.pt``: plain containers, numbers and tensors, so that it loads with weights only."""
        plain = json.loads(json.dumps({"config": self.config, "provenance": self.provenance}, default=str))
        return {
            "version": VERSION, "position": asdict(self.position), "optimizer": dict(self.optimizer),
            "scheduler": dict(self.scheduler), "random": dict(self.random), **plain,
        }  # fmt: skip


def write(root: Path, contents: Contents, *, emergency: bool = False, reason: str = "", verify_it: bool = True) -> Path:
    """Write a checkpoint below ``root``; durable and verified on return.

    A whole checkpoint of the same run and position that is there already is kept, if it was validated as this one was;
    one that is not whole, or that another run has left in this place, is replaced.

    Raises:
        NoSpace: the disk or quota is full; nothing is left behind.
        CheckpointUnusable: what was read back is not what was written, or another run writes to this place, too.
        OSError: the folder cannot be written to.
    """
    final = root / contents.position.name(emergency=emergency)
    if final.exists():
        with contextlib.suppress(CheckpointUnusable):
            there = verify(final)
            if _run_of(there) == _run_of(contents) and there.position.validated >= contents.position.validated:
                return final
    atomic.make_dirs(root)
    partial = atomic.partial_name(final)
    try:
        partial.mkdir()
        _fill(partial, contents, reason)
        if verify_it:
            verify(partial)
        if final.exists():
            discard(final)
        os.rename(partial, final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another rank has just published the same position
            shutil.rmtree(partial, ignore_errors=True)
            if _run_of(verify(final)) != _run_of(contents):
                raise CheckpointUnusable(
                    f"{final} is of another run, and cannot be replaced: that run writes to {root} now, or its files "
                    "are not ours to remove. Give each run a place of its own."
                ) from error
            return final
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in _FULL:
            raise NoSpace(
                error.errno, f"No space left for a checkpoint in {root}: free some, or choose another place with --out."
            ) from error
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    atomic.fsync_dir(root)
    return final


def _run_of(what: Manifest | Contents) -> str:
    """Which run; an earlier one in the same folder had another id."""
    return str(what.config.get("id", ""))


_FULL = (errno.ENOSPC, errno.EDQUOT)


def _fill(folder: Path, contents: Contents, reason: str) -> None:
    files = {}
    with _Hashing(folder / WEIGHTS) as file:
        write_tensors(file, contents.weights(), {"format": "pt", "made_by": "brainenc"})  # type: ignore[arg-type]
    files[WEIGHTS] = file.entry()
    with _Hashing(folder / STATE) as file:
        _save_without_crc(contents.state(), file)
    files[STATE] = file.entry()
    manifest = Manifest(
        position=contents.position, files=files, config=contents.config, provenance=contents.provenance, reason=reason
    )
    with open(folder / MANIFEST, "wb") as out:
        out.write(manifest.to_json())
        out.flush()
        os.fsync(out.fileno())
    atomic.fsync_dir(folder)


def _save_without_crc(state: Mapping[str, Any], file: _Hashing) -> None:
    """The zip's own checksums would take longer than ours and the copying together."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, file)  # type: ignore[arg-type]
    finally:
        torch.serialization.set_crc32_options(before)


class _Hashing:
    """A file that hashes what is written to it, and is flushed to disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._hash = xxhash.xxh3_128()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        for start in range(0, len(data), _BLOCK):  # a block stays in cache between hash and copy
            block = data[start : start + _BLOCK]
            self._hash.update(block)
            self._file.write(block)
        self._bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def entry(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "xxh3_128": self._hash.hexdigest()}

    def __enter__(self) -> _Hashing:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def verify(folder: Path) -> Manifest:
    """Read a whole checkpoint and compare its hashes.

    Raises:
        CheckpointUnusable: it is torn, of another version, or its bytes are not those that were written.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointUnusable(f"{folder} is torn: {name} is missing.")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointUnusable(f"{folder} is torn: {name} has {size} bytes, its manifest says {entry['bytes']}.")
        if _hash(path) != entry["xxh3_128"]:
            raise CheckpointUnusable(f"{folder} is damaged: the bytes of {name} are not those that were written.")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, its files unchecked.

    Raises:
        CheckpointUnusable: there is none, it is of another version, or it names files outside of the folder.
    """
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
        if found["version"] != VERSION:
            raise CheckpointUnusable(
                f"{folder} has version {found['version']} of the checkpoint format, this brainenc reads {VERSION}: "
                "use the brainenc that wrote it."
            )
        manifest = Manifest(**{**found, "position": Position(**found["position"])})
        # Joined to the folder as they are: a folder that came from somewhere must not have other files read.
        if outside := [name for name in manifest.files if name in ("", "..") or Path(name).name != name]:
            raise CheckpointUnusable(f"{folder} is not to be trusted: its {MANIFEST} names {outside[0]!r} as a file.")
        return manifest
    except FileNotFoundError as error:
        raise CheckpointUnusable(f"{folder} is torn: it has no {MANIFEST}, which is written last.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointUnusable(f"{folder} is torn: its {MANIFEST} cannot be read ({error}).") from error


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A checkpoint on disk, by its name alone."""

    folder: Path
    epoch: int
    step: int
    emergency: bool


def list_checkpoints(root: Path) -> list[Found]:
    """Every folder named as a checkpoint, newest step first; of one step, the regular one first."""
    named = [(path, _NAME.fullmatch(path.name)) for path in (root.iterdir() if root.is_dir() else ())]
    found = [
        Found(folder=path, emergency=bool(match[1]), epoch=int(match[2]), step=int(match[3]))
        for path, match in named
        if match and path.is_dir()
    ]
    return sorted(found, key=lambda f: (-f.step, f.emergency))


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The newest checkpoint that verifies, and those that were passed over."""

    folder: Path | None
    manifest: Manifest | None
    skipped: tuple[str, ...]
    """Why each newer one was passed over."""


NOTHING = Choice(folder=None, manifest=None, skipped=())
"""No checkpoint was looked for, or none is there."""


def newest(roots: Iterable[Path], run_id: str | None = None) -> Choice:
    """The newest checkpoint in any of the folders that verifies and, where an id is given, belongs to that run."""
    skipped: list[str] = []
    candidates = sorted((c for root in roots for c in list_checkpoints(root)), key=lambda f: (-f.step, f.emergency))
    for candidate in candidates:
        try:
            manifest = verify(candidate.folder)
            if run_id is None or _run_of(manifest) == run_id:
                return Choice(folder=candidate.folder, manifest=manifest, skipped=tuple(skipped))
            skipped.append(f"{candidate.folder} belongs to another run that was in this place.")
        except CheckpointUnusable as error:
            skipped.append(str(error))
        except OSError as error:
            skipped.append(f"{candidate.folder} cannot be read: {error}.")
    return Choice(folder=None, manifest=None, skipped=tuple(skipped))


def load_state(folder: Path) -> dict[str, Any]:
    """``state.pt``, with its tensors mapped and not copied."""
    state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    return state


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Load the weights of a checkpoint into a model.

    Raises:
        CheckpointUnusable: names or shapes are not those of the model; those that differ are listed.
    """
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt", device="cpu") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        check_keys(folder, shapes, {name: tuple(t.shape) for name, t in model.state_dict().items()})
        model.load_state_dict({name: file.get_tensor(name) for name in names})


def load_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Copy an optimizer's state over the one that was allocated for it.

    Args:
        state: ``state.pt``.
        optimizer: of the same parameters, its state allocated.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        for number, saved in state["optimizer"]["state"].items():
            for name, value in saved.items():
                optimizer.state[parameters[int(number)]][name].copy_(value)


def check_keys(where: object, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors of a checkpoint with those of a model, by name and shape.

    Raises:
        CheckpointUnusable: they differ.
    """
    differences = [f"{n}: missing in the checkpoint" for n in wanted if n not in found]
    differences += [f"{n}: unknown to the model" for n in found if n not in wanted]
    differences += [
        f"{n}: {found[n]} in the checkpoint, {wanted[n]} in the model"
        for n in wanted
        if n in found and found[n] != wanted[n]
    ]
    if differences:
        shown = "; ".join(differences[:8]) + (f"; and {len(differences) - 8} more" if len(differences) > 8 else "")
        raise CheckpointUnusable(
            f"{where} is a checkpoint of another model: {shown}. Use the configuration it was trained with, or start "
            "a new run with another --out."
        )


def discard(folder: Path) -> None:
    """Remove a checkpoint, manifest first: a half-removed one must not look whole."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(folder / MANIFEST)
    shutil.rmtree(folder, ignore_errors=True)


def prune(written: Path, *, keep: int, best: str | None = None) -> list[Path]:
    """Remove what the checkpoint that was just written has made superfluous, beside it and of the same run.

    Of its run stay: this one; the newest ``keep`` regular ones up to it and the newest emergency one; the best, which
    are the one of that name and the one with the highest score in its manifest (a pointer may be behind). Only whole
    ones count. Newer ones are left alone, since a run that writes here has passed them over; and so are those of other
    runs, whose data it is not for this one to remove. What has no manifest was being removed when somebody died.

    Args:
        written: the checkpoint, durable.
        keep: see above.
        best: name of the best checkpoint.

    Returns:
        The folders that were removed.
    """
    manifest = read_manifest(written)
    here = {found: _Seen.at(found.folder) for found in list_checkpoints(written.parent)}
    ours = [found for found, seen in here.items() if seen.run == _run_of(manifest)]
    whole = [found for found in ours if here[found].whole]
    regular = [found for found in whole if not found.emergency and found.step <= manifest.position.step]
    emergency = [found for found in whole if found.emergency]
    highest = max((f for f in whole if here[f].score is not None), key=lambda f: here[f].rank(f), default=None)
    kept = {written.name, best, *(f.folder.name for f in (*regular[:keep], *emergency[:1], highest) if f is not None)}
    spare = [
        found.folder
        for found, seen in here.items()
        if (found in ours or seen.half_removed)
        and found.step <= manifest.position.step
        and found.folder.name not in kept
    ]
    for folder in spare:
        discard(folder)
    return spare


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What a folder tells without its bytes being read."""

    run: str | None = None
    """None: it does not tell whose it is, or cannot be looked at now."""
    score: float | None = None
    whole: bool = False
    """Its files have the sizes in its manifest."""
    half_removed: bool = False

    @classmethod
    def at(cls, folder: Path) -> _Seen:
        try:
            if not (folder / MANIFEST).exists():
                return cls(half_removed=True)
            manifest = read_manifest(folder)
            sizes = {name: path.stat().st_size for name in manifest.files if (path := folder / name).is_file()}
        except (CheckpointUnusable, OSError):
            return cls()
        perf = manifest.position.val_perf
        return cls(
            run=_run_of(manifest), score=perf if perf == perf else None,
            whole=all(sizes.get(name) == entry["bytes"] for name, entry in manifest.files.items()),
        )  # fmt: skip

    def rank(self, found: Found) -> tuple[float, int, bool]:
        """The best is the first of the highest score."""
        return (self.score or 0.0, -found.step, not found.emergency)


def wait_for_writers(roots: Sequence[Path], *, patience_s: float, still_s: float = 3.0) -> None:
    """Until nothing is being written below ``roots``: what was begun has got its name, or has not moved for ``still_s``
    seconds; or so many seconds have passed."""
    end, seen, since = time.monotonic() + patience_s, None, time.monotonic()
    while time.monotonic() < end:
        now = {path: _size(path) for root in roots for path in (*root.glob(".*.partial"), *root.glob(".*.partial/*"))}
        if now != seen:
            seen, since = now, time.monotonic()
        if not now or time.monotonic() - since >= still_s:
            return
        time.sleep(0.2)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # it has just got its name
        return -1


def sweep(root: Path) -> None:
    """Remove what writers that died left behind. Only while nobody writes there."""
    for path in root.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)
