"""The presets compute what the published encoder's backbones compute, written out here as they are published."""

import math

import numpy as np
import open_clip
import pytest
import torch
import torchvision
import transformers
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.models._utils import IntermediateLayerGetter

from brainenc.errors import UnknownName, UsageError
from brainenc.extract.backbone import load_backbone, parse_features
from brainenc.extract.miniature import backbone_string, save_miniature
from brainenc.extract.presets import PRESETS, find_preset
from tests.extract.conftest import draw_image

IMAGENET = transforms.Compose([
    transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
])  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def image():
    return draw_image(3, 425)


def run(preset, backbone, image):
    """The preset's one feature of one image, as a user of the preset gets it."""
    loaded = load_backbone(f"{preset}@{backbone}")
    (feature,) = parse_features([find_preset(preset).feature], loaded.info)
    (row,) = loaded.forward(loaded.preprocess(image)[None], [feature]).values()
    assert tuple(row.shape[1:]) == loaded.row_shape(feature, (425, 425))
    return row[0]


def padded(image, patch=14):
    """Zeros at the bottom and right, after normalisation, to the next multiple of the patch."""
    pixels = IMAGENET(image)
    height, width = (math.ceil(n / patch) * patch for n in pixels.shape[1:])
    canvas = torch.zeros(3, height, width)
    canvas[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return canvas[None]


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return save_miniature("dinov2", tmp_path_factory.mktemp("models") / "dino")


def test_dinov2_q_is_the_query_of_the_last_block(dino, image):
    """q of the last block, all heads, class token kept: 962 rows."""
    model = transformers.AutoModel.from_pretrained(dino).eval()
    with torch.no_grad():
        before = model(pixel_values=padded(image), output_hidden_states=True).hidden_states[-2]
        block = model.encoder.layer[-1]
        wanted = block.attention.q_proj(block.norm1(before))[0]
    assert wanted.shape == (962, 48)
    assert torch.allclose(run("dinov2_q", dino, image), wanted, atol=1e-5)
    assert torch.allclose(run("dinov2_q_cls", dino, image), wanted[0], atol=1e-5)


def test_dinov2_is_the_normed_last_block(dino, image):
    """Tokens after the final norm, class token kept."""
    model = transformers.AutoModel.from_pretrained(dino).eval()
    with torch.no_grad():
        wanted = model(pixel_values=padded(image)).last_hidden_state[0]
    assert torch.equal(run("dinov2", dino, image), wanted)
    assert torch.equal(run("dinov2_cls", dino, image), wanted[0])


def test_clip_is_every_token_projected_with_imagenet_statistics(tmp_path, image):
    """A squash by Image.resize, ImageNet statistics, and the class token and patches after the visual projection."""
    saved = save_miniature("open_clip", tmp_path / "clip", image_size=64, patch_size=16)
    model = open_clip.create_model(f"local-dir:{saved}").eval()
    model.visual.output_tokens = True
    with torch.no_grad():
        pooled, tokens = model.visual(IMAGENET(image.resize((64, 64)))[None])
        wanted = torch.cat([pooled[:, None], tokens @ model.visual.proj], dim=1)[0]
    got = run("clip", backbone_string("open_clip", saved), image)
    assert got.shape == (17, 32)
    assert torch.allclose(got, wanted, atol=1e-5)
    assert torch.allclose(run("clip_cls", backbone_string("open_clip", saved), image), pooled[0], atol=1e-5)


def test_resnets_are_layer4_at_native_size_with_frozen_norms(tmp_path, image):
    """The last stage of a network with frozen batch norm, as rows; _cls is its mean, what the linear encoder takes."""
    name = "resnet18"
    saved = save_miniature(name, tmp_path / name)
    model = getattr(torchvision.models, name)(norm_layer=Frozen)
    model.load_state_dict(torch.load(saved, weights_only=True), strict=False)
    body = IntermediateLayerGetter(model, return_layers={"layer4": "0"})
    with torch.no_grad():
        maps = body(IMAGENET(image)[None])["0"]
    wanted = maps.flatten(2).transpose(1, 2)[0]
    got = run(name, backbone_string(name, saved), image)
    assert got.shape == (14 * 14, maps.shape[1])
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    pooled = run(f"{name}_cls", backbone_string(name, saved), image)
    assert (pooled - maps.mean(dim=(2, 3))[0]).abs().max() <= 1e-4 * wanted.abs().max()


class Frozen(nn.Module):
    """Batch norm whose statistics and weights are fixed, as the published encoder writes it."""

    def __init__(self, n):
        super().__init__()
        for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((n,), start))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def test_the_published_names_are_all_there():
    """What people type today, with the backbones and features that they mean."""
    assert {n for n in PRESETS if not n.endswith("_cls")} == {"dinov2_q", "dinov2", "clip", "resnet50", "resnet18"}
    assert all(f"{n}_cls" in PRESETS for n in ("dinov2_q", "dinov2", "clip", "resnet50"))
    assert (PRESETS["dinov2_q"].backbone, PRESETS["dinov2_q"].feature) == ("facebook/dinov2-base", "-1.q")
    assert PRESETS["clip"].backbone == "open_clip:ViT-L-14/openai"


def test_the_clip_preset_says_that_it_is_not_clips_own():
    """Its odd preprocessing comes with a warning that names the right one."""
    assert "open_clip:ViT-L-14/openai" in PRESETS["clip"].warning


def test_clip_by_itself_keeps_its_own_preprocessing(tmp_path):
    """The same weights without the preset are cropped and use CLIP's statistics; the two are told apart by name."""
    saved = backbone_string("open_clip", save_miniature("open_clip", tmp_path / "clip"))
    plain, preset = load_backbone(saved), load_backbone(f"clip@{saved}")
    assert (plain.info.preprocessing["policy"], preset.info.preprocessing["policy"]) == ("crop", "resize")
    assert np.allclose(plain.info.preprocessing["mean"], [0.48145466, 0.4578275, 0.40821073])
    assert plain.info.weights_hash == preset.info.weights_hash


def test_unknown_presets_say_what_there_is():
    """A preset that there is not lists those that there are."""
    with pytest.raises(UnknownName, match="dinov2_q"):
        find_preset("dinov4")


def test_a_preset_fixes_its_sizes(dino):
    """Another size under a preset's name would be another thing: the backbone itself is named instead."""
    with pytest.raises(UsageError, match=r"-1\.q"):
        load_backbone(f"dinov2_q@{dino}", image_size=224)


def test_a_preset_for_patches_refuses_a_network_without(tmp_path):
    """dinov2_q over a residual network is a mistake that is said."""
    saved = backbone_string("resnet18", save_miniature("resnet18", tmp_path / "r"))
    with pytest.raises(UsageError, match="no patches"):
        load_backbone(f"dinov2_q@{saved}")


def test_a_white_image_is_white_everywhere_but_in_the_padding(dino):
    """Padding is zero in normalised units, not black."""
    white = load_backbone(f"dinov2@{dino}").preprocess(Image.new("RGB", (425, 425), "white"))
    assert white[:, :425, :425].min() > 2
    assert white[:, 425:].abs().max() == 0
