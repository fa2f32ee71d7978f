"""The page and the picture about a run: the right numbers, from whatever the run has left."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from brainenc.cli.main import run as brainenc
from brainenc.errors import UsageError
from brainenc.report import figures, page
from brainenc.report.run_files import RunFiles


class Reader(HTMLParser):
    """Collects text and checks that every element that was opened is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.images = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.open == []
    return reader


def test_the_page_says_what_was_reached_against_what_can_be(run):
    folder, _, r = run
    reader = read(page.write_report(folder))
    text = "".join(reader.text)
    assert "Validation correlation 0.3500 of 0.7000 that can be reached (50%)" in text
    assert "noise-normalised score 51.25 %" in text
    assert "first <run>" in text  # escaped in the source
    assert len(reader.images) == 3
    assert all(source.startswith("data:image/png;base64,") for source in reader.images)
    rows = re.findall(r"<tr><td>remainder</td>(.*?)</tr>", (folder / "report.html").read_text())
    values = re.findall(r">([\d.]+)<", rows[0])
    masks = {h: RunFiles(folder).subject().rois.masks(h)["remainder"] for h in ("lh", "rh")}
    assert values == [f"{r['lh'][masks['lh']].mean():.3f}", "0.700", f"{r['rh'][masks['rh']].mean():.3f}", "0.700"]


def test_what_a_resumed_run_did_again_counts_once(run):
    """The first attempt's validation at step 2 (0.9) is void: the second went on from step 2."""
    files = RunFiles(run[0])
    assert [(m["run"], m["step"], m["split"]) for m in files.metrics] == [
        (0, 1, "train"),
        (1, 2, "train"),
        (1, 2, "val"),
    ]
    text = "".join(read(page.write_report(run[0])).text)
    assert "55.0" in text  # median of 50 and 60 samples a second; the void 70 is left out


def test_the_picture_is_written_and_has_a_bar_for_every_roi(run):
    path = figures.accuracy_per_roi(run[0])
    assert path == run[0] / "accuracy_per_roi.png"
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 800
    table = figures.roi_table(RunFiles(run[0]))
    assert len(table["lh"]) == len(table["rh"]) == 32
    empty = next(row for row in table["lh"] if row.name == "aTL-faces")
    assert (empty.r, empty.ceiling) == (None, None)
    assert table["lh"][0].ceiling == pytest.approx(0.7)
    assert table["lh"][0].roi_class == "prf-visualrois"


def test_the_same_scores_give_the_same_picture(run):
    first = figures.accuracy_per_roi(run[0]).read_bytes()
    assert figures.accuracy_per_roi(run[0]).read_bytes() == first


def test_a_taller_bar_changes_the_picture(run):
    before = figures.accuracy_per_roi(run[0]).read_bytes()
    scores = json.loads((run[0] / "scores.json").read_text())
    scores["rois"]["lh"]["V1v"]["r"] = 0.69
    (run[0] / "scores.json").write_text(json.dumps(scores))
    assert figures.accuracy_per_roi(run[0]).read_bytes() != before


def test_without_matplotlib_there_is_a_page_and_no_picture(run, monkeypatch):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    assert figures.accuracy_per_roi(run[0]) is None
    reader = read(page.write_report(run[0]))
    assert reader.images == []
    assert "matplotlib is not installed" in "".join(reader.text)


def test_a_run_that_has_only_begun_has_a_page(run):
    for name in ("scores.json", "metrics.jsonl"):
        (run[0] / name).unlink()
    text = "".join(read(page.write_report(run[0])).text)
    assert "Not validated yet" in text
    assert "No step was recorded" in text
    with pytest.raises(UsageError, match="brainenc evaluate"):
        figures.accuracy_per_roi(run[0])


def test_a_run_whose_subject_is_gone_keeps_its_page(run):
    _ = run[1].rois
    shutil.rmtree(run[1].folder)
    text = "".join(read(page.write_report(run[0])).text)
    assert "Validation correlation 0.3500;" in text
    rows = re.findall(r"<tr><td>V1v</td>(.*?)</tr>", (run[0] / "report.html").read_text())
    masks = run[1].rois.masks("lh")
    assert re.findall(r">([\d.]+|–)<", rows[0])[:2] == [f"{run[2]['lh'][masks['V1v']].mean():.3f}", "–"]


def test_memory_and_orders_are_told(run):
    lines = [
        {"kind": "reading", "at": 100.0, "worker": "w0", "level": "ok", "numbers": {"fraction": 0.3}},
        {
            "kind": "warning",
            "at": 160.0,
            "worker": "w0",
            "step": 4,
            "reason": "RAM usage is 86%",
            "numbers": {"fraction": 0.86},
        },
        {"kind": "reading", "at": 130.0, "worker": "w1", "numbers": {}},
        {"kind": "incident", "number": 1, "outcome": "saved", "opened_at": 1.0, "closed_at": 3.0, "checkpoint": "/c"},
    ]
    (run[0] / "guard.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reader = read(page.write_report(run[0]))
    text = "".join(reader.text)
    assert "warning (w0, step 4): RAM usage is 86%" in text
    assert "incident 1: saved after 2.0 s, checkpoint /c" in text
    assert len(reader.images) == 4
    assert page.memory_points(lines) == {"w0": [(0.0, 0.3), (1.0, 0.86)]}


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no run folder: it has no config\.yaml"):
        page.write_report(tmp_path)


def test_the_command_writes_both_and_prints_where(run, capsys):
    assert brainenc(["report", str(run[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [str(run[0] / "report.html"), str(run[0] / "accuracy_per_roi.png")]


def test_correlations_are_read_where_they_were_kept(run):
    np.testing.assert_allclose(RunFiles(run[0]).correlations("lh"), run[2]["lh"], rtol=1e-6)
    assert RunFiles(run[0]).correlations("lh", "test") is None


def test_where_rois_look_is_drawn_against_where_they_were_planted(run):
    folder = run[0] / "attention"
    folder.mkdir()
    labels = [f"roi{i}" for i in range(12)]
    for hemisphere in ("lh", "rh"):
        np.save(folder / f"{hemisphere}_attention.npy", np.random.default_rng(0).random((3, 12, 5, 5)))
    (folder / "attention.json").write_text(json.dumps({"images": ["a", "b", "c"], "lh": labels, "rh": labels}))
    maps = RunFiles(run[0]).attention()
    assert list(maps)[::12] == ["lh roi0", "rh roi0"]
    np.testing.assert_allclose(maps["rh roi4"], np.load(folder / "rh_attention.npy")[:, 4].mean(axis=0))
    plain = figures.draw_attention(maps, {})
    assert figures.draw_attention(maps, {"lh roi3": (0.2, 0.7)}) != plain
    reader = read(page.write_report(run[0]))
    assert len(reader.images) == 4
    assert "Where each ROI looks" in "".join(reader.text)


def test_a_ridge_has_no_steps_and_an_ensemble_no_metrics_at_all(run):
    (run[0] / "metrics.jsonl").write_text(
        json.dumps({"run": 0, "epoch": 0, "step": 0, "split": "val", "loss": 1.2, "val_perf": 0.35}) + "\n"
    )
    assert len(read(page.write_report(run[0])).images) == 3
    for name in ("metrics.jsonl", "scores.json"):
        (run[0] / name).unlink()
    content = {
        "runs": ["a", "b"],
        "shares": {"lh": [0.25, 0.75], "rh": [0.5, 0.5]},
        "test_r": {"a": 0.1, "b": 0.2, "ensemble": 0.3},
    }
    (run[0] / "ensemble.json").write_text(json.dumps(content))
    text = " ".join(read(page.write_report(run[0])).text)
    for number in ("0.250", "0.750", "0.100", "0.300"):
        assert number in text


def test_a_run_on_an_object_store_gets_its_report_there(run, tmp_path, monkeypatch, capsys):
    import fsspec

    monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "cache"))
    remote = fsspec.filesystem("memory")
    remote.put(str(run[0]), "/reports/first", recursive=True)
    try:
        assert brainenc(["report", "memory://reports/first", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told == ["memory://reports/first/report.html", "memory://reports/first/accuracy_per_roi.png"]
        assert b"Validation correlation" in remote.cat("/reports/first/report.html")
        assert not (run[0] / "report.html").exists()
    finally:
        remote.rm("/reports", recursive=True)
