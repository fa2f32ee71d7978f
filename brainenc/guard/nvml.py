"""How full each NVIDIA GPU is, over all processes on it: the five calls of NVML that takes, without ``pynvml``.

The watcher process has 30 MB to live in and no site-packages; ``ctypes`` and the driver's library are enough.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

_NAMES = ("nvml.dll",) if sys.platform == "win32" else ("libnvidia-ml.so.1", "libnvidia-ml.so")


class GpuUse(NamedTuple):
    """One device. ``slack``: bytes that torch's allocator of this process holds but has not given out."""

    uuid: str
    name: str
    used: int
    limit: int
    slack: int = 0

    @property
    def fraction(self) -> float:
        """Used without the slack, over the whole."""
        return max(0, self.used - self.slack) / self.limit if self.limit else 0.0


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong), ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )  # fmt: skip


_TOO_SMALL = 7
_NOT_TOLD = 2**64 - 1


class Nvml:
    """The devices of this machine, or the ones named.

    Args:
        library: the loaded driver library; None looks for it.
        uuids: only these (``GPU-...`` or ``MIG-...``); None means all of the machine.
    """

    def __init__(self, library: Any = None, uuids: Sequence[str] | None = None) -> None:
        self._library: Any = library
        self._ready: bool | None = None
        self._devices: list[tuple[str, str, ctypes.c_void_p]] = []
        self._watch(uuids)

    @property
    def watches(self) -> bool:
        """There are devices to look at."""
        return bool(self._devices)

    def watch(self, uuids: Sequence[str]) -> None:
        """Look at these from now on."""
        if list(uuids) != self._wanted:
            self._watch(uuids)

    def _watch(self, uuids: Sequence[str] | None) -> None:
        self._wanted = None if uuids is None else list(uuids)
        self._devices = []
        if (self._wanted is None or self._wanted) and self._start():
            self._devices = [d for d in map(self._device, self._handles(uuids)) if d is not None]

    def _start(self) -> bool:
        """Load and start the driver's library, when it is needed for the first time."""
        if self._ready is None:
            self._library = self._library or _load()
            self._ready = self._library is not None and self._library.nvmlInit_v2() == 0
        return self._ready

    def look(self, slack: dict[str, int] | None = None) -> list[GpuUse]:
        """Each device's use; a device that stops answering is left out.

        Args:
            slack: UUID -> bytes that the worker's allocator holds without using them.
        """
        found = []
        for uuid, name, handle in self._devices:
            memory = _Memory()
            if self._library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0:
                found.append(GpuUse(uuid, name, memory.used, memory.total, (slack or {}).get(uuid, 0)))
        return found

    def held(self, pid: int) -> dict[str, int | None]:
        """UUID -> bytes that one process holds on the device: 0 when the driver does not list it, None when not told.

        In a container with process numbers of its own the driver lists other numbers: the answer there is 0 as well.
        """
        return {uuid: self._held(handle, pid) for uuid, _, handle in self._devices}

    def _held(self, handle: ctypes.c_void_p, pid: int) -> int | None:
        ask = getattr(self._library, "nvmlDeviceGetComputeRunningProcesses_v3", None)
        if ask is None:
            return None
        count, processes = ctypes.c_uint(0), None
        code = ask(handle, ctypes.byref(count), None)
        while code == _TOO_SMALL:
            count = ctypes.c_uint(count.value + 8)  # others may be starting
            processes = (_Process * count.value)()
            code = ask(handle, ctypes.byref(count), processes)
        if code != 0:
            return None
        found = [p.used for p in (processes or ())[: count.value] if p.pid == pid]
        return None if _NOT_TOLD in found else sum(found)

    def _handles(self, uuids: Sequence[str] | None) -> list[ctypes.c_void_p]:
        handles = []
        if uuids is not None:
            for uuid in uuids:
                handle = ctypes.c_void_p()
                if self._library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) == 0:
                    handles.append(handle)
            return handles
        count = ctypes.c_uint(0)
        self._library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if self._library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) == 0:
                handles.append(handle)
        return handles

    def _device(self, handle: ctypes.c_void_p) -> tuple[str, str, ctypes.c_void_p] | None:
        uuid, name = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
        if self._library.nvmlDeviceGetUUID(handle, uuid, ctypes.c_uint(96)) != 0:
            return None
        self._library.nvmlDeviceGetName(handle, name, ctypes.c_uint(96))
        return uuid.value.decode(errors="replace"), name.value.decode(errors="replace"), handle


def _load() -> Any:
    for name in _NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
