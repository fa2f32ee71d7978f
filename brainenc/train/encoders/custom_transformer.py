"""``custom_transformer``: attention whose values are the features themselves, split over 16 heads."""

from __future__ import annotations

from torch import Tensor, nn

from brainenc.train.cross_attention import Projection, attend, attention_weights
from brainenc.train.dropout import dropout
from brainenc.train.encoders.base import EncoderConfig
from brainenc.train.encoders.transformer import Decoder, FeedForward, TransformerEncoder, apply_linear

N_HEADS = 16
"""The published code fixes it, whatever its arguments say."""


class FeatureAttention(nn.Module):
    """Cross-attention with projected queries and keys, and the map itself as values."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.k_proj, self.q_proj, self.c_proj = (nn.Linear(hidden, hidden) for _ in range(3))

    def forward(self, query: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Query (B or 1, Q, D), memory (B, N, D), position (N, D) -> (B, Q, D)."""
        out = attend(
            self.q_proj(query), memory, position, keys=self._keys(), values=None,
            n_heads=N_HEADS, dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return apply_linear(self.c_proj, out)

    def weights(self, query: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """(B, Q, N), averaged over heads."""
        return attention_weights(self.q_proj(query), memory, position, keys=self._keys(), n_heads=N_HEADS)

    def _keys(self) -> Projection:
        return Projection(self.k_proj.weight, self.k_proj.bias)


class CustomLayer(FeedForward):
    """What attention finds replaces the target; the feed-forward network adds to it."""

    def __init__(self, config: EncoderConfig, hidden: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.cross_attn = FeatureAttention(hidden, config.dropout)
        self.linear1 = nn.Linear(hidden, config.feedforward)
        self.linear2 = nn.Linear(config.feedforward, hidden)
        self.norm3 = nn.LayerNorm(hidden)

    def forward(self, target: Tensor, query_embed: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Target (B or 1, Q, D), query embedding (Q, D) -> the next target (B, Q, D)."""
        found = self.cross_attn(target + query_embed, memory, position)
        target = dropout(found, self.dropout, self.training)
        return target + self._feed(self.norm3(target))

    def weights(self, target: Tensor, query_embed: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """(B, Q, N)."""
        return self.cross_attn.weights(target + query_embed, memory, position)


class CustomTransformerEncoder(TransformerEncoder):
    """The published custom transformer (see `brainenc.train.encoders.base` for the arguments)."""

    def _n_heads(self) -> int:
        return N_HEADS

    def _make_decoder(self) -> Decoder:
        layers: list[nn.Module] = [CustomLayer(self.config, self.hidden) for _ in range(self.config.n_decoder_layers)]
        return Decoder(layers, None)
