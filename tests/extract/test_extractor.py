"""One worker's shard: equal to a plain reference, one decode and one pass, nothing lost when memory or images fail."""

import errno
import json
import resource
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from brainenc.errors import StimuliChanged, ValueNotStorable
from brainenc.extract.backbone import load_backbone
from brainenc.extract.config import ExtractConfig, Source
from brainenc.extract.extractor import Extractor
from brainenc.extract.features import Feature
from brainenc.extract.images import open_image
from brainenc.extract.miniature import backbone_string, kinds, save_miniature
from brainenc.extract.prepare import create, survey
from brainenc.featurestore.collection import Collection
from brainenc.featurestore.store import open_store
from brainenc.guard.messages import NullGuard, Order
from tests.extract.conftest import draw_image, save_images
from tests.extract.reference import record


def configured(store, images, backbone, features=("3.q", "3.token"), **more) -> ExtractConfig:
    more = {"rows_per_shard": 8, "micro_batch": 4, "threads": 1, "device": "cpu"} | more
    return ExtractConfig(
        store=str(store), backbone=str(backbone), features=features, sources=(Source(location=str(images)),), **more
    )


def run(config: ExtractConfig, **hooks):
    """Everything that is left, in this process: the outcomes, and the store."""
    found = survey(config)
    collections = create(found)
    extractor = Extractor(found.job, **hooks)
    try:
        outcomes = [extractor.extract(task) for task in found.tasks]
    finally:
        extractor.close()
    for collection in collections.values():
        collection.commit()
    return outcomes, open_store(config.store)


def reference(backbone: str, images, feature: str, **how) -> np.ndarray:
    """What a plain loop makes of the same files, one image at a time."""
    model = load_backbone(backbone, **how)
    rows = []
    for path in sorted(images.iterdir()):
        pixels = model.preprocess(open_image(path))[None]
        rows.append(model.forward(pixels, [Feature.parse(feature)])[Feature.parse(feature)][0])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_stored_features_equal_a_plain_loop(tmp_path, miniature, pictures, dtype):
    outcomes, store = run(configured(tmp_path / "s", pictures, miniature, dtype=dtype))

    assert {o.status for o in outcomes} == {"sealed"}
    tolerance = {"float16": 2e-3, "float32": 1e-5, "bfloat16": 1e-2}[dtype]
    for feature in ("3.q", "3.token"):
        view = store[f"pictures/mini/{feature}"]
        expected = reference(miniature, pictures, feature)
        np.testing.assert_allclose(np.asarray(view[:], np.float32), expected, rtol=tolerance, atol=tolerance)
        assert view.ids == [f"nsd-{n * 3:05d}" for n in range(45)]


SMALL = {"timm": {"model": "test_vit"}}


@pytest.mark.parametrize("kind", kinds())
def test_every_family_is_stored_as_its_library_computes_it(tmp_path, kind):
    """To float16 rounding: each image alone through the library's own model, blocks watched by plain hooks."""
    torch.set_num_threads(1)
    images = save_images(tmp_path / "set", 3, size=64)
    backbone = backbone_string(kind, save_miniature(kind, tmp_path / kind, seed=2, **SMALL.get(kind, {})))
    model = load_backbone(backbone)
    modules = model.info.blocks
    blocks = {f"{n if model.info.numbered else name}.token": name for n, name in enumerate(modules)}

    _, store = run(configured(tmp_path / "s", images, backbone, tuple(blocks), rows_per_shard=2))

    views = {feature: store[f"set/{model.info.slug}/{feature}"] for feature in blocks}
    for row, path in enumerate(sorted(images.iterdir())):
        pixels = model.preprocess(open_image(path))[None]
        seen = record(model.network.model, blocks.values(), lambda pixels=pixels: model.network.run(pixels))
        for feature, name in blocks.items():
            plain = seen[name].gave
            stored = np.asarray(views[feature][row], np.float32)
            expected = (plain[0].flatten(1).T if plain.ndim == 4 else plain.reshape(stored.shape)).numpy()
            rounding = 2.0**-11 * np.abs(expected) + 2e-5 * np.abs(expected).max()
            assert (np.abs(stored - expected) <= rounding).all(), (feature, row)


def test_rows_say_what_they_are(tmp_path, miniature, pictures):
    _, store = run(configured(tmp_path / "s", pictures, miniature))

    view = store["pictures/mini/3.token"]
    assert view.details == {"n_prefix": 1, "grid": [8, 8], "micro_batch": 4, "image_size": [112, 112]}
    assert view.identity["layer"] == "3"
    receipt = store.collection("pictures/mini/3.token").receipt(0)
    assert receipt.environment["micro_batch"] == 4
    assert receipt.environment["threads"] == 1
    assert receipt.environment["device"] == "cpu"
    assert receipt.environment["torch"] == torch.__version__
    assert len(receipt.content_hashes) == 8


class Counting:
    """Backbone whose passes are counted; everything else is the real one."""

    def __init__(self, backbone):
        self._backbone, self.passes, self.decoded = backbone, [], 0

    def forward(self, batch, features, **how):
        self.passes.append(len(batch))
        return self._backbone.forward(batch, features, **how)

    def preprocess(self, image):
        self.decoded += 1
        return self._backbone.preprocess(image)


def test_any_number_of_features_cost_one_decode_and_one_pass(tmp_path, miniature, pictures):
    found = survey(configured(tmp_path / "s", pictures, miniature, features=("0-3.q", "0-3.token", "norm.cls")))
    create(found)
    backbone = Counting(load_backbone(miniature))
    extractor = Extractor(found.job, backbone=backbone)

    outcomes = [extractor.extract(task) for task in found.tasks]
    extractor.close()

    assert sum(len(o.sealed) for o in outcomes) == 9 * 6
    assert sum(backbone.passes) == backbone.decoded == 45
    assert max(backbone.passes) == 4


def test_micro_batches_never_cross_a_shard(tmp_path, miniature, pictures):
    found = survey(configured(tmp_path / "s", pictures, miniature, rows_per_shard=10, micro_batch=4))
    create(found)
    backbone = Counting(load_backbone(miniature))
    extractor = Extractor(found.job, backbone=backbone)

    for task in found.tasks:
        extractor.extract(task)
    extractor.close()

    assert backbone.passes == [4, 4, 2] * 4 + [4, 1]


def test_a_layer_added_later_computes_only_that_layer(tmp_path, miniature, pictures):
    run(configured(tmp_path / "s", pictures, miniature, features=("3.q",)))

    found = survey(configured(tmp_path / "s", pictures, miniature, features=("3.q", "2.k"), rows_per_shard=None))

    assert {task.features for task in found.tasks} == {(("2.k", "pictures/mini/2.k"),)}
    assert {task.sibling for task in found.tasks} == {"pictures/mini/3.q"}
    assert {w.rows_per_shard for w in found.wanted} == {8}


def test_a_collection_keeps_the_micro_batch_that_it_was_created_with(tmp_path, miniature, pictures):
    create(survey(configured(tmp_path / "s", pictures, miniature, features=("3.q",), micro_batch=4)))

    found = survey(configured(tmp_path / "s", pictures, miniature, features=("3.q",), micro_batch=2))

    assert {task.micro_batch for task in found.tasks} == {4}


class Memoryless(Counting):
    """A device on which no more than two images fit."""

    def forward(self, batch, features, **how):
        if len(batch) > 2:
            self.passes.append(-len(batch))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().forward(batch, features, **how)


class Unmapped:
    """Pages for the features of two images, and no more."""

    def __init__(self, buffers):
        self._buffers = buffers

    def take(self, rows, row_shapes):
        if rows > 2:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return self._buffers.take(rows, row_shapes)


def test_no_pages_for_features_halve_the_micro_batch_too(tmp_path, miniature, pictures):
    found = survey(configured(tmp_path / "s", pictures, miniature))
    create(found)
    extractor = Extractor(found.job)
    extractor._outputs = Unmapped(extractor._outputs)

    outcomes = [extractor.extract(task) for task in found.tasks[:2]]
    extractor.close()

    assert [(o.status, o.rows, o.micro_batch) for o in outcomes] == [("sealed", 8, 2)] * 2


def test_out_of_memory_halves_the_micro_batch_for_good_and_loses_no_row(tmp_path, miniature, pictures):
    found = survey(configured(tmp_path / "s", pictures, miniature, rows_per_shard=16, micro_batch=8))
    collections = create(found)
    backbone = Memoryless(load_backbone(miniature))
    extractor = Extractor(found.job, backbone=backbone)

    outcomes = [extractor.extract(task) for task in found.tasks]
    extractor.close()
    for collection in collections.values():
        collection.commit()

    assert {o.status for o in outcomes} == {"sealed"}
    assert [n for n in backbone.passes if n < 0] == [-8, -4]
    assert {o.micro_batch for o in outcomes} == {2}
    assert "2 from here on" in outcomes[0].notes[-1]
    stored = open_store(tmp_path / "s")["pictures/mini/3.token"][:]
    np.testing.assert_allclose(stored, reference(miniature, pictures, "3.token"), rtol=2e-3, atol=2e-3)


@pytest.mark.chaos
def test_a_host_without_memory_halves_the_micro_batch_too(tmp_path):
    """A real limit on a real process: the allocator fails, the shard is sealed all the same."""
    images = save_images(tmp_path / "large", 32, size=448)
    wide = str(save_miniature("dinov2", tmp_path / "wide", hidden_size=384, num_hidden_layers=1, mlp_ratio=8))
    program = textwrap.dedent(f"""
        import json, resource
        from brainenc.extract.extractor import Extractor
        from tests.extract.test_extractor import configured, create, survey
        sizes = dict(micro_batch=32, rows_per_shard=32)
        config = configured({str(tmp_path / "s")!r}, {str(images)!r}, {wide!r}, ("0.q", "0.cls"), **sizes)
        found = survey(config)
        create(found)
        extractor = Extractor(found.job)
        data = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (data + (500 << 20), -1))
        outcome = extractor.extract(found.tasks[0])
        print(json.dumps([outcome.status, outcome.micro_batch, outcome.rows, str(outcome.error), list(outcome.notes)]))
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)

    status, micro_batch, rows, error, notes = json.loads(done.stdout.strip().splitlines()[-1] if done.stdout else "[]")
    assert (status, rows) == ("sealed", 32), (error, done.stderr)
    assert micro_batch < 32
    assert notes


class Shrinking(NullGuard):
    """A guard that asks once to shrink, and hears whether it was obeyed."""

    def __init__(self):
        self.orders, self.answers = [Order(kind="shrink", reason="host memory at 93 %")], []

    def pending(self):
        return self.orders[0] if self.orders else None

    def saved(self, *, path, step, epoch, error=""):
        self.answers.append(self.orders.pop())


def test_the_guard_shrinks_the_micro_batch(tmp_path, miniature, pictures):
    guard = Shrinking()

    outcomes, store = run(configured(tmp_path / "s", pictures, miniature), guard=guard)

    assert [answer.kind for answer in guard.answers] == ["shrink"]
    assert {o.micro_batch for o in outcomes} == {2}
    assert store["pictures/mini/3.q"].present.all()


def test_a_stop_is_heard_at_the_next_micro_batch_and_leaves_nothing_behind(tmp_path, miniature, pictures):
    passes = []

    outcomes, _ = run(
        configured(tmp_path / "s", pictures, miniature),
        on_batch=lambda rows, size: passes.append(size), should_stop=lambda: len(passes) >= 3,
    )  # fmt: skip

    assert [o.status for o in outcomes] == ["sealed", *["stopped"] * 5]
    assert not list((tmp_path / "s").rglob("*.partial"))
    assert len(list((tmp_path / "s").rglob("shard-*.arrow"))) == 2


@pytest.fixture
def spoilt(tmp_path):
    """Twenty images, of which 3 is cut, 11 is empty and 12 has another size."""
    folder = save_images(tmp_path / "spoilt", 20)
    files = sorted(folder.iterdir())
    files[3].write_bytes(files[3].read_bytes()[:-500])
    files[11].write_bytes(b"")
    Image.new("RGB", (56, 56)).save(files[12])
    return folder


def test_bad_images_are_all_listed_and_the_other_shards_are_sealed(tmp_path, miniature, spoilt):
    outcomes, _ = run(configured(tmp_path / "s", spoilt, miniature))

    assert [o.status for o in outcomes] == ["bad_images", "bad_images", "sealed"]
    bad = outcomes[0].bad | outcomes[1].bad
    files = sorted(spoilt.iterdir())
    assert set(bad) == {str(files[n]) for n in (3, 11, 12)}
    assert "empty file" in bad[str(files[11])]
    assert "--size-policy" in bad[str(files[12])]


def test_bad_images_become_missing_rows_by_choice_and_the_others_keep_their_places(tmp_path, miniature, spoilt):
    outcomes, store = run(configured(tmp_path / "s", spoilt, miniature, on_bad_image="null"))

    view = store["spoilt/mini/3.q"]
    assert {o.status for o in outcomes} == {"sealed"}
    assert np.flatnonzero(~view.present).tolist() == [3, 11, 12]
    model = load_backbone(miniature)
    for row in (2, 4, 13, 19):
        pixels = model.preprocess(draw_image(row))[None]
        expected = model.forward(pixels, [Feature("3", "q")])[Feature("3", "q")][0]
        np.testing.assert_allclose(view[row], expected, rtol=2e-3, atol=2e-3)


def test_a_whole_micro_batch_of_bad_images_is_a_gap_like_any_other(tmp_path, miniature):
    folder = save_images(tmp_path / "spoilt", 8)
    for path in sorted(folder.iterdir())[4:]:
        path.write_bytes(b"nothing")

    _, store = run(configured(tmp_path / "s", folder, miniature, on_bad_image="null"))

    assert store["spoilt/mini/3.q"].present.tolist() == [True] * 4 + [False] * 4


def test_an_image_replaced_between_two_layers_is_noticed_by_its_content(tmp_path, miniature):
    folder = save_images(tmp_path / "set", 8)
    run(configured(tmp_path / "s", folder, miniature, features=("3.q",)))
    found = survey(configured(tmp_path / "s", folder, miniature, features=("2.q",)))
    create(found)
    victim = sorted(folder.iterdir())[5]
    draw_image(99).save(victim)

    extractor = Extractor(found.job)
    outcome = extractor.extract(found.tasks[0])
    extractor.close()

    assert outcome.status == "failed"
    assert isinstance(outcome.error, StimuliChanged)
    assert str(victim) in str(outcome.error)


def test_a_layer_added_later_reads_one_receipt_a_shard(tmp_path, miniature, pictures, monkeypatch):
    """And mends nothing: a worker beside others has no business there."""
    run(configured(tmp_path / "s", pictures, miniature, features=("3.q",)))
    found = survey(configured(tmp_path / "s", pictures, miniature, features=("2.q",)))
    create(found)
    read, receipt = [], Collection.receipt

    def counted(self, shard):
        read.append((self.key, shard))
        return receipt(self, shard)

    monkeypatch.setattr(Collection, "receipt", counted)
    monkeypatch.setattr(Collection, "sealed", lambda self: pytest.fail("a worker looked through all receipts"))
    extractor = Extractor(found.job)
    outcomes = [extractor.extract(task) for task in found.tasks]
    extractor.close()

    assert {o.status for o in outcomes} == {"sealed"}
    assert sorted(read) == [("pictures/mini/3.q", shard) for shard in range(6)]


def test_copied_rows_read_only_the_receipts_that_have_them(tmp_path, miniature, pictures, monkeypatch):
    run(configured(tmp_path / "s", pictures, miniature, features=("3.q",)))
    found = survey(
        configured(tmp_path / "s", save_images(tmp_path / "mine", 4), miniature, features=("3.q",), by_id=True)
    )
    create(found)
    read, receipt = [], Collection.receipt
    monkeypatch.setattr(Collection, "receipt", lambda self, shard: read.append(shard) or receipt(self, shard))
    monkeypatch.setattr(Collection, "sealed", lambda self: pytest.fail("a worker looked through all receipts"))
    extractor = Extractor(found.job)
    outcomes = [extractor.extract(task) for task in found.tasks]
    extractor.close()

    assert [(o.status, o.reused) for o in outcomes] == [("sealed", 4)]
    assert set(read) == {0}


def test_a_value_that_float16_cannot_hold_is_an_error_with_the_image_and_the_way_out(tmp_path, miniature, pictures):
    class Loud(Counting):
        def forward(self, batch, features, **how):
            return {f: rows * 1e6 for f, rows in super().forward(batch, features, **how).items()}

    found = survey(configured(tmp_path / "s", pictures, miniature))
    create(found)
    extractor = Extractor(found.job, backbone=Loud(load_backbone(miniature)))

    outcome = extractor.extract(found.tasks[0])
    extractor.close()

    assert isinstance(outcome.error, ValueNotStorable)
    assert "nsd-00000" in str(outcome.error)
    assert "--dtype bfloat16" in str(outcome.error)
    assert not list((tmp_path / "s").rglob("shard-*"))


def test_rows_of_images_that_another_set_has_are_copied_by_id_and_content(tmp_path, miniature, pictures):
    run(configured(tmp_path / "s", pictures, miniature))
    mine = save_images(tmp_path / "mine", 12)
    draw_image(70).save(sorted(mine.iterdir())[5])  # the same id, another image
    draw_image(80).save(mine / "train-0099_nsd-77777.png")
    found = survey(configured(tmp_path / "s", mine, miniature, by_id=True))
    collections = create(found)
    backbone = Counting(load_backbone(miniature))
    extractor = Extractor(found.job, backbone=backbone)

    outcomes = [extractor.extract(task) for task in found.tasks]
    extractor.close()
    for collection in collections.values():
        collection.commit()

    assert (sum(o.rows for o in outcomes), sum(o.reused for o in outcomes)) == (2, 11)
    assert sum(backbone.passes) == backbone.decoded == 2
    assert extractor.rows_done == 13
    stored = open_store(tmp_path / "s")["mine/mini/3.token"][:8]
    np.testing.assert_allclose(stored, reference(miniature, mine, "3.token")[:8], rtol=2e-3, atol=2e-3)


def test_rows_are_computed_again_without_being_asked_to_share(tmp_path, miniature, pictures):
    run(configured(tmp_path / "s", pictures, miniature, features=("3.q",)))

    outcomes, _ = run(configured(tmp_path / "s", save_images(tmp_path / "mine", 4), miniature, features=("3.q",)))

    assert sum(o.rows for o in outcomes) == 4


def test_someone_elses_shard_is_left_alone(tmp_path, miniature, pictures):
    found = survey(configured(tmp_path / "s", pictures, miniature))
    create(found)
    first, second = Extractor(found.job), Extractor(found.job)

    outcomes = [worker.extract(found.tasks[0]) for worker in (first, second)]
    first.close()
    second.close()

    assert [o.rows for o in outcomes] == [8, 0]
    assert [o.status for o in outcomes] == ["sealed", "sealed"]


def test_limits_can_be_set_on_this_system():
    """The memory test above relies on it."""
    assert resource.getrlimit(resource.RLIMIT_DATA)[1] == resource.RLIM_INFINITY
