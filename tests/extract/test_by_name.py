"""Backbones by the names that people type, from each library's own cache, without a network: the real loading code."""

import json
import os
import subprocess
import sys

import open_clip
import pytest
import timm
import torch
import torchvision
import transformers

from brainenc.extract.backbone import load_backbone, parse_features
from brainenc.extract.miniature import save_miniature

NAMES = ("facebook/dinov2-base", "timm:test_vit.r160_in1k", "torchvision:resnet18", "dinov2_q")


def hub_snapshot(cache, repository):
    """The folder in which the hub's cache keeps the files of a repository."""
    home = cache / "hub" / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What show-model says about each name in a process whose caches hold small models under those names."""
    cache = tmp_path_factory.mktemp("cache")
    save_miniature("dinov2", hub_snapshot(cache, "facebook/dinov2-base"))
    tiny = timm.create_model("test_vit")
    torch.save(tiny.state_dict(), hub_snapshot(cache, "timm/test_vit.r160_in1k") / "pytorch_model.bin")
    checkpoints = cache / "hub" / "checkpoints"
    checkpoints.mkdir()
    torch.save(torchvision.models.resnet18().state_dict(), checkpoints / "resnet18-f37072fd.pth")
    script = (
        "import json, sys\n"
        "from brainenc.cli.show_model import describe\n"
        "from brainenc.extract.backbone import load_backbone\n"
        "print(json.dumps({name: describe(load_backbone(name), (425, 425)) for name in sys.argv[1:]}))\n"
    )
    settings = {**os.environ, "HF_HOME": str(cache), "TORCH_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    settings.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", script, *NAMES], env=settings, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_hub_name_is_found_in_the_hubs_cache(reports):
    """facebook/dinov2-base is loaded by that name, filed as dinov2-base, padded from 425 to 434."""
    report = reports["facebook/dinov2-base"]
    assert (report["slug"], report["source"], report["input_size"]) == ("dinov2-base", "transformers", [434, 434])
    assert report["layers"]["3"]["q"]["shape"] == [962, 48]


def test_the_preset_is_the_same_backbone(reports):
    """dinov2_q loads facebook/dinov2-base and files it under the same name with the same weights."""
    assert reports["dinov2_q"]["slug"] == "dinov2-base"
    assert reports["dinov2_q"]["weights"] == reports["facebook/dinov2-base"]["weights"]
    assert reports["dinov2_q"]["preprocessing"] == reports["facebook/dinov2-base"]["preprocessing"]


def test_a_timm_name_brings_timms_preprocessing(reports):
    """A timm model by name and tag is cropped and normalised as its own configuration says."""
    report = reports["timm:test_vit.r160_in1k"]
    wanted = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("test_vit.r160_in1k").to_dict())
    assert report["slug"] == "test_vit.r160_in1k"
    assert report["preprocessing"]["mean"] == list(wanted["mean"])
    assert report["input_size"] == list(wanted["input_size"][1:])


def test_a_torchvision_name_takes_the_first_published_weights(reports):
    """resnet18 alone means IMAGENET1K_V1, as pretrained=True always did, cropped to 224."""
    report = reports["torchvision:resnet18"]
    assert (report["slug"], report["input_size"]) == ("resnet18", [224, 224])
    assert report["layers"]["layer4"]["token"]["shape"] == [49, 512]


@pytest.fixture
def tagged(tmp_path, monkeypatch):
    """A small open_clip architecture with a pretrained tag of its own, trained with QuickGELU as OpenAI's were."""
    config = json.loads((save_miniature("open_clip", tmp_path / "mini") / "open_clip_config.json").read_text())
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mini-clip.json").write_text(json.dumps(config["model_cfg"]))
    weights = tmp_path / "mini" / "open_clip_pytorch_model.bin"
    known = open_clip.pretrained._PRETRAINED
    tag = {"url": weights.as_uri(), "quick_gelu": True, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    monkeypatch.setitem(known, "mini-clip", {"openai": tag})
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", lambda *_args, **_kwargs: str(weights))
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_args, **_kwargs: str(weights))
    open_clip.add_model_config(str(tmp_path / "configs"))
    yield weights
    open_clip.factory._MODEL_CONFIG_PATHS.remove(tmp_path / "configs")
    open_clip.factory._rescan_model_configs()


def test_an_open_clip_tag_brings_its_activation_and_statistics(tagged):
    """A tag trained with QuickGELU gets QuickGELU, though its architecture's name does not say so; a file does not."""
    by_tag = load_backbone("open_clip:mini-clip/openai")
    by_file = load_backbone(f"open_clip:mini-clip/{tagged}")
    assert by_tag.info.slug == "mini-clip-openai"
    assert by_tag.info.preprocessing["mean"] == [0.4, 0.5, 0.6]
    assert by_tag.info.weights_hash == by_file.info.weights_hash
    kinds = [{type(m).__name__ for m in b.network.model.modules()} for b in (by_tag, by_file)]
    assert "QuickGELU" in kinds[0]
    assert "QuickGELU" not in kinds[1]
    assert by_tag.info.config != by_file.info.config
    inputs = torch.randn(1, 3, 32, 32)
    last = parse_features(["-1.token"], by_tag.info)
    assert not torch.equal(*(b.forward(inputs, last)[last[0]] for b in (by_tag, by_file)))


def test_an_open_clip_model_at_another_size(tagged):
    """--image-size builds the model for that size, with its position embeddings resampled."""
    backbone = load_backbone(f"open_clip:mini-clip/{tagged}", image_size=48)
    assert backbone.input_shape((425, 425)) == (48, 48)
    (feature,) = parse_features(["0.token"], backbone.info)
    assert backbone.row_shape(feature, (425, 425)) == (37, 48)


def test_an_open_clip_tower_of_timm(tmp_path):
    """Towers that open_clip takes from timm (SigLIP, EVA) have blocks, q, k, v and the pooled embedding."""
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    torch.save(open_clip.CustomTextCLIP(**config).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config | {"custom_text": True}, "preprocess_cfg": preprocess})
    )
    backbone = load_backbone(f"open_clip:local-dir:{tmp_path}")
    assert backbone.info.preprocessing["policy"] == "resize"
    assert {"q", "k", "v", "cls"} <= set(backbone.info.layer_facets["0"])
    inputs = torch.randn(1, 3, 160, 160)
    features = parse_features(["-1.q", "norm.pool"], backbone.info)
    with torch.no_grad():
        assert torch.equal(backbone.forward(inputs, features)[features[1]], backbone.network.model(inputs))


def test_a_folder_says_which_library_saved_it(tmp_path, monkeypatch):
    """A folder of open_clip needs no prefix, and the folder one stands in has a name too."""
    saved = save_miniature("open_clip", tmp_path / "mine")
    assert load_backbone(str(saved)).info.source == "open_clip"
    monkeypatch.chdir(save_miniature("dinov2", tmp_path / "here"))
    assert load_backbone(".").info.slug == "here"


def test_hub_ids_that_are_classifiers_give_their_backbone(tmp_path):
    """A checkpoint saved with a classification head loads as the backbone below it."""
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                                    image_size=32, patch_size=8, num_labels=5)  # fmt: skip
    whole = transformers.ViTForImageClassification(config).eval()
    whole.save_pretrained(tmp_path / "classifier")
    backbone = load_backbone(str(tmp_path / "classifier"))
    inputs = torch.randn(1, 3, 32, 32)
    (feature,) = parse_features(["norm.token"], backbone.info)
    with torch.no_grad():
        wanted = whole.base_model(pixel_values=inputs).last_hidden_state
    assert torch.equal(backbone.forward(inputs, [feature])[feature], wanted)
