"""The door to the encoders: a configuration and a subject's queries in, a model out."""

from __future__ import annotations

import torch

from brainenc.datasets.rois import RoiQueries
from brainenc.errors import UsageError
from brainenc.train.encoders.base import ENCODERS, RIDGE, BrainEncoder, EncoderConfig
from brainenc.train.encoders.custom_transformer import CustomTransformerEncoder
from brainenc.train.encoders.linear import LinearEncoder
from brainenc.train.encoders.spatial_feature import SpatialFeatureEncoder
from brainenc.train.encoders.transformer import TransformerEncoder

__all__ = ["ENCODERS", "BrainEncoder", "EncoderConfig", "build_encoder", "check_encoder"]

_CLASSES: dict[str, type[BrainEncoder]] = {
    "transformer": TransformerEncoder,
    "custom_transformer": CustomTransformerEncoder,
    "spatial_feature": SpatialFeatureEncoder,
    "linear": LinearEncoder,
}


def build_encoder(config: EncoderConfig, queries: RoiQueries, *, channels: int, grid: tuple[int, int]) -> BrainEncoder:
    """Make an encoder with fresh weights, drawn from torch's default generator.

    Args:
        config: its shape.
        queries: which vertices each query answers for, of the same readout.
        channels: width of the features.
        grid: (H, W) of the features.

    Raises:
        UsageError: encoder and readout, or widths and heads, do not go together.
    """
    if config.encoder == RIDGE:
        raise UsageError(
            "A ridge run keeps predictions, penalties and scores, not weights: its validation scores are in "
            "scores.json and its predictions in predictions/. Ridge is fitted by `brainenc train --encoder ridge`."
        )
    if config.readout != queries.readout:
        raise UsageError(
            f"The encoder is configured for the readout {config.readout!r}, the queries are {queries.readout!r}."
        )
    return _CLASSES[config.encoder](config, queries, channels=channels, grid=grid)


def check_encoder(config: EncoderConfig, queries: RoiQueries, *, channels: int, grid: tuple[int, int]) -> None:
    """Refuse what :func:`build_encoder` would refuse, without memory for the weights and without drawing them.

    Raises:
        UsageError: as there.
    """
    with torch.device("meta"):
        build_encoder(config, queries, channels=channels, grid=grid)
