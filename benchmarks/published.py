"""The published formulation of the transformer encoder, written from its description, as the reference of figures.

Every vertex is computed for every query of its hemisphere, masked, and summed over queries; with a query per vertex
(``voxels``) that is a B x V x V array of which the diagonal is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brainenc.datasets.rois import RoiQueries
from brainenc.train.position import sine_position


class PublishedEncoder(nn.Module):
    """One pre-norm decoder layer with ``nn.MultiheadAttention``, and the masked readout."""

    def __init__(
        self, queries: RoiQueries, *, hidden: int, n_heads: int = 16, feedforward: int = 1024, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.n_lh, self.n_rh = queries.n_queries("lh"), queries.n_queries("rh")
        self.query_embed = nn.Embedding(self.n_lh + self.n_rh, hidden)
        self.attention = nn.MultiheadAttention(hidden, n_heads, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(hidden, feedforward), nn.Linear(feedforward, hidden)
        self.norm1, self.norm3, self.norm = (nn.LayerNorm(hidden) for _ in range(3))
        self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(dropout) for _ in range(3))
        self.lh_embed = nn.Linear(hidden, queries.lh.shape[1])
        self.rh_embed = nn.Linear(hidden, queries.rh.shape[1])
        self.per_vertex = queries.per_vertex
        if not queries.per_vertex:
            self.register_buffer("lh_masks", torch.from_numpy(queries.lh).float())
            self.register_buffer("rh_masks", torch.from_numpy(queries.rh).float())

    def load_ours(self, state: dict[str, Tensor]) -> None:
        """Take the weights of our encoder's state dict, whose names are those of published checkpoints."""
        layer = "transformer.decoder.layers.0."
        named = {n.removeprefix(layer).replace("multihead_attn", "attention"): v for n, v in state.items()}
        named = {
            n.replace("transformer.decoder.norm", "norm").replace("embed.0.", "embed."): v for n, v in named.items()
        }
        self.load_state_dict({n: named.get(n, v) for n, v in self.state_dict().items()})

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D, H, W) -> (B, V_lh), (B, V_rh)."""
        memory = features.flatten(2).permute(2, 0, 1)
        position = sine_position(features.shape[1], tuple(features.shape[2:])).to(features.device)[:, None]
        embed = self.query_embed.weight[:, None].expand(-1, features.shape[0], -1)
        target = torch.zeros_like(embed)
        found, _weights = self.attention(query=self.norm1(target) + embed, key=memory + position, value=memory)
        target = target + self.dropout2(found)
        inner = self.linear2(self.dropout1(self.linear1(self.norm3(target)).relu()))
        tokens = self.norm(target + self.dropout3(inner)).transpose(0, 1)
        return self._vertices("lh", tokens[:, : self.n_lh]), self._vertices("rh", tokens[:, self.n_lh :])

    def _vertices(self, hemisphere: str, tokens: Tensor) -> Tensor:
        every: Tensor = getattr(self, f"{hemisphere}_embed")(tokens)
        if self.per_vertex:
            return torch.diagonal(every, dim1=-2, dim2=-1)
        return (every * getattr(self, f"{hemisphere}_masks")).sum(dim=1)
