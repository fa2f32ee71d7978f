"""``linear``: a strided convolution, flattened, and one linear map per hemisphere. It has no queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brainenc.datasets.rois import FAMILIES, HEMISPHERES, RoiQueries
from brainenc.errors import UsageError
from brainenc.train.encoders.base import BrainEncoder, EncoderConfig

N_CHANNELS = 256
PENALTY = 0.02
READOUTS = ("hemis", "rois_all", *FAMILIES)
"""Without queries ``hemis`` and ``rois_all`` are the same model; the families choose what it is trained on."""


class LinearEncoder(BrainEncoder):
    """The published linear encoder (see `brainenc.train.encoders.base` for the arguments)."""

    def __init__(self, config: EncoderConfig, queries: RoiQueries, *, channels: int, grid: tuple[int, int]) -> None:
        super().__init__(config, queries, channels=channels, grid=grid)
        if queries.readout not in READOUTS:
            raise UsageError(
                f"The linear encoder has no queries, so that the readout {queries.readout!r} would say nothing about "
                f"it. It goes with {', '.join(READOUTS)}."
            )
        self.input_proj = nn.Conv2d(channels, N_CHANNELS, kernel_size=3, stride=3, padding=1)
        n_features = N_CHANNELS * ((grid[0] + 2) // 3) * ((grid[1] + 2) // 3)
        for hemisphere in HEMISPHERES:
            n_vertices = queries.masks(hemisphere).shape[1]
            self.add_module(f"{hemisphere}_embed", nn.Sequential(nn.Linear(n_features, n_vertices)))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        self._check(features)
        flat = self.input_proj(features).flatten(1)
        lh, rh = (self._predict(hemisphere, flat) for hemisphere in HEMISPHERES)
        return lh, rh

    def _predict(self, hemisphere: str, flat: Tensor) -> Tensor:
        predicted: Tensor = getattr(self, f"{hemisphere}_embed")(flat).float()
        scored: Tensor | None = getattr(self, f"_{hemisphere}_scored")
        if scored is None:
            return predicted
        return torch.zeros_like(predicted).index_copy(1, scored, predicted[:, scored])

    def attention(self, features: Tensor) -> Tensor:
        raise UsageError("The linear encoder has no queries, and so no attention. Use one of the other encoders.")

    def penalty(self) -> Tensor:
        """0.02 times the sum of the norms (not squared) of the readouts' parameters, as published."""
        embeds = (getattr(self, f"{hemisphere}_embed") for hemisphere in HEMISPHERES)
        norms = [p.norm() for embed in embeds for p in embed.parameters()]
        return PENALTY * torch.stack(norms).sum()

    def _check(self, features: Tensor) -> None:
        super()._check(features)
        if tuple(features.shape[2:]) != self.grid:
            raise UsageError(
                f"The linear encoder was built for a grid of {self.grid[0]} x {self.grid[1]}, found features of "
                f"{features.shape[2]} x {features.shape[3]}. Use features of the grid that it was trained on."
            )
