"""Small models are real architectures, seeded, and load through the same code as the big ones."""

import pytest
import torch

from brainenc.errors import UnknownName
from brainenc.extract.backbone import load_backbone
from brainenc.extract.miniature import backbone_string, kinds, save_miniature


@pytest.mark.parametrize("kind", [k for k in kinds() if k != "resnet50"])
def test_every_kind_loads(kind, tmp_path):
    """Each kind is saved and loaded again, with layers to take."""
    info = load_backbone(backbone_string(kind, save_miniature(kind, tmp_path / kind))).info
    assert info.n_layers >= 4
    assert "token" in info.facets


def test_the_seed_makes_the_weights(tmp_path):
    """The same seed gives the same weights, another others, and the caller's own random numbers go on as before."""
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    hashes = [
        load_backbone(str(save_miniature("dinov2", tmp_path / f"{n}", seed=seed))).info.weights_hash
        for n, seed in enumerate((0, 0, 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.rand(1) == wanted


def test_sizes_can_be_chosen(tmp_path):
    """Fields of the architecture go through to the library under its own names."""
    saved = save_miniature(
        "dinov2", tmp_path / "wide", hidden_size=64, num_hidden_layers=2, patch_size=16, image_size=64
    )
    info = load_backbone(str(saved)).info
    assert (info.width, info.n_layers, info.patch) == (64, 2, 16)


def test_unknown_kinds_say_what_there_is(tmp_path):
    """A kind that there is not lists those that there are."""
    with pytest.raises(UnknownName, match="dinov2_registers"):
        save_miniature("dinov9", tmp_path)
