"""Emergency checkpoints of PyTorch objects, written while memory is short. This file and ``states`` know torch.

One file, ``emergency_epoch<E>.pth``, as people know it: ``torch.load`` opens it, with ``model_state_dict``,
``optimizer_state_dict``, ``epoch``, ``step`` and the random number states in it. It is streamed tensor by tensor (on a
GPU the extra memory is one tensor's), hashed on the way, flushed, read back, and only then gets its name.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import xxhash

from brainenc import atomic
from brainenc.errors import CheckpointUnusable, NeedsTrust, NoSpace
from brainenc.guard.nvml import Nvml
from brainenc.guard.probe import space
from brainenc.guard.release import release
from brainenc.guard.states import as_given, plain
from brainenc.out_of_memory import is_out_of_memory
from brainenc.units import format_bytes

FORMAT = 1
_CHUNK = 1 << 20
_ALONE_S = 2.0
"""So long at most for another process that puts a file into the same folder."""


def payload(
    objects: Mapping[str, Any], *, epoch: int, step: int, rng: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """What goes into the file; tensors are referenced, not copied.

    Args:
        objects: name -> anything with ``state_dict()``; None is left out.
        epoch: counted from 0, the one that was running.
        step: batches of that epoch that are finished.
        rng: from :func:`capture_rng`.
        more: plain values to keep as well.
    """
    states = {f"{name}_state_dict": plain(thing.state_dict()) for name, thing in objects.items() if thing is not None}
    return {"format": FORMAT, "epoch": epoch, "step": step, **states, "rng": dict(rng), **more}


def payload_bytes(objects: Mapping[str, Any]) -> int:
    """About how large the file will be: an optimizer that has not stepped yet will hold two copies of the model."""
    sizes = {n: _tensor_bytes(o.state_dict()) for n, o in objects.items() if o is not None}
    if "optimizer" in sizes and sizes["optimizer"] == 0:
        sizes["optimizer"] = 2 * sizes.get("model", 0)
    return sum(sizes.values())


def copied_bytes(objects: Mapping[str, Any]) -> int:
    """Memory that gathering the states takes: most hand out the tensors that they have, but an average may copy them.
    Asks twice and compares."""
    try:
        first = [t for thing in objects.values() for t in _tensors(thing.state_dict())]
        again = {t.untyped_storage().data_ptr() for thing in objects.values() for t in _tensors(thing.state_dict())}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return payload_bytes(objects)
    return _tensor_bytes([t for t in first if t.untyped_storage().data_ptr() not in again])


def write(content: Mapping[str, Any], final: Path) -> int:
    """Write the file durably; whatever stood under its name is replaced in one step. Returns its bytes.

    Raises:
        NoSpace: the disk has no room for it.
        OSError: it cannot be written there.
        CheckpointUnusable: what was read back is not what was written.
    """
    import torch

    final.parent.mkdir(parents=True, exist_ok=True)
    _require_space(final.parent, _tensor_bytes(content) + (1 << 20))
    partial = atomic.partial_name(final)
    try:
        with open(partial, "xb", buffering=0) as file:
            stream = _Hashing(file.fileno())
            try:
                torch.save(dict(content), cast("Any", stream))
            except RuntimeError:
                if stream.failure is None:
                    raise
                # torch ends its archive all the same, and then tells of that: "unexpected pos" instead of a full disk.
                raise stream.failure from None
            os.fsync(file.fileno())
        found = _file_hash(partial)
        if found != stream.digest():
            raise CheckpointUnusable(f"{partial} reads back other bytes than were written; the disk cannot be trusted.")
        # The old sum goes first, the new one comes last: a file without a sum is checked by its own CRCs instead.
        with _alone(final.parent):  # else the sum of one process could come to the file of another
            sum_path(final).unlink(missing_ok=True)
            os.replace(partial, final)
            atomic.fsync_dir(final.parent)
            atomic.replace(sum_path(final), f"{found}  {final.name}\n".encode())
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return stream.written


def verify(path: Path) -> None:
    """Check a file against its XXH128 (``xxh128sum -c`` does the same), or the CRCs inside it where that is missing.

    Raises:
        CheckpointUnusable: torn, changed, or no checkpoint.
    """
    try:
        if sum_path(path).exists():
            wanted = sum_path(path).read_text().split()[0]
            if (found := _file_hash(path)) != wanted:
                raise CheckpointUnusable(f"{path} has the XXH128 {found}, its .xxh128 says {wanted}: changed or torn.")
            return
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile, IndexError, UnicodeDecodeError) as error:
        raise CheckpointUnusable(f"{path} is torn or no checkpoint: {error}.") from error
    if bad is not None:
        raise CheckpointUnusable(f"{path} is damaged in {bad}.")


def load(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """Read a file that verifies, onto the CPU.

    Args:
        path: the file.
        trust: also run code that is pickled inside: only for files of one's own.

    Raises:
        NeedsTrust: it is whole, but needs ``trust``.
        CheckpointUnusable: torn, or of another format.
    """
    import pickle

    import torch

    verify(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise NeedsTrust(
            f"{path} holds objects that are no plain tensors and numbers ({str(error).splitlines()[0]}). "
            "If you wrote it yourself, resume with `guard.resume(trust=True)`; to start afresh, move it away."
        ) from error
    except Exception as error:  # bits that no sum covers: torch finds many words for them
        if is_out_of_memory(error):
            raise
        raise CheckpointUnusable(f"{path} is damaged: {type(error).__name__}: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointUnusable(f"{path} has format {found!r}; this brainenc reads format {FORMAT}.")
    return content


def run_of(path: Path, *, trust: bool = False) -> str | None:
    """Which run has written a file; empty where it does not say. None: it cannot be read. Reads no tensor."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust, mmap=True)
        return str(content.get("run", ""))
    except Exception:  # damaged, or in need of trust that it does not have: nobody has gone on from it
        return None


def sum_path(path: Path) -> Path:
    """Where the XXH128 of a checkpoint lies: at 29 GB/s, where SHA-256 takes half a second for every gigabyte twice."""
    return path.with_name(path.name + ".xxh128")


def restore(content: Mapping[str, Any], objects: Mapping[str, Any], where: Path) -> None:
    """Put the states back into their objects.

    Raises:
        CheckpointUnusable: a state is missing, or is another object's.
    """
    for name, thing in objects.items():
        if thing is None:
            continue
        state = as_given(content.get(f"{name}_state_dict"))
        if state is None:
            raise CheckpointUnusable(f"{where} has no state of {name!r}. It has: {', '.join(content)}.")
        try:
            thing.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointUnusable(
                f"{where} does not fit this {name}: {error}. Build it as it was, or move the file away to start afresh."
            ) from error


def capture_rng() -> dict[str, Any]:
    """The states of every random number generator a script uses: Python's, NumPy's, torch's, each GPU's."""
    import torch

    version, words, gauss = random.getstate()
    states: dict[str, Any] = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = [name, [int(k) for k in keys], *rest]
    if _cuda_in_use():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_rng(states: Mapping[str, Any]) -> None:
    """Set the generators to what :func:`capture_rng` has seen."""
    import torch

    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"].clone())
    if "numpy" in states:
        import numpy as np

        name, keys, *rest = states["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def gpus_in_use(objects: Mapping[str, Any] | None = None) -> dict[int, str]:
    """Number -> NVML's name of each GPU that this process works on. Asking starts nothing on any GPU.

    Args:
        objects: where their tensors lie; None: where torch's allocator holds memory.
    """
    import torch

    if not _cuda_in_use():
        return {}
    if objects is None:
        numbers = [i for i in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(i) > 0]
    else:
        tensors = (t for thing in objects.values() for t in _tensors(thing.state_dict()))
        numbers = sorted({t.device.index for t in tensors if t.is_cuda})
    found = ((i, getattr(torch.cuda.get_device_properties(i), "uuid", None)) for i in numbers)
    return {
        i: str(uuid) if str(uuid).startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        for i, uuid in found
        if uuid is not None
    }


def gpu_uuids() -> list[str]:
    """NVML's names of the GPUs that this process works on now."""
    return list(gpus_in_use().values())


def gpu_slack(objects: Mapping[str, Any] | None = None) -> dict[str, int]:
    """UUID of each GPU that this process works on -> bytes that torch's allocator holds there but has not given out."""
    import torch

    found = gpus_in_use(objects)
    return {uuid: torch.cuda.memory_reserved(i) - torch.cuda.memory_allocated(i) for i, uuid in found.items()}


def largest_on_gpu(objects: Mapping[str, Any]) -> int:
    """Bytes of the largest tensor that saving has to copy to the host."""
    if not _cuda_in_use():
        return 0
    tensors = (t for thing in objects.values() for t in _tensors(thing.state_dict()))
    return max((t.untyped_storage().nbytes() for t in tensors if t.is_cuda), default=0)


def gpu_allocations() -> list[tuple[str, int, int, int]]:
    """Of each GPU that this process works on: name, bytes allocated, reserved, and in total."""
    import torch

    return [
        (
            torch.cuda.get_device_name(i), torch.cuda.memory_allocated(i), torch.cuda.memory_reserved(i),
            torch.cuda.get_device_properties(i).total_memory,
        )
        for i in gpus_in_use()
    ]  # fmt: skip


def free_cached() -> None:
    """Give back what nobody uses: collect garbage, empty the GPU allocator's cache."""
    import torch

    gc.collect()
    if _cuda_in_use():
        torch.cuda.empty_cache()


def release_gpus(objects: Mapping[str, Any]) -> list[str]:
    """After the last save: take modules and optimizer states off the GPUs, and ask the driver whether that is so.

    The modules are empty afterwards: what they held is in the file.

    Returns:
        a sentence for each GPU of this process; none where it has used none.
    """
    gpus = gpus_in_use()
    if not gpus:
        return []

    def allocated() -> dict[str, int]:
        import torch

        return {uuid: torch.cuda.memory_allocated(i) for i, uuid in gpus.items()}

    def let_go() -> None:
        empty_tensors(objects, lambda tensor: bool(tensor.is_cuda))
        free_cached()

    return [str(found) for found in release(let_go, allocated, Nvml(uuids=list(gpus.values())))]


def empty_tensors(objects: Mapping[str, Any], wanted: Callable[[Any], bool]) -> None:
    """Give up the memory of parameters, buffers, gradients and optimizer states that ``wanted`` says yes to."""
    import torch

    drop_gradients(objects)
    held: list[Any] = []
    for thing in objects.values():
        if isinstance(thing, torch.nn.Module):
            held += [*thing.parameters(), *thing.buffers()]
        elif isinstance(thing, torch.optim.Optimizer):
            held += list(_tensors(list(thing.state.values())))
    for tensor in held:
        if wanted(tensor):
            with contextlib.suppress(RuntimeError):  # a view that somebody else owns: told as not released
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def has_running_statistics(objects: Mapping[str, Any]) -> bool:
    """Whether a module among them changes in its forward pass already, as batch normalisation does."""
    modules = (module for thing in objects.values() if hasattr(thing, "modules") for module in thing.modules())
    return any(getattr(module, "running_mean", None) is not None for module in modules)


def drop_gradients(objects: Mapping[str, Any]) -> None:
    """Free the gradients of every module among ``objects``."""
    import torch

    for thing in objects.values():
        if isinstance(thing, torch.nn.Module):
            thing.zero_grad(set_to_none=True)


def is_lost_loader(error: BaseException | None) -> bool:
    """A loader's worker was killed, as the kernel does when memory ends: what is trained is whole. In the middle of
    handing something over, that breaks a connection and nothing else."""
    if isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        error = _failed_loader() or error
    text = str(error)
    lost = ") is killed by signal: Killed" in text or ") exited unexpectedly" in text
    return isinstance(error, RuntimeError) and "DataLoader worker" in text and lost


def _failed_loader() -> RuntimeError | None:
    """What torch says of a loader's worker that has died; its end is seen a moment later than that of its files."""
    import torch

    for _ in range(30):
        try:
            torch._C._error_if_any_worker_fails()
        except RuntimeError as why:
            return why
        time.sleep(0.01)
    return None


def _cuda_in_use() -> bool:
    """This process has talked to a GPU; asking must not be what starts it."""
    import torch

    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class _Hashing:
    """A file to write to that hashes what passes. Large tensors pass as views; nothing is copied."""

    def __init__(self, fd: int) -> None:
        self._fd, self._hash, self.written = fd, xxhash.xxh3_128(), 0
        self.failure: OSError | None = None
        """Why something could not be written."""

    def write(self, data: Any) -> int:
        """All of it.

        Raises:
            OSError: the disk does not take it.
        """
        try:
            return self._write(data)
        except OSError as error:
            self.failure = error
            raise

    def _write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        done = 0
        while done < len(view):  # one call takes at most 2 GiB
            done += os.write(self._fd, view[done : done + (1 << 30)])
        self.written += done
        return done

    def flush(self) -> None:
        """Nothing is held back."""

    def digest(self) -> str:
        return self._hash.hexdigest()


def _file_hash(path: Path) -> str:
    found = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # else the cache would tell what was meant, not what the disk holds
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = memoryview(bytearray(_CHUNK))
        while n := file.readinto(buffer):
            found.update(buffer[:n])
    return found.hexdigest()


def _require_space(folder: Path, need: int) -> None:
    room = space(folder)
    if room is not None and room.free < need:
        told = f"{format_bytes(need)} are needed and {format_bytes(room.free)} are free"
        raise NoSpace(errno.ENOSPC, told, str(folder))


def _tensor_bytes(value: Any) -> int:
    seen: set[int] = set()
    total = 0
    for tensor in _tensors(value):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:  # tied weights are written once
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _tensors(value: Any) -> Iterator[Any]:
    if hasattr(value, "untyped_storage"):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other guard publishes a file in this folder meanwhile, where folders can be locked."""
    try:
        import fcntl

        fd = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows
        yield
        return
    try:
        until = time.monotonic() + _ALONE_S
        while time.monotonic() < until:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.005)
                continue
            except OSError:  # a mount that knows no locks
                pass
            break
        yield
    finally:
        os.close(fd)
