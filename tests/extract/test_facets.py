"""q, k and v are what each family's attention really uses; tokens, registers and pools are in their places."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from brainenc.extract import facets
from brainenc.extract.backbone import load_backbone, parse_features
from brainenc.extract.miniature import backbone_string, save_miniature
from tests.extract.reference import attend, attention_of, project, record

FAMILIES = {
    # kind: sizes, whether q, k, v are the projections' own output (False: normed or rotated before they meet)
    "dinov2": ({}, True),
    "dinov2_registers": ({}, True),
    "dinov3": ({}, False),
    "vit": ({}, True),
    "deit": ({}, True),
    "mae": ({}, True),
    "ijepa": ({}, True),
    "beit": ({}, False),  # its key has no bias
    "data2vec": ({}, False),
    "siglip": ({}, True),
    "clip_vision": ({}, True),
    "open_clip": ({}, True),
    "open_clip qk_norm": ({"block_type": "custom", "qk_norm": True}, False),
    "timm test_vit": ({}, True),
    "timm test_vit2": ({}, True),  # a register and no class token
    "timm eva02_tiny_patch14_224": ({}, False),
}
SMALL = list(FAMILIES)


@pytest.fixture(scope="module", params=SMALL)
def family(request, tmp_path_factory):
    """A seeded model of each family, loaded through the library's own loading code; and whether it projects plainly."""
    torch.set_num_threads(1)
    sizes, plain = FAMILIES[request.param]
    kind, _, detail = request.param.partition(" ")
    if kind == "timm":
        sizes = sizes | {"model": detail}
    saved = save_miniature(kind, tmp_path_factory.mktemp("family") / kind, seed=3, **sizes)
    return load_backbone(backbone_string(kind, saved)), plain


def batch_for(backbone, n=2):
    torch.manual_seed(1)
    return torch.randn(n, 3, *backbone.input_shape((70, 98)))


def close(a, b, tolerance=2e-5):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def test_attention_from_q_k_v_is_the_blocks_own(family):
    """softmax(q k^T / sqrt(d)) v through the block's own output projection equals the block's attention output."""
    backbone, _ = family
    model, batch = backbone.network.model, batch_for(family[0])
    for number in (0, backbone.info.n_layers - 1):
        name, projection, bias = attention_of(model, backbone.info.blocks[number])
        seen = record(model, [name, *([bias] if bias else [])], lambda: backbone.network.run(batch))
        asked = parse_features([f"{number}.{x}" for x in "qkv"], backbone.info)
        q, k, v = backbone.forward(batch, asked).values()
        output = projection(attend(q, k, v, heads(model, name), seen[bias].gave if bias else None))
        assert close(output, seen[name].gave), number


def heads(model, attention_name):
    module = model.get_submodule(attention_name)
    for part in (module, *module.children()):
        for name in ("num_heads", "num_attention_heads"):
            if isinstance(getattr(part, name, None), int):
                return getattr(part, name)
    raise AssertionError("no head count")


def test_q_k_v_are_what_the_weights_make(family):
    """Where nothing stands between projection and attention, q, k, v equal the projections, heads concatenated."""
    backbone, plain = family
    if not plain:
        return
    model, batch = backbone.network.model, batch_for(backbone)
    name, _, _ = attention_of(model, backbone.info.blocks[1])
    seen = record(model, [name], lambda: backbone.network.run(batch))
    wanted = project(model.get_submodule(name), seen[name].given)
    got = backbone.forward(batch, parse_features(["1.q", "1.k", "1.v"], backbone.info))
    for one, other in zip(got.values(), wanted, strict=True):
        assert close(one, other)


def test_tokens_are_the_blocks_output_and_norm_the_models(family):
    """N.token is block N's output; norm.token is the final norm of the last block's output, on every token."""
    backbone, _ = family
    network, batch = backbone.network, batch_for(backbone)
    last = backbone.info.blocks[-1]
    seen = record(network.model, [last, backbone.info.blocks[0]], lambda: network.run(batch))
    assert close(one(backbone, batch, "0.token"), seen[backbone.info.blocks[0]].gave, 1e-6)
    assert close(one(backbone, batch, "-1.token"), seen[last].gave, 2e-6)
    if network.norm is not None:
        normed = network.model.get_submodule(network.norm)(seen[last].gave)
        assert close(one(backbone, batch, "norm.token"), normed)


def test_class_token_registers_and_pool_are_parts_of_the_tokens(family):
    """cls is the first row, registers follow, pool is the mean of the patches; q_cls is q's first row."""
    backbone, _ = family
    info, batch = backbone.info, batch_for(backbone)
    offered = info.layer_facets["1"]
    got = {f.facet: x for f, x in backbone.forward(batch, parse_features([f"1.{f}" for f in offered], info)).items()}
    assert torch.equal(got["pool"], got["token"][:, info.n_prefix :].mean(dim=1))
    n_cls = info.n_prefix - info.n_registers
    assert ("cls" in offered) == (n_cls > 0)
    if "cls" in offered:
        assert torch.equal(got["cls"], got["token"][:, 0])
        assert torch.equal(got["q_cls"], got["q"][:, 0])
    assert ("registers" in offered) == (info.n_registers > 0)
    if "registers" in offered:
        assert torch.equal(got["registers"], got["token"][:, n_cls : info.n_prefix])


def test_row_shapes_are_known_before_anything_runs(family):
    """row_shape and details agree with what forward returns, for every feature of two layers and the stations."""
    backbone, _ = family
    info, size = backbone.info, (70, 98)
    layers = ["0", "-1", *info.stations]
    texts = [f"{x}.{f}" for x in layers for f in info.layer_facets[x if x in info.stations else "0"]]
    features = parse_features(texts, info)
    rows, columns = info.grid(backbone.input_shape(size))
    for feature, result in backbone.forward(batch_for(backbone), features).items():
        assert backbone.row_shape(feature, size) == tuple(result.shape[1:]), feature
        details = backbone.details(feature, size)
        whole = feature.facet in ("token", "q", "k", "v")
        assert details == ({"n_prefix": info.n_prefix, "grid": [rows, columns]} if whole else
                           {"n_prefix": 0, "grid": None}), feature  # fmt: skip


def one(backbone, batch, text):
    (result,) = backbone.forward(batch, parse_features([text], backbone.info)).values()
    return result


def test_numbers_do_not_depend_on_what_else_is_asked(family):
    """A feature alone, and among many, is the same to the bit: a layer added later agrees with the first."""
    backbone, _ = family
    inputs = batch_for(backbone)
    many = backbone.forward(inputs, parse_features(["*.token", "*.q", "*.v"], backbone.info))
    for feature in parse_features(["0.q", "-1.v", "-1.token"], backbone.info):
        assert torch.equal(backbone.forward(inputs, [feature])[feature], many[feature])


def test_the_attention_kernel_is_untouched_when_nobody_watches(family):
    """Outside a forward pass that asks for q, k or v, PyTorch's own kernel is in place, and no hook is left."""
    backbone, _ = family
    before = F.scaled_dot_product_attention
    backbone.forward(batch_for(backbone), parse_features(["0.q", "1.token"], backbone.info))
    assert F.scaled_dot_product_attention is before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.network.model.modules())


def test_attention_without_a_kernel_to_watch_offers_no_q(tmp_path):
    """XCiT attends between channels: it has no q and k of which softmax(q k^T / sqrt(d)) v holds, and offers none."""
    saved = save_miniature("timm", tmp_path / "channels", model="xcit_nano_12_p16_224")
    info = load_backbone(backbone_string("timm", saved)).info
    assert "token" in info.layer_facets["0"]
    assert "q" not in info.layer_facets["0"]


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_maps_become_rows_line_by_line(n, height, width, channels):
    """(B, C, H, W) -> (B, H*W, C), row h*W + w holding position (h, w)."""
    maps = torch.arange(n * channels * height * width, dtype=torch.float32).view(n, channels, height, width)
    rows = facets.as_rows(maps, aspect=height / width)
    if not facets.channels_last(tuple(maps.shape), height / width):
        assert rows.shape == (n, height * width, channels)
        assert torch.equal(rows[0, (height - 1) * width], maps[0, :, height - 1, 0])


def test_channels_last_maps_are_told_by_their_aspect():
    """Both layouts of a 6 x 9 map of 4 channels give the same rows."""
    maps = torch.randn(2, 4, 6, 9)
    assert torch.equal(facets.as_rows(maps, 6 / 9), facets.as_rows(maps.permute(0, 2, 3, 1), 6 / 9))


def test_keeping_is_a_view_unless_it_would_hold_more():
    """A token map stays a view; one token of many, another dtype, or a module written into later, is copied."""
    whole = torch.randn(2, 50, 8)
    assert facets.keep(whole, None).data_ptr() == whole.data_ptr()
    assert facets.keep(whole[:, 0], None).untyped_storage().nbytes() == 2 * 8 * 4
    assert facets.keep(whole, None, own=True).data_ptr() != whole.data_ptr()
    half = facets.keep(whole, torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(half, whole.half())
    assert half.untyped_storage().nbytes() == 2 * 50 * 8 * 2
