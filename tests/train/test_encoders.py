"""Encoders beside the published cases: every combination, every form of the same function, and what is refused."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from brainenc.datasets.rois import READOUTS, ROI_CLASSES, RoiAtlas
from brainenc.errors import UnknownName, UsageError
from brainenc.train import EncoderConfig, build_encoder, cross_attention
from brainenc.train.absorbed import AbsorbedAttention
from brainenc.train.cross_attention import Projection
from brainenc.train.dropout import dropout
from brainenc.train.encoders.base import ENCODERS
from brainenc.train.encoders.linear import READOUTS as LINEAR_READOUTS
from brainenc.train.position import sine_position
from brainenc.train.products import linear

GRID, CHANNELS = (5, 4), 32


@pytest.fixture(scope="module")
def atlas() -> RoiAtlas:
    """ROIs that overlap, one that is empty, and vertices in none."""
    rng = np.random.default_rng(0)
    labels = {
        h: {c: rng.integers(0, len(names), size) for c, names in ROI_CLASSES.items()}
        for h, size in (("lh", 60), ("rh", 45))
    }
    return RoiAtlas(labels)


def build(atlas, encoder="transformer", readout="rois_all", *, seed=0, channels=CHANNELS, **settings):
    torch.manual_seed(seed)
    settings = {"dropout": 0.0, "feedforward": 24, "n_heads": 4} | settings
    config = EncoderConfig(encoder=encoder, readout=readout, **settings)
    return build_encoder(config, atlas.queries(readout), channels=channels, grid=GRID)


def images(n=3, channels=CHANNELS):
    return torch.randn(n, channels, *GRID, generator=torch.Generator().manual_seed(1))


COMBINATIONS = [
    (e, r) for e, r in itertools.product(ENCODERS, READOUTS) if e != "linear" or r in LINEAR_READOUTS
]  # fmt: skip


@pytest.mark.parametrize(("encoder", "readout"), COMBINATIONS)
def test_every_combination_learns(encoder, readout, atlas):
    """Twenty steps on one batch bring the loss down, and predictions have a place for every vertex."""
    model, x = build(atlas, encoder, readout), images()
    targets = torch.randn(3, 60), torch.randn(3, 45)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        lh, rh = model(x)
        loss = model.loss(lh, rh, *targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert lh.shape == (3, 60)
    assert rh.shape == (3, 45)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("readout", ["voxels", "streams"])
def test_linear_refuses_readouts_that_are_about_queries(readout, atlas):
    """The message says which readouts there are for an encoder without queries."""
    with pytest.raises(UsageError, match=r"no queries.*hemis, rois_all"):
        build(atlas, "linear", readout)


def test_linear_has_no_attention(atlas):
    """Asking for it is an error, not an empty array."""
    with pytest.raises(UsageError, match="no attention"):
        build(atlas, "linear").attention(images())


@pytest.mark.parametrize("encoder", ["transformer", "custom_transformer", "spatial_feature", "linear"])
def test_families_predict_and_count_their_own_vertices(encoder, atlas):
    """Elsewhere predictions are 0, and what was measured there does not change the loss."""
    model, x = build(atlas, encoder, "faces"), images()
    inside = atlas.queries("faces").lh_scored
    lh, rh = model(x)
    target_lh, target_rh = torch.randn(3, 60), torch.randn(3, 45)
    loss = model.loss(lh, rh, target_lh, target_rh)

    assert not lh[:, ~inside].any()
    assert lh[:, inside].all()
    assert torch.equal(loss, model.loss(lh, rh, target_lh + 100 * torch.from_numpy(~inside), target_rh))
    expected = F.mse_loss(lh[:, inside], target_lh[:, inside])
    scored = atlas.queries("faces").rh_scored
    expected = expected + F.mse_loss(rh[:, scored], target_rh[:, scored]) + model.penalty()
    torch.testing.assert_close(loss, expected)


def test_a_family_without_vertices_in_a_hemisphere_is_no_nan():
    """Some subjects lack a whole class on one side: the other side is trained."""
    labels = {h: {c: np.zeros(9, dtype=int) for c in ROI_CLASSES} for h in ("lh", "rh")}
    labels["lh"]["floc-words"][:4] = 1
    model = build(RoiAtlas(labels), readout="words")

    loss = model.loss(*model(images()), torch.randn(3, 9), torch.randn(3, 9))
    loss.backward()

    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_unknown_encoders_are_refused_with_those_that_are(atlas):
    """The message lists the names."""
    with pytest.raises(UnknownName, match="transformer, custom_transformer, spatial_feature, linear"):
        build(atlas, "perceiver")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_heads": 5}, "5 heads do not divide"),
        ({"encoder": "custom_transformer", "hidden": 24}, "16 heads do not divide"),
        ({"hidden": 22, "n_heads": 1}, "multiple of 4"),
        ({"dropout": 1.0}, "dropout"),
        ({"n_decoder_layers": 0}, "n_decoder_layers"),
    ],
)
def test_impossible_settings_are_refused(settings, words, atlas):
    """Before anything is trained, with the numbers."""
    with pytest.raises(UsageError, match=words):
        build(atlas, **settings)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_features_of_another_width_are_refused(encoder, atlas):
    """The message has both shapes."""
    with pytest.raises(UsageError, match="32, H, W"):
        build(atlas, encoder)(images(channels=16))


@pytest.mark.parametrize("encoder", ["spatial_feature", "linear"])
def test_features_of_another_grid_are_refused(encoder, atlas):
    """Encoders with parameters per position have one grid."""
    with pytest.raises(UsageError, match=r"5 x 4.*6 x 4"):
        build(atlas, encoder)(torch.randn(1, CHANNELS, 6, 4))


def test_queries_of_another_readout_are_refused(atlas):
    """Configuration and queries must agree."""
    with pytest.raises(UsageError, match="streams"):
        build_encoder(EncoderConfig(readout="streams"), atlas.queries("hemis"), channels=32, grid=GRID)


@pytest.mark.parametrize("encoder", ["transformer", "custom_transformer", "spatial_feature"])
@pytest.mark.parametrize("readout", ["rois_all", "hemis", "voxels"])
def test_attention_is_a_distribution_over_the_grid(encoder, readout, atlas):
    """One row per query, summing to 1; it changes nothing in the model."""
    model = build(atlas, encoder, readout)

    attention = model.attention(images())

    assert attention.shape == (3, sum(model.n_queries), 20)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(3, sum(model.n_queries)))
    assert not attention.requires_grad


@pytest.mark.parametrize("encoder", ["transformer", "custom_transformer", "spatial_feature"])
def test_another_hidden_width_is_projected(encoder, atlas):
    """Features of any width go through a learned 1 x 1 projection, which learns."""
    model = build(atlas, encoder, hidden=16)

    model.loss(*model(images()), torch.randn(3, 60), torch.randn(3, 45)).backward()

    assert model.input_proj.weight.shape == (16, 32, 1, 1)
    assert model.input_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_memory_layout_of_features_does_not_matter(encoder, channels_last, atlas):
    """Tokens from a store lie together, maps from a network may not: predictions are the same."""
    model, x = build(atlas, encoder), images()
    other = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if channels_last else x.contiguous()

    for a, b in zip(model(x), model(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# -- the same function in another form ---------------------------------------------------------------------------


class Reference(nn.Module):
    """The published decoder from its description, with PyTorch's own attention."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.prenorm = model, model.config.prenorm
        self.attentions = nn.ModuleList()
        for layer in model.decoder.layers:
            attention = nn.MultiheadAttention(model.hidden, model.config.n_heads, batch_first=True)
            attention.load_state_dict(layer.multihead_attn.state_dict())
            self.attentions.append(attention)

    def forward(self, features):
        memory = features.flatten(2).transpose(1, 2)
        position = sine_position(self.model.hidden, GRID)
        embed = self.model.query_embed.weight.expand(len(features), -1, -1)
        target, weights = torch.zeros_like(embed), None
        for layer, attention in zip(self.model.decoder.layers, self.attentions, strict=True):
            normed = layer.norm1(target)
            found, weights = attention(normed + embed, memory + position, memory)
            if self.prenorm:
                target = target + found
                target = target + layer.linear2(layer.linear1(layer.norm3(target)).relu())
            else:
                target = layer.norm2(normed + found)
                target = layer.norm3(target + layer.linear2(layer.linear1(target).relu()))
        return self.model.decoder.norm(target), weights


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("n_decoder_layers", [1, 2])
@pytest.mark.parametrize("readout", ["hemis", "rois_all"])
def test_layers_follow_the_description(prenorm, n_decoder_layers, readout, atlas):
    """Tokens, attention and gradients of one and several layers, norm first or last, projected keys or moved ones."""
    model = build(atlas, readout=readout, prenorm=prenorm, n_decoder_layers=n_decoder_layers)
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
    x, reference = images(), Reference(model)

    expected, weights = reference(x)
    tokens = model.decoder(model.query_embed.weight, *model._memory(x))

    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.attention(x), weights, rtol=1e-4, atol=1e-6)
    (expected**2).sum().backward()
    wanted = model.query_embed.weight.grad.clone()
    model.zero_grad()
    (tokens**2).sum().backward()
    torch.testing.assert_close(model.query_embed.weight.grad, wanted, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(model.decoder.layers, reference.attentions, strict=True):
        found = ours.multihead_attn.in_proj_weight.grad
        torch.testing.assert_close(found, theirs.in_proj_weight.grad, rtol=1e-3, atol=1e-4)


def random_attention(n_batch, *, split=False, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    n_queries, n_heads, hidden, n_tokens = 3, 2, 8, 6

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()

    query, memory = draw(n_batch, n_queries, hidden), draw(2, n_tokens, hidden)
    keys = Projection(draw(hidden, hidden), draw(hidden))
    values = None if split else Projection(draw(hidden, hidden), draw(hidden))
    return query, memory, draw(n_tokens, hidden).detach(), keys, values, n_heads


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("n_batch", [1, 2])
def test_both_forms_of_attention_are_one_function(split, n_batch, monkeypatch):
    """Projecting keys and values, or moving the projections to the queries, by formulas or image by image."""
    query, memory, position, keys, values, n_heads = random_attention(n_batch, split=split)

    def attend():
        out = cross_attention.attend(query, memory, position, keys=keys, values=values, n_heads=n_heads, dropout=0.0)
        leaves = [query, memory, keys.weight] + ([] if values is None else [values.weight, values.bias])
        return out, torch.autograd.grad((out**3).sum(), leaves)

    monkeypatch.setattr(cross_attention, "absorb_is_cheaper", lambda *_: False)
    projected, d_projected = attend()
    monkeypatch.setattr(cross_attention, "absorb_is_cheaper", lambda *_: True)
    by_image, d_by_image = attend()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    by_formula, d_by_formula = attend()

    for other, d_other in ((by_image, d_by_image), (by_formula, d_by_formula)):
        torch.testing.assert_close(other, projected, rtol=1e-6, atol=1e-6)
        for a, b in zip(d_other, d_projected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("n_batch", [1, 2])
def test_gradients_of_attention_image_by_image_are_right(p, split, n_batch):
    """Against finite differences, with the same dropout each time."""
    _, memory, position, _, values, n_heads = random_attention(n_batch, split=split)
    moved = torch.randn(n_batch, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    weight = None if values is None else values.weight.view(n_heads, 4, 8)
    bias = None if values is None else values.bias.view(n_heads, 4)

    def attend(moved, memory, *parameters):
        torch.manual_seed(11)
        weight, bias = parameters or (None, None)
        return AbsorbedAttention.apply(moved, memory, position, weight, bias, n_heads, p, torch.float64)

    inputs = [moved, memory] + ([] if weight is None else [weight, bias])
    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("split", [True, False])
def test_dropout_of_attention_keeps_the_mean(split):
    """Over many draws, outputs average to those without dropout, biases of the values included."""
    _, memory, position, _, values, n_heads = random_attention(1, split=split)
    moved = torch.randn(1, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    parameters = (None, None) if values is None else (values.weight.view(n_heads, 4, 8), values.bias.view(n_heads, 4))

    def attend(n, p):
        many = memory[:1].detach().expand(n, -1, -1)
        with torch.no_grad():
            return AbsorbedAttention.apply(moved, many, position, *parameters, n_heads, p, torch.float64)

    torch.manual_seed(0)
    draws = attend(3000, 0.4)

    spread = draws.std(dim=0) / 3000**0.5
    assert ((draws.mean(dim=0) - attend(1, 0.0)[0]).abs() < 5 * spread).all()


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(fraction):
    """A seed determines it; what is dropped is zero, in expectation nothing changes."""
    x = torch.ones(200_000, requires_grad=True)

    torch.manual_seed(4)
    once = dropout(x, fraction)
    torch.manual_seed(4)
    again = dropout(x, fraction)
    once.sum().backward()

    assert torch.equal(once, again)
    assert abs((once == 0).double().mean().item() - fraction) < 0.01
    assert abs(once.mean().item() - 1) < 0.02
    assert torch.equal(x.grad, once)
    assert torch.equal(dropout(x, fraction, training=False), x)


def test_dropout_is_a_function_of_the_seed_and_off_in_evaluation(atlas):
    """The same seed gives the same predictions in training; none is needed in evaluation."""
    model, x = build(atlas, dropout=0.3), images()
    torch.manual_seed(1)
    first, _ = model(x)
    torch.manual_seed(1)
    second, _ = model(x)
    third, _ = model(x)
    model.eval()

    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(model(x)[0], model(x)[0])


def test_linear_products_are_linear():
    """Value and gradients of the fast product are those of the ordinary one."""
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((2, 5, 7), (3, 7), (3,)))

    fast = torch.autograd.grad((linear(x, w, b) ** 2).sum(), (x, w, b))
    plain = torch.autograd.grad((F.linear(x, w, b) ** 2).sum(), (x, w, b))

    for a, c in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoder", ["transformer", "custom_transformer", "spatial_feature", "linear"])
def test_autocast_is_close_to_float32(encoder, atlas):
    """bfloat16 rounds, and that is all: predictions come in float32 and gradients reach every parameter in use."""
    model, x = build(atlas, encoder, "hemis", n_heads=2), images()
    exact, _ = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, other = model(x)
    (rounded.sum() + other.sum()).backward()

    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.03 * exact.abs().max()
    used = {n: p for n, p in model.named_parameters() if "norm2" not in n and "k_proj.bias" not in n}
    assert [n for n, p in used.items() if p.grad is None or not torch.isfinite(p.grad).all()] == []


def test_a_query_per_vertex_is_computed_in_pieces(atlas, monkeypatch):
    """Pieces and one go agree in predictions and gradients."""
    model, x = build(atlas, readout="voxels"), images()

    def gradient():
        model.zero_grad()
        lh, rh = model(x)
        model.loss(lh, rh, torch.zeros(3, 60), torch.zeros(3, 45)).backward()
        return lh, rh, model.query_embed.weight.grad.clone(), model.lh_embed[0].weight.grad.clone()

    whole = gradient()
    monkeypatch.setattr("brainenc.train.encoders.base.PIECE", 7)
    for a, b in zip(gradient(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_pieces_repeat_their_dropout_in_the_backward_pass(atlas, monkeypatch):
    """What is computed again for the gradient is what was computed: finite differences agree with dropout on."""
    monkeypatch.setattr("brainenc.train.encoders.base.PIECE", 16)
    model, x = build(atlas, readout="voxels", dropout=0.3), images(1)
    bias = model.transformer["decoder"].norm.bias

    def value():
        torch.manual_seed(2)
        return model(x)[0].double().sum()

    value().backward()
    slope = bias.grad[0].item()
    with torch.no_grad():
        bias[0] += 1e-2
        above = value().item()
        bias[0] -= 2e-2
        below = value().item()

    assert abs((above - below) / 2e-2 - slope) < 1e-2 * max(abs(slope), 1)


@pytest.mark.chaos
def test_compiled_models_learn_the_same(atlas):
    """``torch.compile`` takes the formulas instead of the loops, forward and backward."""
    model, x = build(atlas), images()

    def loss(features):
        return model.loss(*model(features), torch.zeros(3, 60), torch.zeros(3, 45))

    plain = loss(x)
    plain.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(loss, backend="aot_eager")(x)  # traces as every back end does, without a C++ compiler
    compiled.backward()

    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5)


def test_predictions_of_a_batch_are_those_of_its_parts(atlas):
    """No statistic crosses samples: micro-batches give what the batch gives."""
    for encoder in ENCODERS:
        model, x = build(atlas, encoder), images(4)
        parts = torch.cat([model(x[:1])[0], model(x[1:])[0]])
        torch.testing.assert_close(parts, model(x)[0], rtol=1e-5, atol=1e-5)
