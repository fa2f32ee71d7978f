"""One pass gives every feature, equal to the library's own; nothing runs that is not needed; nothing is left behind."""

import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
import transformers
from PIL import Image
from torch import nn

from brainenc.errors import BrainencError, UnknownName, UsageError
from brainenc.extract.backbone import Feature, load_backbone, parse_features
from brainenc.extract.miniature import backbone_string, save_miniature
from brainenc.extract.preprocess import IMAGENET, OPENAI_CLIP


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_miniature("dinov2", tmp_path_factory.mktemp("models") / "mini-dino")


@pytest.fixture(scope="module")
def dino(folder):
    return load_backbone(str(folder))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    saved = save_miniature("resnet18", tmp_path_factory.mktemp("models") / "resnet")
    return load_backbone(backbone_string("resnet18", saved))


def batch(n=2, size=56):
    torch.manual_seed(0)
    return torch.randn(n, 3, size, size)


def compute(backbone, inputs, *texts, **kwargs):
    features = parse_features(texts, backbone.info)
    return dict(zip(map(str, features), backbone.forward(inputs, features, **kwargs).values(), strict=True))


def counting(modules):
    """How often each module is called while the hooks are in place."""
    counts = dict.fromkeys(modules, 0)

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    return counts, [module.register_forward_pre_hook(count(name)) for name, module in modules.items()]


def test_features_equal_the_library_run_by_hand(folder, dino):
    """Every block's tokens, the normed tokens and the pooled output are transformers' own, bit for bit."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        plain = model(pixel_values=batch(), output_hidden_states=True)
    got = compute(dino, batch(), "*.token", "norm.token", "norm.pool", "norm.cls")
    for number in range(4):
        assert torch.equal(got[f"{number}.token"], plain.hidden_states[number + 1])
    assert torch.equal(got["norm.token"], plain.last_hidden_state)
    assert torch.equal(got["norm.pool"], plain.pooler_output)
    assert torch.equal(got["norm.cls"], plain.last_hidden_state[:, 0])


def test_a_photograph_of_425_gives_962_tokens(dino):
    """425 x 425 is padded to 434 x 434: 31 x 31 patches and the class token."""
    pixels = dino.preprocess(Image.fromarray(np.zeros((425, 425, 3), np.uint8)))
    feature = parse_features(["-1.q"], dino.info)[0]
    assert feature == Feature("3", "q")
    assert dino.input_shape((425, 425)) == (434, 434) == tuple(pixels.shape[1:])
    assert dino.row_shape(feature, (425, 425)) == (962, 48)
    assert dino.details(feature, (425, 425)) == {"n_prefix": 1, "grid": [31, 31]}
    assert dino.forward(pixels[None], [feature])[feature].shape == (1, 962, 48)


def test_any_number_of_features_costs_one_pass(dino):
    """Every block is called once, however many features come from it."""
    blocks = {name: dino.network.model.get_submodule(name) for name in dino.info.blocks}
    counts, handles = counting(blocks)
    try:
        results = compute(dino, batch(), "*.token", "*.q", "*.k", "*.v", "*.cls", "norm.token", "norm.pool")
    finally:
        for handle in handles:
            handle.remove()
    assert len(results) == 4 * 5 + 2
    assert set(counts.values()) == {1}


def test_nothing_runs_past_what_is_needed(dino):
    """Asking for block 1 leaves blocks 2 and 3 alone; asking for q of block 1 leaves that block's MLP alone too."""
    model = dino.network.model
    modules = {name: model.get_submodule(name) for name in (*dino.info.blocks, f"{dino.info.blocks[1]}.mlp")}
    counts, handles = counting(modules)
    try:
        compute(dino, batch(), "0.token", "1.q")
        q_only = dict(counts)
        compute(dino, batch(), "1.token")
    finally:
        for handle in handles:
            handle.remove()
    assert [q_only[name] for name in modules] == [1, 1, 0, 0, 0]
    assert [counts[name] for name in modules] == [2, 2, 0, 0, 1]


def test_a_failing_pass_leaves_no_hooks(dino):
    """An error in the middle of the model (out of memory, say) reaches the caller, and leaves the model as it was."""
    model = dino.network.model

    def fail(*_):
        raise torch.OutOfMemoryError("out of memory, on purpose")

    handle = model.get_submodule(dino.info.blocks[2]).register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        compute(dino, batch(), "1.q", "3.token")
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert set(compute(dino, batch(), "1.q", "3.token")) == {"1.q", "3.token"}


def test_what_comes_out_can_be_trained_on(dino):
    """Features made on the fly go into a trainable layer: gradients reach it, and stop there."""
    tokens = compute(dino, batch(), "norm.token")["norm.token"]
    linear = nn.Linear(48, 1)
    linear(tokens).sum().backward()
    assert linear.weight.grad is not None
    assert not any(p.requires_grad for p in dino.network.model.parameters())


def test_results_in_the_storage_type_are_the_rounded_ones(dino):
    """dtype= gives the same numbers, rounded once, in memory of their own and no more."""
    full = compute(dino, batch(), "0.token", "1.q", "norm.cls")
    half = compute(dino, batch(), "0.token", "1.q", "norm.cls", dtype=torch.float16)
    for name, rows in half.items():
        assert torch.equal(rows, full[name].half())
        assert rows.is_contiguous()
        assert rows.untyped_storage().nbytes() == rows.numel() * 2


def test_position_embeddings_are_interpolated_as_the_model_does(folder, dino):
    """A size and an aspect that the model was not made for go through its own interpolation."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    wide = torch.randn(1, 3, 70, 154)
    with torch.no_grad():
        assert torch.equal(compute(dino, wide, "norm.token")["norm.token"], model(pixel_values=wide).last_hidden_state)


def test_other_sizes_of_a_model_with_one_size(tmp_path):
    """--image-size and pad reach the models that interpolate on request; the resulting rows are announced right."""
    saved = str(save_miniature("vit", tmp_path / "vit"))
    assert load_backbone(saved).input_shape((425, 425)) == (64, 64)
    small = load_backbone(saved, image_size=32)
    assert small.row_shape(Feature("0", "token"), (425, 425)) == (5, 48)
    padded = load_backbone(saved, size_policy="pad")
    assert padded.input_shape((40, 50)) == (48, 64)
    shape = padded.row_shape(Feature("0", "q"), (40, 50))
    assert shape == (13, 48) == tuple(compute(padded, torch.randn(1, 3, 48, 64), "0.q")["0.q"].shape[1:])


def test_other_sizes_of_a_model_of_timm(tmp_path):
    """A timm transformer is built for another size, or for any, and its convolutional networks take any as they are."""
    saved = backbone_string("timm", save_miniature("timm", tmp_path / "vit", model="test_vit"))
    assert load_backbone(saved, image_size=96).row_shape(Feature("0", "q"), (425, 425)) == (37, 64)
    padded = load_backbone(saved, size_policy="pad")
    assert padded.input_shape((50, 70)) == (64, 80)
    shape = padded.row_shape(Feature("0", "q"), (50, 70))
    assert shape == (21, 64) == tuple(compute(padded, torch.randn(1, 3, 64, 80), "0.q")["0.q"].shape[1:])
    network = backbone_string("timm", save_miniature("timm", tmp_path / "conv", model="test_resnet"))
    assert load_backbone(network, image_size=96).input_shape((425, 425)) == (96, 96)


def test_any_module_by_its_dotted_name(resnet):
    """A convolution inside a residual block gives its own output as rows, equal to a plain forward hook's."""
    model, inputs, seen = resnet.network.model, torch.randn(2, 3, 64, 96), {}
    names = ["layer1.0.bn2", "layer4.1.conv2", "layer3", "layer2.0.downsample.0"]
    handles = [
        model.get_submodule(n).register_forward_hook(lambda _m, _i, out, n=n: seen.update({n: out.clone()}))
        for n in names
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    got = compute(resnet, inputs, *(f"{n}.token" for n in names), "layer3.pool")
    for name in names:
        assert torch.equal(got[f"{name}.token"], seen[name].flatten(2).transpose(1, 2)), name
    assert torch.allclose(got["layer3.pool"], seen["layer3"].mean(dim=(2, 3)), atol=1e-6)


def test_a_module_that_is_called_twice_gives_its_last_output(resnet):
    """A residual block's only ReLU runs twice; what is kept is what leaves the block."""
    inputs = torch.randn(1, 3, 64, 64)
    got = compute(resnet, inputs, "layer1.0.relu.token", "layer1.0.token")
    assert torch.equal(got["layer1.0.relu.token"], got["layer1.0.token"])


def test_convolutional_maps_announce_their_rows(resnet):
    """The stages' rows and grids are known for sizes never looked at before."""
    wide = load_backbone_like(resnet)
    for text in ("layer4.token", "layer1.token", "layer4.pool", "layer2.0.conv1.token"):
        feature = parse_features([text], wide.info)[0]
        rows = compute(wide, torch.randn(1, 3, 96, 130), text)[text]
        assert wide.row_shape(feature, (96, 130)) == tuple(rows.shape[1:])
    assert wide.details(Feature("layer4", "token"), (96, 130)) == {"n_prefix": 0, "grid": [3, 5]}


def load_backbone_like(resnet):
    return load_backbone(resnet.info.name, size_policy="pad")


def test_frozen_batch_norm_is_the_trained_one(resnet, tmp_path):
    """The frozen norms give what a plain resnet18 in evaluation mode gives."""
    plain = torchvision.models.resnet18()
    plain.load_state_dict(torch.load(resnet.info.name.split("/", 1)[1], weights_only=True))
    plain.eval()
    trunk = nn.Sequential(*list(plain.children())[:-2])
    inputs = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = trunk(inputs).flatten(2).transpose(1, 2)
    assert torch.allclose(compute(resnet, inputs, "layer4.token")["layer4.token"], wanted, rtol=1e-4, atol=1e-4)


def test_a_masked_autoencoder_sees_the_whole_image_in_order(tmp_path):
    """MAE drops and shuffles patches at random unless told otherwise: here every patch comes, in order, every time."""
    backbone = load_backbone(str(save_miniature("mae", tmp_path / "mae")))
    inputs = batch(1, 64)
    got = compute(backbone, inputs, "norm.token", "0.token")
    assert got["norm.token"].shape == (1, 17, 48)
    assert torch.equal(got["norm.token"], compute(backbone, inputs, "norm.token")["norm.token"])
    changed = inputs.clone()
    changed[:, :, 48:, 48:] += 1  # the last patch
    moved = (compute(backbone, changed, "0.q")["0.q"] - compute(backbone, inputs, "0.q")["0.q"]).abs().sum(-1)[0]
    assert moved[:16].max() == 0
    assert moved[16] > 0


def test_identity_is_the_same_from_another_place(folder, dino, tmp_path):
    """A copy of the folder elsewhere gives the same identity and another slug; it can be written down."""
    shutil.copytree(folder, tmp_path / "elsewhere")
    copy = load_backbone(str(tmp_path / "elsewhere"))
    feature = Feature("3", "q")
    assert copy.identity(feature) == dino.identity(feature)
    assert json.loads(json.dumps(dino.identity(feature))) == dino.identity(feature)
    assert (copy.info.slug, dino.info.slug) == ("elsewhere", "mini-dino")
    assert load_backbone(str(folder), slug="mine").info.slug == "mine"


def test_identity_tells_apart_what_gives_other_numbers(folder, dino, tmp_path):
    """Weights, layer, facet, preprocessing and arithmetic each change it."""
    other = load_backbone(str(save_miniature("dinov2", tmp_path / "other", seed=1)))
    variants = [
        dino.identity(Feature("3", "q")),
        dino.identity(Feature("2", "q")),
        dino.identity(Feature("3", "k")),
        other.identity(Feature("3", "q")),
        load_backbone(str(folder), size_policy="resize", image_size=56).identity(Feature("3", "q")),
        load_backbone(str(folder)).to("cpu", "bfloat16").identity(Feature("3", "q")),
    ]
    assert len({json.dumps(v, sort_keys=True) for v in variants}) == len(variants)


def test_weights_that_no_checkpoint_filled_are_left_out(tmp_path):
    """A ViT saved without its pooler gets a random one at each loading: same hash, and no pooled feature on offer."""
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                                    image_size=32, patch_size=8)  # fmt: skip
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    one, two = (load_backbone(str(tmp_path / "vit")) for _ in range(2))
    assert one.info.weights_hash == two.info.weights_hash
    assert one.info.layer_facets["norm"] == ("token", "cls")
    with pytest.raises(UnknownName, match="token, cls"):
        parse_features(["norm.pool"], one.info)


def test_a_checkpoint_with_missing_blocks_is_refused(tmp_path):
    """Weights that matter and are not there are named, not made up."""
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96,
                                    image_size=32, patch_size=8)  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    settings = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 2}))
    with pytest.raises(UsageError, match="does not hold all weights"):
        load_backbone(str(tmp_path / "vit"))


def test_models_that_take_no_images_are_refused(tmp_path):
    """A language model is a mistake that is said; so is one whose rows differ from image to image."""
    transformers.BertModel(transformers.BertConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=12, vocab_size=9)).save_pretrained(tmp_path / "bert")  # fmt: skip
    transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(
            hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
        )
    ).save_pretrained(tmp_path / "naflex")
    with pytest.raises(UsageError, match="takes input_ids and no images"):
        load_backbone(str(tmp_path / "bert"))
    with pytest.raises(UsageError, match="no fixed rows"):
        load_backbone(str(tmp_path / "naflex"))


@pytest.mark.parametrize(
    ("kind", "sizes", "rows"),
    [
        ("Swin", {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}, (64, 32)),
        ("ConvNext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, (64, 16)),
        ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, (64, 16)),
    ],
)
def test_transformers_models_of_falling_resolution(tmp_path, kind, sizes, rows):
    """Hierarchical and convolutional models of transformers go through the same path: their last stage is a map."""
    config = getattr(transformers, f"{kind}Config")(image_size=64, **sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "model")
    backbone = load_backbone(str(tmp_path / "model"), size_policy="resize", image_size=64)
    (feature,) = parse_features(["-1.token"], backbone.info)
    result = backbone.forward(batch(2, 64), [feature])[feature]
    assert tuple(result.shape[1:]) == backbone.row_shape(feature, (425, 425)) == rows
    assert backbone.details(feature, (425, 425)) == {"n_prefix": 0, "grid": [8, 8]}


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_autocast_is_a_choice_that_is_written_down(folder, dino, dtype):
    """Half-precision arithmetic stays close to float32, says so in the identity, and cannot be changed twice."""
    half = load_backbone(str(folder)).to("cpu", dtype)
    name = str(dtype).removeprefix("torch.")
    exact, rough = (compute(b, batch(), "-1.token", "-1.q") for b in (dino, half))
    for key in exact:
        distance = (rough[key].float() - exact[key]).abs().max() / exact[key].abs().max()
        assert 0 < distance < 0.05, key
    assert half.identity(Feature("3", "q"))["compute"] == name == half.info.compute
    assert half.row_shape(Feature("3", "q"), (56, 56)) == (17, 48)
    with pytest.raises(UsageError, match="load the backbone again"):
        half.to("cpu", "float32")


def test_autocast_is_pytorchs_own(folder):
    """Converting the weights of products beforehand changes no bit against autocast on float32 weights."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = model(pixel_values=batch()).last_hidden_state
    got = compute(load_backbone(str(folder)).to("cpu", "bfloat16"), batch(), "norm.token")["norm.token"]
    assert torch.equal(got, wanted)


def test_unknown_arithmetic_says_what_there_is(dino):
    """A compute dtype that there is not lists those that there are."""
    with pytest.raises(UnknownName, match="float32, bfloat16, float16"):
        dino.to("cpu", "int8")


@pytest.mark.parametrize(
    ("name", "hints"),
    [
        ("nosuch/backbone", ["save_pretrained", "facebook/dinov2-base"]),
        ("/nowhere/at/all", ["save_pretrained"]),
        ("dinov2_qq", ["Did you mean 'dinov2_q'", "the presets dinov2_q, ", "not asked"]),
        ("facebook/dinov2-bsae", ["Did you mean 'facebook/dinov2-base'"]),
        ("open_clip:NoSuchModel/openai", ["ViT-B-32"]),
        ("open_clip:ViT-B-32", ["openai", "laion2b_s34b_b79k"]),
        ("open_clip:ViT-B-32/nosuchtag", ["openai", "checkpoint file"]),
        ("timm:nosuchmodel", ["timm"]),
        ("timm:vit_tiny_patch16_224/nowhere.pth", ["nowhere.pth"]),
        ("torchvision:nosuchnet", ["resnet50"]),
        ("torchvision:resnet18/NOSUCH", ["IMAGENET1K_V1"]),
    ],
)
def test_unknown_backbones_say_what_there_is(name, hints):
    """What cannot be found is an UnknownName that says what could be."""
    with pytest.raises(UnknownName) as caught:
        load_backbone(name)
    assert all(hint in str(caught.value) for hint in hints), str(caught.value)


def test_no_network_is_said_with_a_way_out():
    """A hub model without a network or cache is one of our errors, and says how to bring the weights."""
    with pytest.raises(BrainencError, match="path/to/checkpoint"):
        load_backbone("timm:vit_tiny_patch16_224")


def test_features_must_exist_and_be_resolved(dino):
    """forward refuses what the backbone does not have, and names that parse_features has not seen."""
    with pytest.raises(UnknownName, match="0 to 3"):
        dino.forward(batch(), [Feature("4", "q")])
    with pytest.raises(UsageError, match="parse_features"):
        dino.forward(batch(), [Feature("-1", "q")])


def test_each_source_has_its_own_preprocessing(tmp_path):
    """DINOv2 is padded with ImageNet's statistics, CLIP cropped with its own, SigLIP squashed around one half."""
    dino = load_backbone(str(save_miniature("dinov2", tmp_path / "dino"))).info.preprocessing
    clip = load_backbone(str(save_miniature("clip_vision", tmp_path / "clip"))).info.preprocessing
    siglip = load_backbone(str(save_miniature("siglip", tmp_path / "siglip"))).info.preprocessing
    assert (dino["policy"], dino["multiple"], dino["mean"]) == ("pad", 14, list(IMAGENET[0]))
    assert (clip["policy"], clip["resample"], clip["mean"]) == ("crop", "bicubic", list(OPENAI_CLIP[0]))
    assert (siglip["policy"], siglip["mean"], siglip["size"]) == ("resize", [0.5] * 3, [64, 64])


def test_a_processors_own_file_wins(tmp_path):
    """preprocessor_config.json in the folder decides size, resampling and statistics."""
    folder = save_miniature("vit", tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}, resample=3, image_mean=[0.1, 0.2, 0.3],
                                   image_std=[0.9, 0.8, 0.7]).save_pretrained(folder)  # fmt: skip
    backbone = load_backbone(str(folder))
    wanted = {
        "policy": "resize",
        "size": [48, 48],
        "resample": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.9, 0.8, 0.7],
    }
    assert {k: backbone.info.preprocessing[k] for k in wanted} == wanted
    assert backbone.input_shape((425, 425)) == (48, 48)


def test_the_image_side_of_a_two_tower_model(tmp_path):
    """A whole CLIP gives its image tower, with the projection as a layer of its own."""
    tower = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.CLIPConfig(
        text_config=tower | {"vocab_size": 99, "max_position_embeddings": 8},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    whole = transformers.CLIPModel(config).eval()
    whole.save_pretrained(tmp_path / "clip")
    backbone = load_backbone(str(tmp_path / "clip"))
    got = compute(backbone, batch(2, 32), "proj.token", "proj.pool", "proj.cls", "norm.token")
    with torch.no_grad():
        vision = whole.vision_model(pixel_values=batch(2, 32))
        embedding = whole.visual_projection(vision.pooler_output)
        normed = whole.vision_model.post_layernorm(vision.last_hidden_state)
    assert torch.allclose(got["proj.pool"], embedding, atol=1e-6)
    assert torch.allclose(got["proj.cls"], embedding, atol=1e-6)
    assert torch.allclose(got["norm.token"], normed, atol=1e-6)
    assert got["proj.token"].shape == (2, 17, 24)
