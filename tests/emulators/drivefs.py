"""A file system that behaves as a mounted Google Drive: it speaks FUSE to the kernel, and needs root but no library.

What is written lies in a staging folder until some time after it was closed; `fsync` and `rename` succeed at once all
the same. Killing the process before that loses the file, as a Colab machine does that goes away. There are no links,
reads may fail with EIO on order, and there is a quota.

    python drivefs.py BACK MOUNT [--upload-s 1] [--quota 0] [--read-ms 0]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

BROKEN = "broken"
_ENTRY_SECONDS = 0  # nothing is cached by the kernel: every stat is ours
_MAX_WRITE = 1 << 20
_ATTR = struct.Struct("<6Q10I")
_LIBC = ctypes.CDLL(None, use_errno=True)

(LOOKUP, FORGET, GETATTR, SETATTR, MKDIR, UNLINK, RMDIR, RENAME, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT,
 OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, CREATE, INTERRUPT, DESTROY, BATCH_FORGET, RENAME2) = (
    1, 2, 3, 4, 9, 10, 11, 12, 14, 15, 16, 17, 18, 20, 25, 26, 27, 28, 29, 30, 35, 36, 38, 42, 45,
)  # fmt: skip


class Fault(Exception):
    """An errno for the caller."""


class Drive:
    """The files: what has arrived in ``back``, what is still on its way in ``staging``."""

    def __init__(self, back: Path, options: argparse.Namespace) -> None:
        self.back, self.options = back, options
        self.staging = back.with_name(back.name + ".staging")
        self.staging.mkdir(exist_ok=True)
        self.pending: dict[str, Path] = {}
        self.nodes: dict[int, str] = {1: ""}
        self.numbers: dict[str, int] = {"": 1}
        self.handles: dict[int, tuple[int, str, bool]] = {}
        self.listings: dict[int, list[str]] = {}
        self.broken = back.with_name(BROKEN)
        self.count = 0
        self.lock = threading.RLock()

    # ---- names

    def path(self, name: str) -> Path:
        return self.pending.get(name) or self.back / name

    def number(self, name: str) -> int:
        if name not in self.numbers:
            self.numbers[name] = max(self.nodes) + 1
            self.nodes[self.numbers[name]] = name
        return self.numbers[name]

    def child(self, node: int, raw: bytes) -> str:
        name = raw.split(b"\0")[0].decode()
        return f"{self.nodes[node]}/{name}".lstrip("/")

    def attributes(self, name: str) -> bytes:
        found = os.lstat(self.path(name))
        times = (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)
        seconds, rest = [t // 10**9 for t in times], [t % 10**9 for t in times]
        return _ATTR.pack(
            self.number(name), found.st_size, found.st_blocks, *seconds, *rest, found.st_mode, found.st_nlink,
            found.st_uid, found.st_gid, 0, 4096, 0,
        )  # fmt: skip

    def entry(self, name: str) -> bytes:
        attributes = self.attributes(name)
        return struct.pack("<4Q2I", self.number(name), 0, _ENTRY_SECONDS, _ENTRY_SECONDS, 0, 0) + attributes

    # ---- operations

    def lookup(self, node: int, body: bytes) -> bytes:
        return self.entry(self.child(node, body))

    def getattr(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QII", _ENTRY_SECONDS, 0, 0) + self.attributes(self.nodes[node])

    def setattr(self, node: int, body: bytes) -> bytes:
        valid, size = struct.unpack_from("<I", body)[0], struct.unpack_from("<Q", body, 16)[0]
        if valid & 8:
            os.truncate(self.path(self.nodes[node]), size)
        return self.getattr(node, body)

    def mkdir(self, node: int, body: bytes) -> bytes:
        name = self.child(node, body[8:])
        os.mkdir(self.back / name)
        return self.entry(name)

    def unlink(self, node: int, body: bytes) -> bytes:
        name = self.child(node, body)
        os.unlink(self.path(name))
        self.pending.pop(name, None)
        return b""

    def rmdir(self, node: int, body: bytes) -> bytes:
        os.rmdir(self.back / self.child(node, body))
        return b""

    def rename(self, node: int, body: bytes, skip: int = 8) -> bytes:
        target = struct.unpack_from("<Q", body)[0]
        old_raw, new_raw = body[skip:].split(b"\0")[:2]
        old, new = self.child(node, old_raw), self.child(target, new_raw)
        if old in self.pending:  # still here: only its name changes
            self.pending[new] = self.pending.pop(old)
            self.send_later(new, self.pending[new])
        else:
            os.rename(self.back / old, self.back / new)
        self.nodes[self.number(old)] = new
        self.numbers[new] = self.numbers.pop(old)
        return b""

    def rename2(self, node: int, body: bytes) -> bytes:
        if struct.unpack_from("<I", body, 8)[0]:
            raise Fault(errno.EINVAL)  # no "do not replace" here
        return self.rename(node, body, 16)

    def create(self, node: int, body: bytes) -> bytes:
        name = self.child(node, body[16:])
        self.count += 1
        self.pending[name] = self.staging / str(self.count)
        fd = os.open(self.pending[name], os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        return self.entry(name) + self.handle(fd, name, True)

    def open(self, node: int, body: bytes) -> bytes:
        flags = struct.unpack_from("<I", body)[0] & (os.O_ACCMODE | os.O_APPEND | os.O_TRUNC)
        return self.handle(os.open(self.path(self.nodes[node]), flags), self.nodes[node], False)

    def handle(self, fd: int, name: str, fresh: bool) -> bytes:
        self.handles[fd] = (fd, name, fresh)
        return struct.pack("<QII", fd, 0, 0)

    def read(self, node: int, body: bytes) -> bytes:
        fd, offset, size = struct.unpack_from("<QQI", body)
        time.sleep(self.options.read_ms / 1000)
        if self.broken.exists():
            raise Fault(errno.EIO)
        return os.pread(fd, size, offset)

    def write(self, node: int, body: bytes) -> bytes:
        fd, offset, size = struct.unpack_from("<QQI", body)
        if self.options.quota and self.used() + size > self.options.quota:
            raise Fault(errno.ENOSPC)
        return struct.pack("<II", os.pwrite(fd, body[40 : 40 + size], offset), 0)

    def used(self) -> int:
        return sum(p.stat().st_size for root in (self.back, self.staging) for p in root.rglob("*") if p.is_file())

    def release(self, node: int, body: bytes) -> bytes:
        fd, name, fresh = self.handles.pop(struct.unpack_from("<Q", body)[0])
        os.close(fd)
        name = self.nodes[node]  # it may have been renamed while open
        if fresh and name in self.pending:
            self.send_later(name, self.pending[name])
        return b""

    def send_later(self, name: str, path: Path) -> None:
        timer = threading.Timer(self.options.upload_s, self.arrive, (name, path))
        timer.daemon = True
        timer.start()

    def arrive(self, name: str, path: Path) -> None:
        with self.lock:
            if self.pending.get(name) == path:
                os.replace(path, self.back / name)
                del self.pending[name]

    def opendir(self, node: int, body: bytes) -> bytes:
        prefix = f"{self.nodes[node]}/".lstrip("/")
        coming = {name[len(prefix) :] for name in self.pending if name.startswith(prefix)}
        names = set(os.listdir(self.back / self.nodes[node])) | {name for name in coming if "/" not in name}
        self.count += 1
        self.listings[self.count] = sorted(names)
        return struct.pack("<QII", self.count, 0, 0)

    def readdir(self, node: int, body: bytes) -> bytes:
        listing, offset, size = struct.unpack_from("<QQI", body)
        out = b""
        for position, name in list(enumerate(self.listings[listing], 1))[offset:]:
            raw, full = name.encode(), f"{self.nodes[node]}/{name}".lstrip("/")
            kind = 4 if self.path(full).is_dir() else 8
            record = struct.pack("<QQII", self.number(full), position, len(raw), kind) + raw
            record += bytes(-len(record) % 8)
            if len(out) + len(record) > size:
                break
            out += record
        return out

    def releasedir(self, node: int, body: bytes) -> bytes:
        self.listings.pop(struct.unpack_from("<Q", body)[0])
        return b""

    def statfs(self, node: int, body: bytes) -> bytes:
        found = os.statvfs(self.back)
        total = self.options.quota // found.f_bsize if self.options.quota else found.f_blocks
        free = max(0, total - self.used() // found.f_bsize) if self.options.quota else found.f_bavail
        sizes = (found.f_bsize, 255, found.f_bsize, 0)
        return struct.pack("<5Q4I24x", total, free, free, found.f_files, found.f_ffree, *sizes)

    def nothing(self, node: int, body: bytes) -> bytes:
        return b""  # fsync says yes and does nothing: as Drive does


def init(drive: Drive, body: bytes) -> bytes:
    _, minor, readahead = struct.unpack_from("<3I", body)
    big_writes, max_pages = 1 << 5, 1 << 22
    return struct.pack(
        "<4I2H2I2HI28x", 7, min(minor, 31), readahead, big_writes | max_pages, 12, 10, _MAX_WRITE, 1, 256, 0, 0
    )


def serve(drive: Drive, device: int) -> None:
    """Answer the kernel until the file system is unmounted."""
    calls = {
        LOOKUP: drive.lookup, GETATTR: drive.getattr, SETATTR: drive.setattr, MKDIR: drive.mkdir, UNLINK: drive.unlink,
        RMDIR: drive.rmdir, RENAME: drive.rename, RENAME2: drive.rename2, OPEN: drive.open, READ: drive.read,
        WRITE: drive.write, STATFS: drive.statfs, RELEASE: drive.release, FSYNC: drive.nothing, FLUSH: drive.nothing,
        OPENDIR: drive.opendir, READDIR: drive.readdir, RELEASEDIR: drive.releasedir, FSYNCDIR: drive.nothing,
        CREATE: drive.create, INIT: lambda node, body: init(drive, body), DESTROY: drive.nothing,
    }  # fmt: skip
    while True:
        try:
            request = os.read(device, _MAX_WRITE + 4096)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                continue
            raise
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            continue
        status, answer = _answer(drive, calls.get(opcode), node, request[40:])
        with contextlib.suppress(FileNotFoundError):  # the caller was interrupted and has gone
            os.write(device, struct.pack("<IiQ", 16 + len(answer), -status, unique) + answer)


def _answer(drive: Drive, call: object, node: int, body: bytes) -> tuple[int, bytes]:
    if call is None:
        return errno.ENOSYS, b""
    try:
        with drive.lock:
            return 0, call(node, body)  # type: ignore[operator]
    except Fault as fault:
        return fault.args[0], b""
    except OSError as error:
        return error.errno or errno.EIO, b""


def mount(point: Path) -> int:
    """Mount on a folder; returns the device to serve on."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if _LIBC.mount(b"drive", os.fsencode(point), b"fuse.drive", 6, options) != 0:  # MS_NOSUID | MS_NODEV
        raise OSError(ctypes.get_errno(), f"mounting on {point}")
    return device


def unmount(point: Path) -> None:
    """Take it away, dead or alive, in use or not."""
    _LIBC.umount2(os.fsencode(point), 2)


class MountedDrive:
    """A drive in a process of its own, for tests: mount, kill, mount again."""

    def __init__(self, folder: Path, **options: float) -> None:
        self.back, self.mnt, self.options = folder / "drive-side", folder / "mnt", options
        for each in (self.back, self.mnt):
            each.mkdir(parents=True)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **options: float) -> None:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in (self.options | options).items()]
        command = [sys.executable, __file__, str(self.back), str(self.mnt), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"mounted\n":
            raise RuntimeError("the drive could not be mounted")

    def kill(self) -> None:
        """The machine goes away: what has not arrived is lost."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None
        unmount(self.mnt)

    def break_reads(self, broken: bool = True) -> None:
        """From now on reads fail, or go well again."""
        mark = self.back.with_name(BROKEN)
        mark.touch() if broken else mark.unlink(missing_ok=True)

    def __enter__(self) -> MountedDrive:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def why_not() -> str | None:
    """Why such a drive cannot be mounted here; None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "mounting needs root on Linux"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no /dev/fuse that may be used"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("back", type=Path)
    parser.add_argument("mnt", type=Path)
    parser.add_argument("--upload-s", type=float, default=1.0)
    parser.add_argument("--quota", type=int, default=0)
    parser.add_argument("--read-ms", type=float, default=0.0)
    options = parser.parse_args()
    device = mount(options.mnt)
    print("mounted", flush=True)
    serve(Drive(options.back, options), device)


if __name__ == "__main__":
    main()
