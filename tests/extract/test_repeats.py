"""A finished extraction that is asked for again loads no backbone, and is never wrong about being finished."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from brainenc.errors import BadImages, ProvenanceMismatch
from brainenc.extract import backbone as backbones
from brainenc.extract import driver, prepare
from brainenc.extract.description import backbone_files
from brainenc.extract.extractor import Extractor
from brainenc.extract.machines import Machines, Node
from brainenc.extract.miniature import save_miniature
from brainenc.extract.prepare import create, survey
from brainenc.extract.site import Here
from brainenc.featurestore.places.scratch import cache_root
from tests.extract.conftest import save_images
from tests.extract.test_extractor import configured

REPEAT = """
import json, pickle, sys
from brainenc.extract.driver import extract
summary = extract(pickle.loads(bytes.fromhex(sys.argv[1])))
print(json.dumps([summary.images, summary.shards_before,
                  [name for name in ("torch", "ray", "transformers") if name in sys.modules]]))
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def finished(tmp_path):
    """A configuration whose work is done, by a run that has kept what it knew of the backbone."""
    images, backbone = save_images(tmp_path / "set", 6), save_miniature("dinov2", tmp_path / "mini")
    config = configured(tmp_path / "s", images, backbone, features=("-1.q", "0-1.token"))
    found = survey(config, repeat=True)
    collections = create(found)
    extractor = Extractor(found.job)
    assert {extractor.extract(task).status for task in found.tasks} == {"sealed"}
    extractor.close()
    for collection in collections.values():
        collection.commit()
    return config


@pytest.fixture
def loaded(monkeypatch):
    """Names of the backbones that are loaded while the test runs; those are loaded all the same."""
    seen, load = [], backbones.load_backbone
    monkeypatch.setattr(backbones, "load_backbone", lambda name, **how: seen.append(name) or load(name, **how))
    return seen


def documents():
    return sorted((cache_root() / "backbones").glob("*.json"))


def test_a_repeat_imports_neither_torch_nor_ray(finished):
    done = subprocess.run(
        [sys.executable, "-c", REPEAT, pickle.dumps(finished).hex()], capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip

    assert json.loads(done.stdout) == [0, 3, []]


def test_a_repeat_finds_what_the_first_run_found(finished, loaded):
    quick = survey(finished, repeat=True)
    assert loaded == []

    whole = survey(finished)

    assert loaded == [finished.backbone]
    for name in ("wanted", "identities", "details", "image_shapes", "existing", "device", "job", "tasks"):
        assert getattr(quick, name) == getattr(whole, name), name


@pytest.mark.parametrize(
    "change", [{"features": ("-1.q", "2.k")}, {"size_policy": "resize", "image_size": 70, "slug": "b"}]
)
def test_whatever_is_left_to_do_is_planned_with_the_backbone_itself(finished, loaded, change):
    found = survey(finished.with_(**change), repeat=True)

    assert loaded == [finished.backbone]
    assert found.tasks


def test_another_set_of_images_is_work_again(finished, loaded, tmp_path):
    images = save_images(tmp_path / "more", 7)
    more = finished.with_(sources=(dataclasses.replace(finished.sources[0], location=str(images)),))

    assert survey(more, repeat=True).tasks
    assert loaded


def test_other_weights_in_the_same_folder_are_noticed(finished):
    """Of the same size and name: only the time of change tells, as with images."""
    save_miniature("dinov2", finished.backbone, seed=1)

    with pytest.raises(ProvenanceMismatch, match="taken by other weights"):
        driver.extract(finished)


@pytest.mark.parametrize("damage", ["flipped", "cut", "another", "gone"])
def test_what_is_kept_is_not_trusted(finished, loaded, damage):
    (document,) = documents()
    data = document.read_bytes()
    damaged = {
        "flipped": data.replace(b'"slug":"mini"', b'"slug":"mimi"'), "cut": data[: len(data) // 2], "another": b"[]",
    }  # fmt: skip
    if damage == "gone":
        document.unlink()
    else:
        document.write_bytes(damaged[damage])
        assert damaged[damage] != data

    summary = driver.extract(finished)

    assert (summary.images, summary.shards_before) == (0, 3)
    assert loaded == [finished.backbone]
    assert documents()[0].read_bytes() == data  # made again


def test_a_cache_that_cannot_be_written_costs_only_time(finished, loaded, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "file"))

    assert [driver.extract(finished).images for _ in range(2)] == [0, 0]
    assert len(loaded) == 2


def test_files_of_a_backbone(tmp_path, monkeypatch):
    """Where every kind of name is loaded from, as far as that can be told without its library."""
    folder = save_miniature("dinov2", tmp_path / "mini")
    checkpoint = tmp_path / "weights.pt"
    checkpoint.write_bytes(b"x")
    snapshot = tmp_path / "hub" / "models--facebook--dinov2-base" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    names = {p.name for p in backbone_files(str(folder))}
    assert {"config.json", "model.safetensors"} <= names
    assert backbone_files(f"dinov2_q@{folder}") == backbone_files(str(folder))
    assert backbone_files(f"timm:vit_tiny/{checkpoint}") == [checkpoint]
    assert backbone_files(f"open_clip:local-dir:{folder}") == backbone_files(str(folder))
    assert backbone_files("facebook/dinov2-base") is None  # no revision is in the cache
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert backbone_files("facebook/dinov2-base") == backbone_files("dinov2") == [snapshot / "config.json"]
    assert backbone_files("timm:vit_tiny_patch16_224") is None
    assert backbone_files("open_clip:ViT-L-14/openai") is None
    (snapshot.parents[1] / "refs" / "main").write_text("../../../elsewhere")
    assert backbone_files("facebook/dinov2-base") is None


@pytest.fixture
def decoded(monkeypatch):
    """Addresses of the images that planning decodes."""
    seen, read = [], prepare.read_bytes
    monkeypatch.setattr(prepare, "read_bytes", lambda uri: seen.append(uri) or read(uri))
    return seen


def test_images_are_not_read_again_when_all_is_done_or_a_layer_is_added(finished, decoded):
    found = survey(finished, repeat=True)
    more = survey(finished.with_(features=("2.k",)))

    assert decoded == []
    assert found.image_shapes == more.image_shapes == {"set": (112, 112)}
    assert {d["image_size"][0] for d in more.details.values()} == {112}


def test_the_first_image_is_read_when_it_was_touched_and_for_another_backbone(finished, decoded):
    survey(finished.with_(slug="other"))
    assert len(decoded) == 1

    first = sorted(Path(finished.sources[0].location).iterdir())[0]
    first.write_bytes(first.read_bytes())
    survey(finished)
    assert decoded[1:] == [str(first)] * 2  # compared by its content, then decoded


def test_a_set_whose_first_images_are_broken_goes_on_to_the_others(tmp_path, miniature):
    images = save_images(tmp_path / "cut", 70, size=28)
    for path in sorted(images.iterdir())[:65]:
        path.write_bytes(b"cut")

    assert survey(configured(tmp_path / "s", images, miniature)).image_shapes == {"cut": (28, 28)}


def test_a_set_without_any_image_that_can_be_read_says_how_many_were_tried(tmp_path, miniature):
    for count, said in ((3, "all of them"), (200, "110 of its 200 were tried")):
        images = tmp_path / f"bad{count}"
        images.mkdir()
        for n in range(count):
            (images / f"{n:03d}.png").write_bytes(b"nothing")

        with pytest.raises(BadImages, match=said) as caught:
            survey(configured(tmp_path / "s", images, miniature))
        assert all("not an image" in why for why in caught.value.reasons.values())


class Weighed(Here):
    """A site whose measurement always says 2, and counts."""

    def __init__(self):
        super().__init__(Machines((Node(2.0),)))
        self.measured = []

    def settle_micro_batch(self, job, image_shape, features):
        self.measured.append(image_shape)
        return 2


def test_a_measured_batch_size_is_not_lost_to_other_collections(finished, tmp_path):
    """Of the same store: other images, or another backbone. What a collection was made with, it keeps."""
    site, auto = Weighed(), finished.with_(micro_batch="auto")
    others = dataclasses.replace(auto.sources[0], location=str(save_images(tmp_path / "others", 5)))

    assert {w.micro_batch for w in survey(auto, site=lambda: site).wanted} == {4}
    assert site.measured == []
    assert {w.micro_batch for w in survey(auto.with_(slug="other"), site=lambda: site).wanted} == {2}
    found = survey(auto.with_(sources=(*auto.sources, others)), site=lambda: site, repeat=True)
    assert {w.stimuli: w.micro_batch for w in found.wanted} == {"set": 4, "others": 2}
    assert len(site.measured) == 2
