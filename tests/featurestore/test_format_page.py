"""A stranger's reader, written from `docs/store-format.md` alone: JSON, xxHash and NumPy, nothing of ours."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from tests.featurestore.making import KEY, fill, ids, make_collection, stimuli, tree, values

SPEC_FIELDS = ("identity", "row_shape", "dtype", "n_rows", "stimuli", "stimuli_checksum", "rows_per_shard", "format",
               "allow_64bit")  # fmt: skip


def canonical(fields):
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def hashed(data):
    return xxhash.xxh3_128_hexdigest(data)


def document(path, kind):
    fields = json.loads(path.read_bytes())
    checksum = fields.pop("checksum")
    assert checksum == hashed(canonical(fields))
    assert (fields.pop("kind"), fields.pop("version")) == (kind, 1)
    return fields


@pytest.fixture(params=["arrow", "npy"])
def folder(request, tmp_path):
    collection, rows = make_collection(tmp_path, format=request.param, dtype="float32"), values(23)
    for shard in range(5):
        if shard == 1:
            with collection.shard_writer(1) as writer:
                writer.append(rows[5:10], missing=[2])
                writer.seal()
        else:
            fill(collection, rows, shards=[shard])
        collection.commit()
    return tmp_path


def test_a_stranger_reads_every_row(folder):
    document(folder / "store.json", "store")
    newest = max((folder / KEY).glob("manifest-*.json"), key=lambda p: int(re.search(r"\d+", p.name)[0]))
    manifest = document(newest, "manifest")
    transaction = manifest.pop("transaction")
    assert transaction == hashed(canonical(manifest))
    listed, per_shard = {entry[0]: entry for entry in manifest["shards"]}, manifest["rows_per_shard"]
    row_bytes, want = 4 * int(np.prod(manifest["row_shape"])), values(23)
    for row in range(manifest["n_rows"]):
        shard, _, size, offset, checksum, missing = listed[row // per_shard]
        raw = (folder / KEY / f"shard-{shard:05d}.{manifest['format']}").read_bytes()
        assert (len(raw), hashed(raw)) == (size, checksum)
        assert offset % 64 == 0
        at = offset + row % per_shard * row_bytes
        got = np.frombuffer(raw[at : at + row_bytes], "<f4").reshape(manifest["row_shape"])
        np.testing.assert_array_equal(got, want[row] if row not in missing else 0)
    assert listed[1][5] == [7]


def test_a_stranger_checks_every_byte_of_a_shard(folder):
    manifest = document(folder / KEY / "manifest-000001.json", "manifest")
    for receipt in sorted((folder / KEY).glob("shard-*.json")):
        fields = document(receipt, "receipt")
        raw = receipt.with_suffix(f".{manifest['format']}").read_bytes()
        assert (fields.pop("bytes"), fields.pop("file")) == (len(raw), hashed(raw))
        note = canonical(fields)
        assert note in raw, "the receipt is the note, and two fields"
        assert fields["collection"] == hashed(canonical({name: manifest[name] for name in SPEC_FIELDS}))
        start, size = fields["data_offset"], fields["block_rows"] * 4 * 24
        end = start + fields["rows"] * 4 * 24
        blocks = [raw[at : min(at + size, end)] for at in range(start, end, size)]
        assert [hashed(block) for block in blocks] == fields["blocks"]
        tail = raw[end:].replace(note, note.replace(fields["frame"].encode(), b"0" * 32))
        assert fields["frame"] == hashed(raw[:start] + tail)


def test_a_stranger_reads_the_stimuli(folder):
    table = pa.ipc.open_file(folder / "subj01-train" / "stimuli.arrow").read_all()
    rows = [list(row.values()) for row in table.to_pylist()]
    assert [row[0] for row in rows] == ids(23)
    assert table.schema.metadata[b"checksum"].decode() == hashed(canonical({"stimuli": rows})) == stimuli(23).checksum
    assert table.schema.names == ["id", "uri", "size", "stamp"]


def test_the_page_names_every_field_there_is(folder):
    """So that the page cannot fall behind the code."""
    page = (Path(__file__).parents[2] / "docs" / "store-format.md").read_text()
    for name in tree(folder):
        if name.endswith(".json"):
            for field in json.loads((folder / name).read_bytes()):
                assert f"`{field}`" in page, f"{field} of {name} is not on the page"


def test_the_contracts_run_as_the_page_says(tmp_path):
    """In a stranger's test file, with a format and a place that hold to them."""
    page = (Path(__file__).parents[2] / "docs" / "store-format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    theirs = (
        "from brainenc.featurestore.formats.npy import NpyFormat as MyFormat\n"
        "from brainenc.featurestore.places.local import LocalPlace as MyPlace\n"
    )
    (tmp_path / "test_mine.py").write_text(theirs + code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20
