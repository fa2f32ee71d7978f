"""An emulator of Google Cloud Storage on loopback, with faults on order.

    with MiniGCS() as gcs:                                    # a thread of this process, any free port
        gcs.fault("media", "status", status=503, times=2)
        place = ObjectPlace("gs://bucket/store")              # STORAGE_EMULATOR_HOST=gcs.url
        assert gcs.count("media") == 3
    python -m tests.emulators.minigcs --port 9000             # a process; faults by POST /_faults

Actions of a fault (``op`` and ``name`` are regular expressions; ``times`` -1 is for ever; ``skip`` lets some pass):

    status (status=503)        answer an error and do nothing
    delay (seconds=1)          wait, then serve
    hang                       never answer
    reset                      reset the connection before anything is done
    commit_reset               do it, then reset: the answer is lost
    commit_status (status)     do it, then answer an error
    truncate (keep=0.5)        the full Content-Length, fewer bytes, and the connection closed
    short (keep=0.5)           fewer bytes with a Content-Length that matches them
    flip (at=0.5)              one bit of the body wrong
    flip_upload (at=0.5)       one bit of what is uploaded wrong, as a bad network card would
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.emulators.gcs_service import Answer, Request, Service


@dataclass
class Fault:
    op: str
    action: str
    name: str = ".*"
    times: int = 1
    skip: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def takes(self, request: Request) -> bool:
        if self.times == 0 or not re.fullmatch(self.op, request.op) or not re.search(self.name, request.path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


@dataclass(frozen=True)
class Logged:
    at: float
    op: str
    name: str
    range: str | None
    action: str | None


class MiniGCS:
    """Serves a :class:`Service` over HTTP; a context manager that runs it in a thread."""

    def __init__(self, *buckets: str, port: int = 0, latency: float = 0.0) -> None:
        self.service = Service()
        self.service.buckets.update({name: {} for name in buckets})
        self.port, self.latency = port, latency
        self.log: list[Logged] = []
        self._faults: list[Fault] = []
        self._ready = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault(self, op: str, action: str, *, name: str = ".*", times: int = 1, skip: int = 0, **options: Any) -> None:
        """Order a fault; the first one that fits a request is taken."""
        self._faults.append(Fault(op, action, name, times, skip, options))

    def clear(self) -> None:
        self._faults.clear()
        self.log.clear()

    def count(self, op: str, name: str = ".*") -> int:
        """How many requests of this kind came."""
        return sum(1 for entry in self.log if re.fullmatch(op, entry.op) and re.search(name, entry.name))

    def names(self, bucket: str) -> list[str]:
        return sorted(self.service.buckets[bucket])

    def data(self, bucket: str, name: str) -> bytes:
        return self.service.buckets[bucket][name].data

    # ---- serving

    def __enter__(self) -> MiniGCS:
        self._thread = threading.Thread(target=lambda: asyncio.run(self.serve()), name="minigcs", daemon=True)
        self._thread.start()
        if not self._ready.wait(10):
            raise TimeoutError("the emulator did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)

    async def serve(self) -> None:
        """Serve until stopped."""
        app = web.Application(client_max_size=1 << 40)
        app.router.add_route("*", "/{tail:.*}", self._serve)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        listener = socket.create_server(("127.0.0.1", self.port), backlog=1024)
        self.port = listener.getsockname()[1]
        await web.SockSite(runner, listener).start()
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _serve(self, http: web.Request) -> web.StreamResponse:
        if http.path == "/_faults":
            return await self._control(http)
        body = await http.read()
        await asyncio.sleep(self.latency)
        request = self.service.parse(http.method, http.raw_path, http.headers, body, f"http://{http.host}")
        fault = next((f for f in self._faults if f.takes(request)), Fault("", ""))
        span = http.headers.get("Range")
        self.log.append(Logged(time.monotonic(), request.op, request.path, span, fault.action or None))
        early = await self._before(http, request, fault)
        return early if early is not None else await self._after(http, self.service.handle(request), fault)

    async def _before(self, http: web.Request, request: Request, fault: Fault) -> web.StreamResponse | None:
        if fault.action in ("delay", "hang"):
            await asyncio.sleep(fault.options.get("seconds", 1) if fault.action == "delay" else 3600)
        elif fault.action == "reset":
            return _reset(http)
        elif fault.action == "status":
            return _error(fault)
        elif fault.action == "flip_upload":
            request.body = _flip(request.body, fault.options.get("at", 0.5))
        return None

    async def _after(self, http: web.Request, answer: Answer, fault: Fault) -> web.StreamResponse:
        body = answer.body
        if fault.action == "commit_reset":
            return _reset(http)
        if fault.action == "commit_status":
            return _error(fault)
        if fault.action == "short":
            body = body[: int(len(body) * fault.options.get("keep", 0.5))]
        if fault.action == "flip":
            body = _flip(body, fault.options.get("at", 0.5))
        if fault.action == "truncate":
            return await _truncated(http, answer, fault.options.get("keep", 0.5))
        return web.Response(status=answer.status, headers=answer.headers, body=body)

    async def _control(self, http: web.Request) -> web.Response:
        if http.method == "POST":
            self.fault(**json.loads(await http.read()))
        elif http.method == "DELETE":
            self.clear()
        return web.json_response({"log": [(entry.op, entry.name, entry.action) for entry in self.log[-1000:]]})


def _reset(http: web.Request) -> web.Response:
    transport = http.transport
    if transport is None:
        raise ConnectionResetError("the client has gone")
    wire = transport.get_extra_info("socket")
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
    return web.Response()


def _error(fault: Fault) -> web.Response:
    status = fault.options.get("status", 503)
    return web.json_response(
        {"error": {"code": status, "message": fault.options.get("message", "ordered")}}, status=status
    )


def _flip(body: bytes, at: float) -> bytes:
    if not body:
        return body
    place = min(int(len(body) * at), len(body) - 1)
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]


async def _truncated(http: web.Request, answer: Answer, keep: float) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, headers=answer.headers)
    response.content_length = len(answer.body)
    await response.prepare(http)
    await response.write(answer.body[: int(len(answer.body) * keep)])
    if http.transport is not None:
        http.transport.close()
    return response


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bucket", action="append", default=[])
    parser.add_argument("--latency", type=float, default=0.0)
    options = parser.parse_args()
    listening = MiniGCS(*options.bucket, port=options.port, latency=options.latency)

    async def announce() -> None:
        task = asyncio.create_task(listening.serve())
        while not listening._ready.is_set():
            await asyncio.sleep(0.01)
        print(listening.url, flush=True)
        await task

    asyncio.run(announce())


if __name__ == "__main__":
    main()
