"""The command line of extraction: what it takes, what it prints, what it exits with. No Ray."""

import io
import json
from dataclasses import replace

import pytest

from brainenc.cli.extract import _show
from brainenc.cli.main import run
from brainenc.cli.progress import Progress
from brainenc.extract.config import ExtractProgress, ExtractSummary
from tests.extract.test_extractor import configured
from tests.extract.test_extractor import run as extract_here


def extract(capsys, *arguments) -> tuple[int, str, str]:
    code = run(["extract", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", ["extract", "plan"])
def test_help_has_an_example(capsys, command):
    assert run([command, "--help"]) == 0
    assert f"brainenc {command} --subject-dir" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backbone", "x", "--feature", "1.q", "--images", "x"], "--store"),
        (["--store", "s", "--feature", "1.q", "--images", "x"], "--backbone"),
        (["--store", "s", "--backbone", "x", "--images", "x"], "--feature"),
        (["--store", "s", "--backbone", "x", "--feature", "1.q"], "--images"),
        (["--store", "s", "--backbone", "x", "--feature", "1.q", "--images", "x", "--batch-size", "many"], "auto"),
        (["--store", "s", "--backbone", "x", "--preset", "clip", "--images", "x"], "--preset"),
        (["--store", "s", "--backbone", "x", "--feature", "1.q", "--images", "x", "--actors", "0"], "at least 1"),
    ],
)
def test_what_is_lacking_or_does_not_go_together_is_wrong_usage_and_says_what_to_add(capsys, arguments, said):
    code, _, err = extract(capsys, *arguments)

    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(capsys, tmp_path, miniature, pictures):
    code, _, err = extract(
        capsys, "--images", pictures, "--store", tmp_path / "s", "--backbone", miniature, "--feature", "12.q"
    )

    assert code == 2
    assert "no layer '12'" in err
    assert "0 to 3" in err
    assert not (tmp_path / "s").exists()


def test_a_folder_that_is_no_subject_is_a_one_paragraph_error(capsys, tmp_path, miniature):
    (tmp_path / "photos").mkdir()

    code, _, err = extract(
        capsys, "--subject-dir", tmp_path / "photos", "--store", tmp_path / "s", "--backbone", miniature,
        "--feature", "3.q",
    )  # fmt: skip

    assert code == 1
    assert "training_split" in err
    assert len(err.strip().splitlines()) == 1


def test_a_finished_extraction_says_so_in_words_and_in_json(capsys, tmp_path, miniature, pictures):
    extract_here(configured(tmp_path / "s", pictures, miniature, features=("3.q",)))
    arguments = [
        "--images", pictures, "--store", tmp_path / "s", "--backbone", miniature, "--feature", "3.q", "--device", "cpu"
    ]  # fmt: skip

    code, out, _ = extract(capsys, *arguments)
    assert code == 0
    assert "Nothing to do: all 6 shards were there" in out
    assert "pictures/mini/3.q" in out

    code, out, _ = extract(capsys, *arguments, "--json")
    summary = json.loads(out)
    assert (summary["images"], summary["shards_before"], summary["started_ray"]) == (0, 6, False)


@pytest.mark.parametrize(("images", "said"), [(12, True), (0, False)])
def test_a_staged_store_is_handed_over_and_not_confirmed(capsys, tmp_path, monkeypatch, images, said):
    summary = ExtractSummary(
        store="s", keys=("a/b/1.q",), images=images, reused=0, shards_sealed=1, shards_before=1, images_per_s=1.0
    )
    monkeypatch.setattr("brainenc.extract.driver.extract", lambda config, progress: summary)
    arguments = ["--images", tmp_path, "--store", tmp_path / "s", "--backbone", "x", "--feature", "1.q"]

    assert ("Handed over to the drive, not confirmed" in extract(capsys, *arguments, "--stage")[2]) == said
    assert "Handed over" not in extract(capsys, *arguments)[2]
    assert json.loads(extract(capsys, *arguments, "--stage", "--json")[1])["confirmed"] is False


def test_old_spellings_are_taken_and_answered_with_todays(capsys, tmp_path, miniature):
    (tmp_path / "subj01").mkdir()

    code, _, err = extract(
        capsys, "--data_dir", tmp_path, "--subj", "1", "--output_dir", tmp_path / "s", "--batch_size", "4",
        "--backbone", f"dinov2_q@{miniature}",
    )  # fmt: skip

    assert code == 1  # the folder is empty
    assert f"--subject-dir {tmp_path}/subj01 --store {tmp_path}/s --batch-size 4" in err


def test_plan_says_what_is_left_and_writes_nothing(capsys, tmp_path, miniature, pictures):
    options = [
        "--images", str(pictures), "--store", str(tmp_path / "s"), "--backbone", miniature, "--feature", "2-3.q",
        "--rows-per-shard", "10", "--device", "cpu", "--no-time",
    ]  # fmt: skip

    assert run(["plan", *options]) == 0
    text = capsys.readouterr().out
    assert "pictures/mini/3.q: 45 rows of 65 x 48, 6.24 kB an image, 281 kB in 5 shards (new)" in text
    assert "This fits." in text
    assert not (tmp_path / "s").exists()

    assert run(["plan", *options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["images_left"], plan["disk_needed_bytes"]) == (45, 2 * 45 * 65 * 48 * 2)


PROGRESS = ExtractProgress(
    images_done=30, images_total=120, images_per_s=1.23456, seconds_left=72.9, shards_sealed=3, shards_total=8,
    retries=0, memory_bytes=1_200_000_000, memory_limit_bytes=4_000_000_000, gpu_fraction=0.41,
)  # fmt: skip


def test_progress_is_numbers_for_programs():
    stream = io.StringIO()
    _show(Progress("extract", json_lines=True, stream=stream, clock=lambda: 5.0), PROGRESS)

    assert json.loads(stream.getvalue()) == {
        "command": "extract", "done": 30, "total": 120, "seconds": 0.0, "images_per_s": 1.235, "seconds_left": 72.9,
        "shards_sealed": 3, "shards_total": 8, "retries": 0, "memory_bytes": 1_200_000_000,
        "memory_limit_bytes": 4_000_000_000, "gpu_fraction": 0.41,
    }  # fmt: skip


def test_progress_is_a_line_for_people():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    _show(Progress("extract", stream=stream, clock=lambda: 5.0), replace(PROGRESS, note="a worker died"))

    assert stream.getvalue().splitlines() == [
        "a worker died", "", "extract: 30/120, images per s 1.23, shards 3/8, RAM 1.2 GB, GPU 41%"
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["extract", "plan"])
def test_what_only_this_process_could_see_is_refused(capsys, tmp_path, miniature, pictures, command):
    options = ["--backbone", miniature, "--feature", "3.q", "--device", "cpu"]

    for where in (["--images", str(pictures), "--store", "memory://s"], ["--images", "memory://i", "--store", "s"]):
        assert run([command, *options, *where]) == 2
        assert "lies in the memory of one process" in capsys.readouterr().err
