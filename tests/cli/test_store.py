"""``brainenc store ...`` as a user meets it."""

import json
import os
import time
from pathlib import Path

import pytest

from brainenc.cli.main import run
from brainenc.featurestore import open_store
from brainenc.featurestore.places.local import LocalPlace
from brainenc.featurestore.places.mount import STAGED_MARK, MountPlace
from tests.featurestore.making import KEY, fill, make_collection, values


@pytest.fixture
def store(tmp_path):
    collection = make_collection(tmp_path / "store", details={"n_prefix": 1})
    fill(collection, values(23))
    collection.commit()
    return tmp_path / "store"


def damage(store):
    path = store / KEY / "shard-00001.arrow"
    raw = bytearray(path.read_bytes())
    raw[700] ^= 1
    path.write_bytes(raw)


def test_ls_shows_what_there_is(store, capsys):
    assert run(["store", "ls", str(store)]) == 0
    line = capsys.readouterr().out
    assert KEY in line
    assert "23/23 rows" in line
    assert "4x6" in line


def test_ls_of_an_empty_store_says_so(tmp_path, capsys):
    open_store(tmp_path, create=True)
    assert run(["store", "ls", str(tmp_path)]) == 0
    assert "no collections yet" in capsys.readouterr().out


def test_ls_and_info_as_json(store, capsys):
    assert run(["store", "ls", str(store), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["collections"]
    assert run(["store", "info", str(store), KEY, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert listed.items() <= info.items()
    assert (info["rows_present"], info["shards_sealed"], info["details"]) == (23, 5, {"n_prefix": 1})
    assert info["environments"] == [{"torch": "2", "shards": 5}]


def test_ls_lists_what_is_whole_and_names_what_is_not(store, capsys):
    other = "subj01-train/dinov2-mini/2.q"
    made = make_collection(store, key=other)
    fill(made, values(23))
    made.commit()
    for manifest in (store / KEY).glob("manifest-*.json"):
        manifest.write_bytes(manifest.read_bytes()[:-9])
    assert run(["store", "ls", str(store)]) == 1
    out = capsys.readouterr().out
    assert f"{other}  " in out
    assert f"BAD {KEY}: " in out
    assert run(["store", "ls", str(store), "--json"]) == 1
    listed = json.loads(capsys.readouterr().out)
    assert [item["key"] for item in listed["collections"]] == [other]
    (problem,) = listed["problems"]
    assert problem["key"] == KEY
    assert "torn or was changed" in problem["problem"]


STORE_COMMANDS = (["ls"], ["info", KEY], ["verify"], ["repair"], ["gc"])


@pytest.mark.parametrize("command", STORE_COMMANDS)
def test_every_command_may_be_told_to_stage(store, monkeypatch, command):
    opened = []

    def spy(*args, **options):
        opened.append(open_store(*args, **options))
        return opened[-1]

    monkeypatch.setattr("brainenc.cli.store.open_store", spy)
    for flag, place in (("--stage", MountPlace), ("--no-stage", LocalPlace)):
        assert run(["store", command[0], str(store), *command[1:], flag]) == 0
        assert isinstance(opened.pop().place, place)
    assert not (store / STAGED_MARK).exists(), "readers leave no mark"


def test_repair_of_a_staged_store_says_that_nothing_is_confirmed(store, capsys):
    damage(store)
    assert run(["store", "repair", str(store), "--stage"]) == 0
    assert "Handed over to the drive, not confirmed" in capsys.readouterr().err
    assert run(["store", "repair", str(store), "--stage"]) == 0
    assert "Handed over" not in capsys.readouterr().err, "nothing was mended"
    assert run(["store", "repair", str(store), "--stage", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["confirmed"] is False


def test_info_warns_of_shards_from_different_environments(store, capsys):
    open_store(store).collection(KEY).drop([0])
    fill(open_store(store).collection(KEY), values(23), shards=[0], environment={"torch": "3"})
    assert run(["store", "info", str(store), KEY]) == 0
    out, err = capsys.readouterr()
    assert "facet" in out
    assert "different environments" in err


def test_verify_names_the_bad_shard_repair_drops_it_verify_is_content(store, capsys):
    assert run(["store", "verify", str(store)]) == 0
    assert "all whole" in capsys.readouterr().out
    damage(store)
    assert run(["store", "verify", str(store), KEY]) == 1
    assert f"BAD {KEY} shard 1" in capsys.readouterr().out
    assert run(["store", "repair", str(store), "--dry-run"]) == 0
    assert "Would drop 1 shard" in capsys.readouterr().out
    assert run(["store", "verify", str(store), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["findings"][0]["shard"] == 1
    assert not result["whole"]
    assert run(["store", "repair", str(store)]) == 0
    assert "Dropped 1 shard" in capsys.readouterr().out
    assert run(["store", "verify", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"]
    assert open_store(store).collection(KEY).sealed() == {0, 2, 3, 4}


def test_repair_says_what_it_cannot_mend(store, capsys):
    table = store / "subj01-train" / "stimuli.arrow"
    table.write_bytes(table.read_bytes()[:-7])
    assert run(["store", "repair", str(store)]) == 1
    assert "Cannot be mended" in capsys.readouterr().err


def test_gc_says_how_much(store, capsys):
    partial = store / KEY / ".shard-00003.arrow.0123456789ab.partial"
    partial.write_bytes(b"x" * 2_000_000)
    os.utime(partial, (time.time() - 300,) * 2)
    assert run(["store", "gc", str(store), "--dry-run"]) == 0
    assert "Would remove 1 file, 2 MB" in capsys.readouterr().out
    assert partial.exists()
    assert run(["store", "gc", str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 2_000_000
    assert not partial.exists()


@pytest.mark.parametrize("command", [["ls"], ["info", "x", "y"], ["verify", "x"], ["repair", "x"], ["gc", "x"]])
def test_every_command_explains_itself_with_an_example(command, capsys):
    assert run(["store", command[0], "--help"]) == 0
    assert f"Example: brainenc store {command[0]}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["ls", "verify", "repair", "gc"])
def test_no_store_is_one_sentence_and_exit_code_1(tmp_path, capsys, command):
    assert run(["store", command, str(tmp_path / "nowhere")]) == 1
    err = capsys.readouterr().err
    assert "no folder" in err
    assert "Traceback" not in err


def test_an_unknown_collection_is_answered_with_those_there_are(store, capsys):
    assert run(["store", "info", str(store), "a/b/c.d"]) == 1
    assert KEY in capsys.readouterr().err


def test_an_error_of_the_system_is_one_line(store, monkeypatch, capsys):
    monkeypatch.setattr("brainenc.cli.store.open_store", lambda url, **_: Path("/proc/self/mem/nothing").read_text())
    assert run(["store", "ls", str(store)]) == 1
    err = capsys.readouterr().err
    assert "the system refused: [Errno 20]" in err
    assert "Traceback" not in err
