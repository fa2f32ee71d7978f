"""The part of Google Cloud Storage's JSON API that clients need, in memory, without a network.

``Service.handle`` takes one HTTP request apart and answers it. Preconditions, ranges, listings with delimiters and
pages, multipart and resumable uploads with their 256 KiB quanta, rewrites, composing and batches behave as the real
service does; permissions, versions, holds and the XML and gRPC interfaces are not there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import google_crc32c

QUANTUM = 256 * 1024
"""A resumable upload keeps whole quanta of every chunk but the last."""

_PATH = re.compile(r"(?P<kind>/upload|/download)?/storage/v1/b(?:/(?P<bucket>[^/]+)(?P<o>/o(?:/(?P<rest>.*))?)?)?/?")
_VERB = re.compile(
    r"(?P<name>[^/]+)/(?P<verb>rewriteTo|moveTo|copyTo|compose)(?:/b/(?P<to_bucket>[^/]+))?(?:/o/(?P<to>[^/]+))?"
)


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message


@dataclass
class Request:
    """One request, taken apart. ``op`` is what fault rules match on."""

    method: str
    op: str
    kind: str
    bucket: str
    name: str
    verb: str
    target: tuple[str, str]
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes
    origin: str

    @property
    def path(self) -> str:
        return f"{self.bucket}/{self.name}"


@dataclass
class Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @classmethod
    def of(cls, document: dict[str, Any], status: int = 200) -> Answer:
        return cls(status, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(document).encode())


@dataclass
class Stored:
    meta: dict[str, Any]
    data: bytes

    @property
    def generation(self) -> int:
        return int(self.meta["generation"])


@dataclass
class Session:
    """A resumable upload under way."""

    bucket: str
    meta: dict[str, Any]
    conditions: dict[str, str]
    received: bytearray = field(default_factory=bytearray)
    finished: dict[str, Any] | None = None


class Service:
    """Buckets and objects behind one lock."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.sessions: dict[str, Session] = {}
        self._lock = threading.RLock()
        self._generation = 1_700_000_000_000_000

    # ---- entry

    def handle(self, request: Request) -> Answer:
        """Answer one request."""
        with self._lock:
            try:
                answer: Answer = getattr(self, f"_op_{request.op}")(request)
            except Refused as refusal:
                document = {
                    "code": refusal.status,
                    "message": refusal.message,
                    "errors": [{"message": refusal.message}],
                }
                answer = Answer.of({"error": document}, refusal.status)
            return answer

    def parse(self, method: str, raw_url: str, headers: Mapping[str, str], body: bytes, origin: str = "") -> Request:
        """Say what a request is, without running it: a fault may have to come before the effect."""
        url = urlsplit(raw_url)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        found = _PATH.fullmatch(url.path)
        if url.path.startswith("/batch/"):
            return Request(method, "batch", "", "", "", "", ("", ""), query, headers, body, origin)
        if found is None:
            return Request(method, "unknown", "", "", url.path, "", ("", ""), query, headers, body, origin)
        verb = _VERB.fullmatch(found["rest"] or "")
        name = unquote(verb["name"] if verb else found["rest"] or "") or query.get("name", "")
        target = (unquote(verb["to_bucket"] or ""), unquote(verb["to"] or "")) if verb else ("", "")
        request = Request(
            method, "", found["kind"] or "", unquote(found["bucket"] or ""), name, verb["verb"] if verb else "", target,
            query, headers, body, origin,
        )  # fmt: skip
        request.op = self._name_op(request, has_o=found["o"] is not None)
        return request

    def _name_op(self, request: Request, *, has_o: bool) -> str:
        if not has_o:
            return "bucket"
        if request.kind == "/upload":
            return self._name_upload(request)
        if request.verb:
            return {"rewriteTo": "rewrite", "copyTo": "rewrite", "moveTo": "move", "compose": "compose"}[request.verb]
        if not request.name:
            return "list"
        if request.method in ("DELETE", "PATCH"):
            return request.method.lower()
        return "media" if request.kind == "/download" or request.query.get("alt") == "media" else "stat"

    def _name_upload(self, request: Request) -> str:
        session = self.sessions.get(request.query.get("upload_id", ""))
        if "upload_id" in request.query:
            request.name = session.meta["name"] if session else request.name
            return "upload_chunk"
        if request.query.get("uploadType") == "resumable":
            request.name = request.name or json.loads(request.body or b"{}").get("name", "")
            return "upload_start"
        said = re.search(rb'"name":\s*"([^"]+)"', request.body[:8192])
        request.name = request.name or (said[1].decode() if said else "")
        return "upload_simple"

    # ---- objects

    def _bucket(self, name: str) -> dict[str, Stored]:
        if name not in self.buckets:
            raise Refused(404, f"The specified bucket does not exist: {name}")
        return self.buckets[name]

    def _check(self, bucket: str, name: str, query: Mapping[str, str], prefix: str = "if") -> Stored | None:
        live = self._bucket(bucket).get(name)
        generation = live.generation if live else 0
        metageneration = int(live.meta["metageneration"]) if live else 0
        for key, value in ((f"{prefix}GenerationMatch", generation), (f"{prefix}MetagenerationMatch", metageneration)):
            if key in query and int(query[key]) != value:
                raise Refused(412, f"conditionNotMet: {key}={query[key]}, live is {generation}/{metageneration}")
        if int(query.get(f"{prefix}GenerationNotMatch", -1)) == generation:
            raise Refused(304, "")
        return live

    def _live(self, bucket: str, name: str, query: Mapping[str, str], *, source: bool = False) -> Stored:
        live = self._check(bucket, name, query, "ifSource" if source else "if")
        wanted = query.get("sourceGeneration" if source else "generation")
        if live is None or (wanted and int(wanted) != live.generation):
            raise Refused(404, f"No such object: {bucket}/{name}")
        return live

    def _store(
        self, bucket: str, meta: Mapping[str, Any], data: bytes, conditions: Mapping[str, str]
    ) -> dict[str, Any]:
        name = meta["name"]
        self._check(bucket, name, conditions)
        sums = {
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.Checksum(data).digest()).decode(),
        }
        for key, value in sums.items():
            if meta.get(key, value) != value:
                raise Refused(400, f"Provided {key} {meta[key]!r} doesn't match calculated {key} {value!r}.")
        self._generation += 1
        keep = {k: v for k, v in meta.items() if k in ("metadata", "contentType", "contentEncoding", "cacheControl")}
        full = keep | sums | {
            "kind": "storage#object", "name": name, "bucket": bucket, "id": f"{bucket}/{name}/{self._generation}",
            "generation": str(self._generation), "metageneration": "1", "etag": f"{self._generation}",
            "size": str(len(data)), "storageClass": "STANDARD",
            "timeCreated": "2025-01-01T00:00:00.000Z", "updated": "2025-01-01T00:00:00.000Z",
        }  # fmt: skip
        self.buckets[bucket][name] = Stored(full, bytes(data))
        return full

    # ---- operations

    def _op_unknown(self, request: Request) -> Answer:
        raise Refused(501, f"not implemented: {request.method} {request.name}")

    def _op_bucket(self, request: Request) -> Answer:
        if not request.bucket:
            return self._buckets(request)
        objects = self._bucket(request.bucket)
        if request.method == "DELETE":
            if objects:
                raise Refused(409, "The bucket you tried to delete is not empty.")
            del self.buckets[request.bucket]
            return Answer(204)
        return Answer.of({"kind": "storage#bucket", "name": request.bucket, "id": request.bucket, "location": "US"})

    def _buckets(self, request: Request) -> Answer:
        if request.method == "POST":
            name = json.loads(request.body)["name"]
            if name in self.buckets:
                raise Refused(409, "Your previous request to create the named bucket succeeded and you already own it.")
            self.buckets[name] = {}
            return Answer.of({"kind": "storage#bucket", "name": name, "id": name, "location": "US"})
        items = [{"kind": "storage#bucket", "name": name, "id": name} for name in self.buckets]
        return Answer.of({"kind": "storage#buckets", "items": items})

    def _op_list(self, request: Request) -> Answer:
        objects, query = self._bucket(request.bucket), request.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        rows: set[tuple[str, bool]] = set()
        for name in objects:
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            rows.add((name[: cut + len(delimiter)], False) if cut >= 0 else (name, True))
        ordered = sorted(rows)
        start, count = int(query.get("pageToken", 0)), int(query.get("maxResults") or 1000)
        page = ordered[start : start + count]
        document: dict[str, Any] = {"kind": "storage#objects"}
        if items := [objects[name].meta for name, is_object in page if is_object]:
            document["items"] = items
        if prefixes := [name for name, is_object in page if not is_object]:
            document["prefixes"] = prefixes
        if start + count < len(ordered):
            document["nextPageToken"] = str(start + count)
        return Answer.of(document)

    def _op_stat(self, request: Request) -> Answer:
        return Answer.of(self._live(request.bucket, request.name, request.query).meta)

    def _op_media(self, request: Request) -> Answer:
        live = self._live(request.bucket, request.name, request.query)
        sums = [
            f"{key}={live.meta[field]}"
            for key, field in (("crc32c", "crc32c"), ("md5", "md5Hash"))
            if field in live.meta
        ]
        headers = {
            "Content-Type": live.meta.get("contentType") or "application/octet-stream",
            "X-Goog-Generation": str(live.generation),
            "X-Goog-Stored-Content-Length": live.meta["size"],
            "X-Goog-Hash": ",".join(sums),
        }
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if asked is None or asked[0] == "bytes=-":
            return Answer(200, headers, live.data)
        size = len(live.data)
        first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
        last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
        if first >= size:
            raise Refused(416, "Request range not satisfiable")
        return Answer(206, headers | {"Content-Range": f"bytes {first}-{last}/{size}"}, live.data[first : last + 1])

    def _op_delete(self, request: Request) -> Answer:
        self._live(request.bucket, request.name, request.query)
        del self.buckets[request.bucket][request.name]
        return Answer(204)

    def _op_patch(self, request: Request) -> Answer:
        meta = self._live(request.bucket, request.name, request.query).meta
        change = json.loads(request.body)
        if "metadata" in change:
            merged = meta.get("metadata", {}) | (change.pop("metadata") or {})
            meta["metadata"] = {key: value for key, value in merged.items() if value is not None}
        meta.update(change, metageneration=str(int(meta["metageneration"]) + 1))
        return Answer.of(meta)

    def _op_rewrite(self, request: Request) -> Answer:
        live = self._live(request.bucket, request.name, request.query, source=True)
        bucket, name = request.target
        self._bucket(bucket)
        stored = self._store(bucket, {**live.meta, "name": name}, live.data, request.query)
        if request.verb == "copyTo":
            return Answer.of(stored)
        size = stored["size"]
        done = {"kind": "storage#rewriteResponse", "done": True, "objectSize": size, "totalBytesRewritten": size}
        return Answer.of({**done, "resource": stored})

    def _op_move(self, request: Request) -> Answer:
        live = self._live(request.bucket, request.name, request.query, source=True)
        stored = self._store(request.bucket, {**live.meta, "name": request.target[1]}, live.data, request.query)
        if request.target[1] != request.name:
            del self.buckets[request.bucket][request.name]
        return Answer.of(stored)

    def _op_compose(self, request: Request) -> Answer:
        order = json.loads(request.body)
        parts = [self._live(request.bucket, source["name"], {}).data for source in order["sourceObjects"]]
        meta = {**order.get("destination", {}), "name": request.name}
        stored = self._store(request.bucket, meta, b"".join(parts), request.query)
        del stored["md5Hash"]  # composed objects carry a crc32c only
        return Answer.of(stored)

    def _op_batch(self, request: Request) -> Answer:
        boundary = _boundary(request.headers)
        out = []
        for number, part in enumerate(request.body.decode().split("--" + boundary)[1:-1], 1):
            line = re.search(r"^(GET|DELETE|PATCH|POST) (\S+) HTTP", part, re.MULTILINE)
            if line is None:
                raise Refused(400, "a part of the batch holds no request")
            inner = part[line.end() :].replace("\r\n", "\n").split("\n\n", 1)
            body = inner[1].strip().encode() if len(inner) > 1 else b""
            answer = self.handle(self.parse(line[1], line[2], {}, body))
            head = f"--batch_x\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
            inner_head = f"HTTP/1.1 {answer.status} X\r\nContent-Type: application/json\r\n\r\n"
            out.append(head + inner_head + answer.body.decode() + "\r\n")
        body = ("".join(out) + "--batch_x--").encode()
        return Answer(200, {"Content-Type": "multipart/mixed; boundary=batch_x"}, body)

    # ---- uploads

    def _op_upload_simple(self, request: Request) -> Answer:
        self._bucket(request.bucket)
        if request.query.get("uploadType") == "media":
            meta, data = {"contentType": request.headers.get("Content-Type")}, request.body
        else:
            meta, data = _two_parts(request.body, _boundary(request.headers).encode())
        meta["name"] = request.query.get("name") or meta["name"]
        return Answer.of(self._store(request.bucket, meta, data, request.query))

    def _op_upload_start(self, request: Request) -> Answer:
        self._bucket(request.bucket)
        meta = {"contentType": request.headers.get("X-Upload-Content-Type"), **json.loads(request.body or b"{}")}
        meta["name"] = request.name
        conditions = {key: value for key, value in request.query.items() if key.startswith("if")}
        self._check(request.bucket, request.name, conditions)
        upload_id = secrets.token_hex(16)
        self.sessions[upload_id] = Session(request.bucket, meta, conditions)
        extra = "".join(f"&{key}={value}" for key, value in conditions.items())
        where = f"{request.origin}/upload/storage/v1/b/{quote(request.bucket)}/o?uploadType=resumable"
        return Answer(200, {"Location": f"{where}&name={quote(request.name, safe='')}{extra}&upload_id={upload_id}"})

    def _op_upload_chunk(self, request: Request) -> Answer:
        upload_id = request.query["upload_id"]
        session = self.sessions.get(upload_id)
        if session is None:
            raise Refused(410, "No such upload session")
        if request.method == "DELETE":
            del self.sessions[upload_id]
            return Answer(499)
        if session.finished:  # the answer to the last chunk was lost, and the client asks again
            return Answer.of(session.finished)
        total = _receive(session.received, request)
        if total is not None and len(session.received) >= total:
            session.finished = self._store(session.bucket, session.meta, bytes(session.received), session.conditions)
            session.received.clear()
            return Answer.of(session.finished)
        have = len(session.received)
        return Answer(308, {"Range": f"bytes=0-{have - 1}"} if have else {})


def _receive(received: bytearray, request: Request) -> int | None:
    """Take what is new in a chunk; returns the total length where the client knows it."""
    default = f"bytes 0-{len(request.body) - 1}/{len(request.body)}" if request.body else "bytes */0"
    span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", request.headers.get("Content-Range", default))
    if span is None:
        raise Refused(400, "Content-Range cannot be read")
    total = None if span[3] == "*" else int(span[3])
    if span[1] is None:
        return total
    first = int(span[1])
    if first > len(received):
        raise Refused(503, "a gap in the upload")
    new = request.body[len(received) - first :]
    if total is None or first + len(request.body) < total:
        whole = (len(received) + len(new)) // QUANTUM * QUANTUM
        new = new[: max(0, whole - len(received))]
    received += new
    return total


def _boundary(headers: Mapping[str, str]) -> str:
    found = re.search(r'boundary="?([^";]+)"?', headers.get("Content-Type", ""))
    if found is None:
        raise Refused(400, "no boundary in Content-Type")
    return found[1]


def _two_parts(body: bytes, boundary: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a multipart/related upload byte-exactly (its data may end in CR, and gcsfs writes bare line feeds)."""
    newline = b"\r\n" if body[: body.find(b"\n") + 1].endswith(b"\r\n") else b"\n"
    parts = (newline + body).split(newline + b"--" + boundary)
    if len(parts) < 4:
        raise Refused(400, "a multipart upload has two parts")
    (_, document), (head, data) = (part[len(newline) :].split(newline * 2, 1) for part in parts[1:3])
    said = re.search(rb"content-type:\s*([^\r\n]+)", head, re.IGNORECASE)
    return {"contentType": said[1].decode() if said else None, **json.loads(document)}, data
