"""Where images come from: subject folders, folders, lists, ``nsd_stimuli.hdf5``; local or any fsspec URL.

A source is listed once, on the driver, into a :class:`Listing`: names, sizes and stamps, never pixels. Workers
read single images by their URI (:mod:`brainenc.extract.reading`).
"""

from __future__ import annotations

import csv
import io
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainenc.datasets.algonauts import Subject
from brainenc.errors import DataError, NotASubject, UsageError
from brainenc.extract.config import Source
from brainenc.extract.reading import (
    content_hash,
    filesystem,
    hdf5_dataset,
    hdf5_uri,
    is_url,
    read_bytes,
    url_beside,
)
from brainenc.featurestore.stimuli import Stimulus
from brainenc.redact import bare_address

IMAGE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jp2 .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .tga .ico .avif".split()  # noqa: SIM905
)
_LISTS = frozenset((".txt", ".csv", ".tsv"))
_HDF5 = frozenset((".hdf5", ".h5"))
_NSD = re.compile(r"nsd-(\d+)")
_SPLITS = {"train": "training_split/training_images", "test": "test_split/test_images"}
_THREADS = 8
_SHOWN = 3  # pairs of images spelled out in a message
_PATH_COLUMNS = ("path", "uri", "url", "file", "filename", "image")
_STAMPS = ("etag", "ETag", "md5Hash", "generation", "LastModified", "last_modified", "updated", "mtime", "created")


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The images of one stimulus set, in the order of their rows."""

    name: str
    rows: tuple[Stimulus, ...]


def list_sources(sources: Iterable[Source], *, merged: str | None = None) -> list[Listing]:
    """List every source; with ``merged`` into one set of that name, each stimulus id once.

    Raises:
        NotASubject: a subject folder without images.
        DataError: nothing there, or one id for two different images.
        UsageError: two sources would make the same stimulus set.
    """
    listings = [listing for source in sources for listing in _list_source(source)]
    if merged is not None:
        return [_merge(merged, listings)]
    names = [listing.name for listing in listings]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"Two sources would both make the stimulus set {twice[0]!r}. Name them apart with --stimuli, run one "
            "command for each, or merge them into one set with --by-id."
        )
    return listings


def stimulus_id(relative: str) -> str:
    """``nsd-00013`` where the file name has one, else the relative POSIX path with its extension."""
    match = _NSD.search(posixpath.basename(relative))
    return f"nsd-{int(match.group(1)):05d}" if match else relative


def _list_source(source: Source) -> Iterator[Listing]:
    location = source.location.rstrip("/") or "/"
    suffix = _suffix(location)
    if source.kind == "subject":
        yield from _subject(location, source.stimuli)
    elif suffix in _HDF5:
        yield Listing(name=source.stimuli or _stem(location), rows=_checked(_hdf5_rows(location), location))
    elif suffix in _LISTS:
        yield Listing(name=source.stimuli or _stem(location), rows=_checked(_list_rows(location), location))
    else:
        yield Listing(name=source.stimuli or _folder_name(location), rows=_checked(_folder_rows(location), location))


def _subject(folder: str, name: str | None) -> Iterator[Listing]:
    """Both splits of an Algonauts folder; the test split may be absent, as in a cut-down copy."""
    base = name or _folder_name(folder)
    found = 0
    for split, inner in _SPLITS.items():
        files = sorted(_files(_join(folder, inner)), key=lambda f: f[0])
        if files:
            found += 1
            rows = _checked((_stimulus(relative, uri, stat) for relative, uri, stat in files), folder)
            yield Listing(name=f"{base}-{split}", rows=rows)
    if not found and not is_url(folder):
        found_inside = Subject.open(
            folder
        ).folder  # says which parts are missing, or finds the one subject folder inside
        if found_inside != Path(folder).expanduser().absolute():
            yield from _subject(str(found_inside), name)
            return
    if not found:
        wanted = " nor ".join(_SPLITS.values())
        raise NotASubject(
            f"{folder} is not an Algonauts 2023 subject folder: it has neither {wanted} with images in them. Give the "
            "folder of one subject (subj01), or use --images for a folder of another shape; "
            "`brainenc data check DIR` says what is missing."
        )


def _folder_rows(folder: str) -> Iterator[Stimulus]:
    for relative, uri, stat in sorted(_files(folder), key=lambda f: f[0]):
        yield _stimulus(relative, uri, stat)


def _files(folder: str) -> Iterator[tuple[str, str, tuple[int | None, str | None]]]:
    """(path relative to the folder, URI, (size, stamp)) of every image below it; hidden files are passed over."""
    if is_url(folder):
        fs, root = filesystem(folder)
        for path, info in fs.find(root, detail=True).items():
            relative = posixpath.relpath(path, root)
            if _is_image(relative):
                yield relative, url_beside(folder, path), _remote_stat(info)
        return
    root = os.path.abspath(folder)
    pending = [root]
    while pending:
        try:
            entries = list(os.scandir(pending.pop()))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith(".") and not entry.is_symlink():
                    pending.append(entry.path)
            elif _is_image(entry.name):
                stat = entry.stat()
                relative = os.path.relpath(entry.path, root).replace(os.sep, "/")
                yield relative, entry.path, (stat.st_size, str(stat.st_mtime_ns))


def _is_image(relative: str) -> bool:
    name = posixpath.basename(relative)
    return not name.startswith(".") and posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _list_rows(location: str) -> Iterator[Stimulus]:
    """A text file with a path or URL a line, or CSV/TSV with a ``path`` column and, if liked, an ``id`` column.

    A URL is its image's id without what it is signed with: another signature tomorrow is the same image.
    """
    text = _read_text(location)
    here = posixpath.dirname(_without_query(location)) or "."
    for name, given in _list_entries(text, location):
        uri = name if is_url(name) or os.path.isabs(name) else _join(here, name)
        size, stamp = _stat(uri if is_url(uri) else os.path.abspath(uri), location)
        identity = bare_address(given or stimulus_id(bare_address(name) if is_url(name) else posixpath.normpath(name)))
        yield Stimulus(id=identity, uri=uri if is_url(uri) else os.path.abspath(uri), size=size, stamp=stamp)


def _list_entries(text: str, location: str) -> Iterator[tuple[str, str | None]]:
    suffix = _suffix(location)
    if suffix == ".txt":
        yield from ((line.strip(), None) for line in text.splitlines() if line.strip())
        return
    table = csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ",")
    columns = {c.strip().lower(): c for c in table.fieldnames or ()}
    path_column = next((columns[c] for c in _PATH_COLUMNS if c in columns), None)
    if path_column is None:
        raise DataError(
            f"{location} has the columns {', '.join(columns) or 'none'}, but none of {', '.join(_PATH_COLUMNS)}, which "
            "would say where the images are. Name that column `path`; a column `id` may hold the stimulus ids."
        )
    id_column = columns.get("id") or columns.get("stimulus_id")
    for row in table:
        if (row[path_column] or "").strip():
            yield row[path_column].strip(), (row[id_column] or "").strip() or None if id_column else None


def _hdf5_rows(location: str) -> Iterator[Stimulus]:
    """Rows of ``imgBrick`` (n, height, width, 3) uint8; the row number is the 0-based NSD id."""
    _, stamp = _stat(location, location)
    where = location if is_url(location) else os.path.abspath(location)
    brick = hdf5_dataset(where)
    if brick.ndim != 4 or brick.shape[-1] != 3 or str(brick.dtype) != "uint8":
        raise DataError(
            f"{location}: imgBrick is {brick.shape} of {brick.dtype}, but (images, height, width, 3) of uint8 is "
            "needed, as in nsd_stimuli.hdf5."
        )
    row_bytes = int(brick.shape[1] * brick.shape[2] * 3)
    for row in range(brick.shape[0]):
        yield Stimulus(id=f"nsd-{row:05d}", uri=hdf5_uri(where, row), size=row_bytes, stamp=stamp)


def _checked(rows: Iterable[Stimulus], location: str) -> tuple[Stimulus, ...]:
    """All rows, unless there are none or an id comes twice."""
    result = tuple(rows)
    if not result:
        raise DataError(
            f"No images in {location}: it holds no file with one of the extensions {' '.join(sorted(IMAGE_SUFFIXES))}."
        )
    seen: dict[str, str] = {}
    for row in result:
        if row.id in seen:
            raise DataError(
                f"{seen[row.id]} and {row.uri} would both be the stimulus {row.id!r}, but ids must be unique within a "
                "set. Give the images as a CSV list with columns `path` and `id`."
            )
        seen[row.id] = row.uri
    return result


def _merge(name: str, listings: Iterable[Listing]) -> Listing:
    """One row for each id.

    Raises:
        DataError: two images of one id differ.
        TransferFailed: one of them could not be read, so that nobody knows.
    """
    rows: dict[str, Stimulus] = {}
    pairs: list[tuple[Stimulus, Stimulus]] = []
    for row in (row for listing in listings for row in listing.rows):
        known = rows.setdefault(row.id, row)
        if known.uri != row.uri:
            pairs.append((known, row))
    sizes = [pair for pair in pairs if None not in (pair[0].size, pair[1].size) and pair[0].size != pair[1].size]
    _refuse_unlike(sizes or _of_other_content(pairs))  # a glance first: contents are read only where sizes agree
    return Listing(name=name, rows=tuple(sorted(rows.values(), key=lambda row: row.id)))


def _of_other_content(pairs: Sequence[tuple[Stimulus, Stimulus]]) -> list[tuple[Stimulus, Stimulus]]:
    """Pairs whose bytes differ. Each image is read once; reading waits for disks and networks, hence the threads."""
    uris = list({stimulus.uri: None for pair in pairs for stimulus in pair})
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="hash") as pool:
        hashes = dict(zip(uris, pool.map(_content, uris), strict=True))
    return [(one, other) for one, other in pairs if hashes[one.uri] != hashes[other.uri]]


def _content(uri: str) -> str:
    try:
        return content_hash(read_bytes(uri))
    except FileNotFoundError:
        raise DataError(f"{uri} was listed, and is gone now. The same command lists the images again.") from None


def _refuse_unlike(pairs: Sequence[tuple[Stimulus, Stimulus]]) -> None:
    if pairs:
        shown = "; ".join(
            f"{one.uri} ({one.size} bytes) and {other.uri} ({other.size} bytes) both are the stimulus {one.id!r}"
            for one, other in pairs[:_SHOWN]
        )
        raise DataError(
            f"{len(pairs)} image(s) have the id of another image, but other content, so they cannot share a row: "
            f"{shown}{' ...' if len(pairs) > _SHOWN else ''}. Extract the sources as separate sets: leave out "
            "--stimuli, and keep --by-id to have equal images computed once."
        )


def _stimulus(relative: str, uri: str, stat: tuple[int | None, str | None]) -> Stimulus:
    return Stimulus(id=stimulus_id(relative), uri=uri, size=stat[0], stamp=stat[1])


def _stat(uri: str, named_in: str) -> tuple[int | None, str | None]:
    try:
        if is_url(uri):
            fs, path = filesystem(uri)
            return _remote_stat(fs.info(path))
        stat = os.stat(uri)
    except FileNotFoundError:  # without it as the cause: a traceback would quote the address with its keys
        where = "" if uri == named_in else f", named in {named_in},"
        raise DataError(f"{uri}{where} does not exist.") from None
    return stat.st_size, str(stat.st_mtime_ns)


def _remote_stat(info: dict[str, Any]) -> tuple[int | None, str | None]:
    stamp = next((str(info[k]).strip('"') for k in _STAMPS if info.get(k) is not None), None)
    size = info.get("size")
    return (None if size is None else int(size)), stamp


def _read_text(location: str) -> str:
    try:
        if is_url(location):
            fs, path = filesystem(location)
            return str(fs.cat_file(path).decode("utf-8-sig"))
        return Path(location).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"The list of images {location} does not exist.") from None


def _join(folder: str, name: str) -> str:
    return posixpath.join(folder, name)


def _suffix(location: str) -> str:
    return posixpath.splitext(_without_query(location))[1].lower()


def _without_query(location: str) -> str:
    """A URL up to its query, such as a signature; a local path may hold a question mark."""
    return location.partition("?")[0] if is_url(location) else location


def _stem(location: str) -> str:
    return posixpath.splitext(_folder_name(location))[0]


def _folder_name(location: str) -> str:
    if is_url(location):
        return posixpath.basename(_without_query(bare_address(location)).rstrip("/"))
    return Path(os.path.abspath(location)).name
