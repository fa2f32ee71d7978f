"""Documents that anybody may have changed: whole by their checksum, and not to be believed."""

import json

import pytest

from brainenc.errors import CorruptData
from brainenc.featurestore.documents import read_document, write_document
from brainenc.featurestore.schema import Manifest, Note, Receipt
from brainenc.featurestore.stimuli import StimulusSet
from tests.featurestore.making import fill, make_collection, stimuli, values

HUGE = 10**40
DEEP = b'{"kind":"manifest","version":1,"checksum":"","a":' + b"[" * 200_000


@pytest.mark.parametrize("data", [
    b"", b"\xff\xfe", b"[]", b"null", b"7", DEEP, b'{"kind":"manifest","version":1e999,"checksum":""}',
    b'{"kind":"manifest","version":NaN,"checksum":""}', b'{"kind":"manifest","version":1,"checksum":"","a":NaN}',
    b'{"kind":"manifest","version":' + b"9" * 5000 + b',"checksum":""}', b'{"kind":"manifest","version":1}',
])  # fmt: skip
def test_bytes_that_are_no_document_are_corrupt(data):
    with pytest.raises(CorruptData, match="where"):
        read_document("manifest", data, "where")


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    """Fields of a good manifest and of a good receipt."""
    collection = make_collection(tmp_path_factory.mktemp("papers"))
    fill(collection, values(23))
    manifest = collection.commit()
    return {
        "manifest": json.loads(manifest.to_bytes()), "receipt": json.loads(collection.receipt(0).to_bytes()),
    }  # fmt: skip


READ = {"manifest": Manifest.from_bytes, "receipt": Receipt.from_bytes}
ANY = [None, "x", -1, HUGE, 1.5, True, [], [None], {"a": 1}, [[]], [HUGE], [-1], ["x"]]


def _signed(kind, fields):
    return write_document(kind, {n: v for n, v in fields.items() if n not in ("kind", "version", "checksum")})


@pytest.mark.parametrize("kind", READ)
def test_every_field_of_every_type_is_taken_or_corrupt_and_never_a_raw_error(papers, kind):
    refused = set()
    for name in papers[kind].keys() - {"kind", "version", "checksum", "transaction"}:
        lacking = {n: v for n, v in papers[kind].items() if n != name}
        with pytest.raises(CorruptData, match="where"):
            READ[kind](_signed(kind, lacking), "where")
        for value in ANY:
            try:
                READ[kind](_signed(kind, {**lacking, name: value}), "where")
            except CorruptData:
                refused.add((name, str(value)))
    for name in {"manifest": ("n_rows", "row_shape", "rows_per_shard"), "receipt": ("rows", "data_offset")}[kind]:
        assert {(name, str(value)) for value in (None, "x", -1, HUGE, 1.5, True, [-1], [HUGE])} <= refused


@pytest.mark.parametrize("entry", [None, 3, [], [0, 5], [0, 5, HUGE, 0, "", []], [0, 5, 10**6, 0, "", [HUGE]],
                                   [0, "5", 10**6, 0, "", []], [0, 5, 10**6, 0, 7, []], [0, 5, 10**6, 0, "", 7],
                                   {"shard": 0}, "abcdef"])  # fmt: skip
def test_entries_of_any_shape_are_corrupt(papers, entry):
    with pytest.raises(CorruptData, match="where"):
        Manifest.from_bytes(_signed("manifest", {**papers["manifest"], "shards": [entry]}), "where")


@pytest.mark.parametrize("change", [{"block_rows": 0}, {"frame": ""}, {"missing": [HUGE]}, {"blocks": [1]}])
def test_a_note_that_would_hang_or_swell_its_reader_is_refused(papers, change):
    with pytest.raises(ValueError, match=r"."):
        Note.from_json({**papers["receipt"], **change})


@pytest.mark.parametrize("change", [(b"subj01-train", b"../01-train/"), (b"ARROW1", b"ARROW2")])
def test_a_stimulus_table_that_was_changed_is_corrupt(change):
    data = stimuli(5).to_arrow().replace(*change)
    with pytest.raises(CorruptData, match="where"):
        StimulusSet.from_arrow(data, "where")
