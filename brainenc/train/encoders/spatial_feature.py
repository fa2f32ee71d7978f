"""``spatial_feature``: each query has one learned map, the same for every image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brainenc.datasets.rois import RoiQueries
from brainenc.errors import UsageError
from brainenc.train.encoders.base import EncoderConfig, QueryEncoder


class SpatialFeatureEncoder(QueryEncoder):
    """A softmax over the grid for each query; its token is the map's mean under it.

    See `brainenc.train.encoders.base` for the arguments.
    """

    def __init__(self, config: EncoderConfig, queries: RoiQueries, *, channels: int, grid: tuple[int, int]) -> None:
        super().__init__(config, queries, channels=channels, grid=grid)
        if self.hidden != channels:
            self.input_proj = nn.Conv2d(channels, self.hidden, kernel_size=1)
        self.spatial_embed = nn.Embedding(sum(self.n_queries), grid[0] * grid[1])
        self._add_readouts()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        self._check(features)
        memory = self._tokens(features)
        return self._read_out(self.spatial_embed.weight, lambda maps: torch.matmul(maps.softmax(dim=-1), memory))

    def attention_of(self, features: Tensor, rows: slice) -> Tensor:
        self._check(features)
        return self.spatial_embed.weight[rows].softmax(dim=-1).expand(len(features), -1, -1)

    def _check(self, features: Tensor) -> None:
        super()._check(features)
        if tuple(features.shape[2:]) != self.grid:
            raise UsageError(
                f"The spatial_feature encoder has maps of {self.grid[0]} x {self.grid[1]} tokens, found features of "
                f"{features.shape[2]} x {features.shape[3]}. Use features of the grid that it was trained on."
            )
