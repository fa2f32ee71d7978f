"""``transformer``: learned queries attend to the map in decoder layers without self-attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainenc.datasets.rois import RoiQueries
from brainenc.errors import UsageError
from brainenc.train.cross_attention import Projection, attend, attention_weights
from brainenc.train.dropout import dropout
from brainenc.train.encoders.base import EncoderConfig, QueryEncoder
from brainenc.train.position import sine_position
from brainenc.train.products import linear


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)``, at the speed of `brainenc.train.products`."""
    return linear(x, layer.weight, layer.bias)


class CrossAttention(nn.Module):
    """Multi-head attention to a map, with the parameter names of ``nn.MultiheadAttention``."""

    def __init__(self, hidden: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden, hidden))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden))
        self.out_proj = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.out_proj.bias)

    def _parts(self) -> list[Projection]:
        return [Projection(*p) for p in zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)]

    def forward(self, query: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Query (B or 1, Q, D), memory (B, N, D), position (N, D) -> (B, Q, D)."""
        to_query, keys, values = self._parts()
        out = attend(
            linear(query, to_query.weight, to_query.bias), memory, position, keys=keys, values=values,
            n_heads=self.n_heads, dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return apply_linear(self.out_proj, out)

    def weights(self, query: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """(B, Q, N), averaged over heads."""
        to_query, keys, _ = self._parts()
        query = linear(query, to_query.weight, to_query.bias)
        return attention_weights(query, memory, position, keys=keys, n_heads=self.n_heads)


class FeedForward(nn.Module):
    """The second half of a decoder layer, mixed into it so that the published names hold."""

    linear1: nn.Linear
    linear2: nn.Linear
    dropout: float

    def _feed(self, x: Tensor) -> Tensor:
        inner = dropout(F.relu(apply_linear(self.linear1, x)), self.dropout, self.training)
        return dropout(apply_linear(self.linear2, inner), self.dropout, self.training)


class DecoderLayer(FeedForward):
    """Cross-attention and a feed-forward network, each with a residual and a layer norm before or after it."""

    def __init__(self, config: EncoderConfig, hidden: int) -> None:
        super().__init__()
        self.prenorm, self.dropout = config.prenorm, config.dropout
        self.multihead_attn = CrossAttention(hidden, config.n_heads, config.dropout)
        self.linear1 = nn.Linear(hidden, config.feedforward)
        self.linear2 = nn.Linear(config.feedforward, hidden)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(hidden) for _ in range(3))

    def query(self, target: Tensor, query_embed: Tensor) -> Tensor:
        """What attends: array of the shape of ``target``."""
        normed: Tensor = self.norm1(target)
        return normed + query_embed

    def forward(self, target: Tensor, query_embed: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Target (B or 1, Q, D), query embedding (Q, D) -> the next target (B, Q, D)."""
        found = self.multihead_attn(self.query(target, query_embed), memory, position)
        found = dropout(found, self.dropout, self.training)
        if self.prenorm:
            target = target + found
            return target + self._feed(self.norm3(target))
        target = self.norm2(self.norm1(target) + found)
        out: Tensor = self.norm3(target + self._feed(target))
        return out

    def weights(self, target: Tensor, query_embed: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """(B, Q, N)."""
        return self.multihead_attn.weights(self.query(target, query_embed), memory, position)


class Decoder(nn.Module):
    """Layers one after another, and a last norm where there is one."""

    def __init__(self, layers: list[nn.Module], norm: nn.LayerNorm | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, query_embed: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Query embedding (Q, D), memory (B, N, D) -> tokens (B, Q, D)."""
        target = self.last_target(query_embed, memory, position, upto=len(self.layers))
        return target if self.norm is None else self.norm(target)

    def last_target(self, query_embed: Tensor, memory: Tensor, position: Tensor, *, upto: int) -> Tensor:
        """The target after the first ``upto`` layers. It starts at zero, without a batch axis worth its name."""
        target = torch.zeros_like(query_embed)[None]
        for i in range(upto):
            target = self.layers[i](target, query_embed, memory, position)
        return target

    def weights(self, query_embed: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Attention of the last layer: (B, Q, N)."""
        target = self.last_target(query_embed, memory, position, upto=len(self.layers) - 1)
        last: Any = self.layers[-1]
        weights: Tensor = last.weights(target, query_embed, memory, position)
        return weights


class TransformerEncoder(QueryEncoder):
    """The published transformer encoder (see `brainenc.train.encoders.base` for the arguments). It takes any grid."""

    _position: Tensor

    def __init__(self, config: EncoderConfig, queries: RoiQueries, *, channels: int, grid: tuple[int, int]) -> None:
        super().__init__(config, queries, channels=channels, grid=grid)
        if self.hidden % self._n_heads():
            raise UsageError(
                f"{self._n_heads()} heads do not divide a hidden width of {self.hidden}. Choose --hidden a multiple of "
                f"the heads{'' if config.encoder == 'custom_transformer' else ', or other --n-heads'}."
            )
        position = sine_position(self.hidden, grid, config.temperature).clone()
        self.register_buffer("_position", position, persistent=False)
        if self.hidden != channels:
            self.input_proj = nn.Conv2d(channels, self.hidden, kernel_size=1)
        self.transformer = nn.ModuleDict({"decoder": self._make_decoder()})
        for parameter in self.transformer.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        self.query_embed = nn.Embedding(sum(self.n_queries), self.hidden)
        self._add_readouts()

    def _n_heads(self) -> int:
        return self.config.n_heads

    def _make_decoder(self) -> Decoder:
        layers: list[nn.Module] = [DecoderLayer(self.config, self.hidden) for _ in range(self.config.n_decoder_layers)]
        return Decoder(layers, nn.LayerNorm(self.hidden))

    @property
    def decoder(self) -> Decoder:
        """The decoder's layers."""
        decoder = self.transformer["decoder"]
        assert isinstance(decoder, Decoder)
        return decoder

    def _memory(self, features: Tensor) -> tuple[Tensor, Tensor]:
        self._check(features)
        h, w = features.shape[2:]
        if (h, w) == self.grid:
            return self._tokens(features), self._position
        return self._tokens(features), sine_position(self.hidden, (h, w), self.config.temperature).to(features.device)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        memory, position = self._memory(features)
        return self._read_out(self.query_embed.weight, lambda embed: self.decoder(embed, memory, position))

    def attention_of(self, features: Tensor, rows: slice) -> Tensor:
        memory, position = self._memory(features)
        return self.decoder.weights(self.query_embed.weight[rows], memory, position)
