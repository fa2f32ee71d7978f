"""What is planted is found, as far as it can be; what is not there is not."""

import numpy as np
import pytest

from brainenc.featurestore.store import open_store
from brainenc.train.launch import train
from brainenc.train.run_folder import RunFolder

CEILING = 1 / np.sqrt(1 + 0.3**2)
"""Correlation of a vertex with its own signal, whose noise has 0.3 of its size."""


@pytest.fixture(scope="session")
def larger(make_small, tmp_path_factory):
    """600 training images: enough to find the readout of every vertex."""
    return make_small(tmp_path_factory.mktemp("larger"), n_train=600, n_test=5)


def last_validation(out) -> dict:
    return [r for r in RunFolder(out).metrics() if r["split"] == "val"][-1]


FIELDS = {"epochs": 25, "learning_rate": 1e-2, "lr_drop": 8, "lr_gamma": 0.3, "batch_size": 32, "log_every": 100,
          "predict": False}  # fmt: skip


def test_the_transformer_reaches_nine_tenths_of_the_planted_ceiling(larger, tmp_path):
    train(larger.config(tmp_path / "run", dropout=0.0, **FIELDS))

    assert last_validation(tmp_path / "run")["val_perf"] > 0.9 * CEILING


def test_responses_of_other_images_stay_at_chance(larger, tmp_path):
    """60 images: r of one vertex has a standard error of 0.13, the mean over 56 related ones a smaller one."""
    train(larger.config(tmp_path / "run", shuffle_responses=True, **{**FIELDS, "epochs": 8}))

    assert abs(last_validation(tmp_path / "run")["val_perf"]) < 0.1


@pytest.mark.chaos
def test_features_of_other_images_stay_at_chance(larger, tmp_path):
    """The other way round: rows of the store are shuffled, ids stay."""
    source = open_store(larger.store)["subj01-train/tiny/1.q"]
    rows = source.gather(np.random.default_rng(5).permutation(len(source)))
    with open_store(tmp_path / "store", create=True).writer(
        "subj01-train/tiny/1.q", ids=source.ids, row_shape=rows.shape[1:], details=dict(source.details)
    ) as writer:
        writer.append(rows)

    train(larger.config(tmp_path / "run", store=str(tmp_path / "store"), **{**FIELDS, "epochs": 8}))

    assert abs(last_validation(tmp_path / "run")["val_perf"]) < 0.1


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A synthetic subject of 2,000 photographs, whose responses are read out of a small real DINOv2."""
    from brainenc.datasets.algonauts import Subject
    from brainenc.datasets.synthetic import synthesize
    from brainenc.extract.backbone import load_backbone
    from brainenc.extract.maps import feature_maps
    from brainenc.extract.miniature import save_miniature

    root = tmp_path_factory.mktemp("photographs")
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
             "image_size": 112, "patch_size": 14}  # fmt: skip
    fitting = {"size_policy": "resize", "image_size": 112}
    backbone = load_backbone(str(save_miniature("dinov2", root / "mini", seed=0, **sizes)), **fitting)
    maps = feature_maps(backbone, "-1.q")
    truth = synthesize(root / "subj01", features=maps, n_train=2000, n_test=8, vertices=(150, 160), seed=0)
    subject, store = Subject.open(root / "subj01"), open_store(root / "store", create=True)
    images = subject.images("train")
    with store.writer("subj01-train/mini/2.q", ids=subject.ids("train"), row_shape=(64, 48)) as writer:
        for first in range(0, len(images), 32):
            writer.append(maps(images[first : first + 32]).reshape(-1, 64, 48))
    return subject.folder, store.url, truth.max_val_perf


@pytest.mark.soak
def test_nine_tenths_of_the_ceiling_of_a_synthetic_subject_of_photographs(small, photographs, tmp_path):
    """A real backbone's features of photographs, planted ROIs at places of their own: minutes of training."""
    subject, store, ceiling = photographs
    config = small.config(
        tmp_path / "run", subject_dir=str(subject), store=store, features=("mini/2.q",), epochs=24, batch_size=16,
        learning_rate=4e-3, lr_drop=10, lr_gamma=0.2, predict=False, log_every=100,
        encoder={"hidden": None, "n_heads": 4, "feedforward": 1024, "dropout": 0.0},
    )  # fmt: skip

    result = train(config)

    assert result.val_perf > 0.9 * ceiling
