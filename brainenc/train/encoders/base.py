"""What all encoders share: features in, two hemispheres of vertices out, and the loss.

Axis letters, here and in the encoders: B batch, D hidden width, H W grid, N = H * W tokens, Q queries of both
hemispheres (left first), V vertices, h heads, d = D / h.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from brainenc.datasets.rois import HEMISPHERES, RoiQueries
from brainenc.errors import UnknownName, UsageError
from brainenc.train.readout import QueryReadout, build_readout, read_own_rows

ENCODERS = ("transformer", "custom_transformer", "spatial_feature", "linear")
RIDGE = "ridge"
"""The baseline: solved, not trained."""
PIECE = 1024
"""Queries at a time where every vertex has one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """The shape of an encoder; the defaults are the published ones."""

    encoder: str = "transformer"
    """One of `ENCODERS`, or ``ridge``, which is solved and not trained."""
    readout: str = "rois_all"
    """One of ``brainenc.datasets.rois.READOUTS``."""
    hidden: int | None = None
    """Width of tokens and queries; None: that of the features. Another width adds a learned 1 x 1 projection."""
    n_heads: int = 16
    """Attention heads. ``custom_transformer`` has 16 whatever this says."""
    n_decoder_layers: int = 1
    feedforward: int = 1024
    """Width inside the feed-forward network."""
    dropout: float = 0.1
    prenorm: bool = True
    """Whether layer norms come before attention and feed-forward (else after)."""
    temperature: float = 10000.0
    """Longest wavelength of the sine position, in 2 pi."""

    def __post_init__(self) -> None:
        if self.encoder not in (*ENCODERS, RIDGE):
            raise UnknownName("encoder", self.encoder, (*ENCODERS, RIDGE))
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, found {self.dropout}.")
        for name in ("n_heads", "n_decoder_layers", "feedforward"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}.")


class BrainEncoder(nn.Module, ABC):
    """Predicts the responses of all vertices from a feature map.

    The names in its state dict are the published ones, and so is the order of vertices and queries in it.

    Args:
        config: the shape of the encoder.
        queries: which vertices each query answers for.
        channels: width of the features.
        grid: (H, W) of the features.
    """

    def __init__(self, config: EncoderConfig, queries: RoiQueries, *, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.queries, self.channels, self.grid = config, queries, channels, grid
        self.hidden = config.hidden or channels
        for hemisphere in HEMISPHERES:
            self.register_buffer(f"_{hemisphere}_scored", _scored_indices(queries, hemisphere), persistent=False)

    @abstractmethod
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predict.

        Args:
            features: array of shape (B, channels, H, W). Cheapest when tokens lie together in memory (channels last).

        Returns:
            arrays of shapes (B, V_lh) and (B, V_rh), vertices in challenge order; 0 where no query answers.
        """

    @abstractmethod
    def attention(self, features: Tensor) -> Tensor:
        """Where each query looks: array of shape (B, Q, H * W), each row summing to 1.

        The last decoder layer's cross-attention averaged over heads, without dropout. No gradient.

        Raises:
            UsageError: this encoder has no queries.
        """

    def loss(self, lh: Tensor, rh: Tensor, lh_target: Tensor, rh_target: Tensor) -> Tensor:
        """Mean squared error of each hemisphere over its scored vertices, added. A scalar, float32."""
        sides = (("lh", lh, lh_target), ("rh", rh, rh_target))
        return sum((self._error(h, p, t) for h, p, t in sides), start=self.penalty())

    def penalty(self) -> Tensor:
        """What the loss adds for the parameters themselves: nothing but for ``linear``."""
        parameter = next(self.parameters())
        return parameter.new_zeros(())

    def _error(self, hemisphere: str, predicted: Tensor, target: Tensor) -> Tensor:
        scored: Tensor | None = getattr(self, f"_{hemisphere}_scored")
        if scored is not None:
            predicted, target = predicted[:, scored], target[:, scored]
        if predicted.shape[1] == 0:  # a family without a vertex in this hemisphere says nothing
            return predicted.sum() * 0
        return F.mse_loss(predicted.float(), target.float())

    def _check(self, features: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] != self.channels:
            raise UsageError(
                f"The {self.config.encoder} encoder takes features of shape (batch, {self.channels}, H, W), "
                f"found {tuple(features.shape)}. Was it built for another backbone or another number of features?"
            )


class QueryEncoder(BrainEncoder):
    """An encoder whose queries each gather one token from the map, from which vertices are read out."""

    input_proj: nn.Conv2d
    lh_embed: nn.Sequential
    rh_embed: nn.Sequential

    def _add_readouts(self) -> None:
        for hemisphere in HEMISPHERES:
            readout = build_readout(self.queries, hemisphere, self.hidden)
            self.add_module(f"{hemisphere}_embed", nn.Sequential(readout))

    @property
    def n_queries(self) -> tuple[int, int]:
        """Queries of the left and of the right hemisphere."""
        return self.queries.n_queries("lh"), self.queries.n_queries("rh")

    def _tokens(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), through ``input_proj`` where the widths differ."""
        if self.hidden != self.channels:
            features = self.input_proj(features)
        return features.flatten(2).transpose(1, 2)

    def _read_out(self, embed: Tensor, tokens_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Predict from query tokens.

        Args:
            embed: what each query has learned, array of shape (Q, any).
            tokens_of: tokens (B, n, D) of n rows of ``embed``. Called piece by piece where there is a query per
                vertex, and once more in the backward pass, so that one piece at a time is in memory.
        """
        n_lh, n_rh = self.n_queries
        lh, rh = embed[:n_lh], embed[n_lh : n_lh + n_rh]
        if self.queries.per_vertex:
            return self._by_pieces(lh, tokens_of, "lh"), self._by_pieces(rh, tokens_of, "rh")
        tokens = tokens_of(embed)
        return self.lh_embed(tokens[:, :n_lh]), self.rh_embed(tokens[:, n_lh:])

    def _by_pieces(self, embed: Tensor, tokens_of: Callable[[Tensor], Tensor], hemisphere: str) -> Tensor:
        readout = self.readout(hemisphere)

        def piece(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return read_own_rows(tokens_of(rows), weight, bias)

        # Split once: the gradient of a slice would be as large as the whole, for every piece.
        pieces = zip(*(torch.split(x, PIECE) for x in (embed, readout.weight, readout.bias)), strict=True)
        return torch.cat([checkpoint(piece, *rows, use_reentrant=False) for rows in pieces], dim=1)

    @abstractmethod
    def attention_of(self, features: Tensor, rows: slice) -> Tensor:
        """`attention` of a range of queries: (B, n, H * W)."""

    @torch.no_grad()
    def attention(self, features: Tensor) -> Tensor:
        pieces = [piece for _, _, piece in self.attention_pieces(features, 0, sum(self.n_queries))]
        return torch.cat(pieces, dim=1)

    @torch.no_grad()
    def attention_pieces(self, features: Tensor, first: int, last: int) -> Iterator[tuple[int, int, Tensor]]:
        """Attention of some queries piece by piece: first and last query of a piece, (B, n, H * W)."""
        step = PIECE if self.queries.per_vertex else max(1, last - first)
        for start in range(first, last, step):
            stop = min(start + step, last)
            yield start, stop, self.attention_of(features, slice(start, stop))

    def readout(self, hemisphere: str) -> QueryReadout:
        """The module that reads one hemisphere out."""
        readout = getattr(self, f"{hemisphere}_embed")[0]
        assert isinstance(readout, QueryReadout)
        return readout


def _scored_indices(queries: RoiQueries, hemisphere: str) -> Tensor | None:
    scored = torch.from_numpy(queries.scored("lh" if hemisphere == "lh" else "rh"))
    return None if bool(scored.all()) else scored.nonzero().squeeze(1)
