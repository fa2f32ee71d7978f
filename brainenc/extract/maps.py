"""Feature maps of a few images at once, in this process: for synthetic subjects and for training without a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from brainenc.errors import UsageError
from brainenc.extract.backbone import Backbone, parse_features
from brainenc.extract.images import open_image


def feature_maps(backbone: Backbone, feature: str) -> Callable[[Sequence[Path]], npt.NDArray[Any]]:
    """A callable that turns images into feature maps of shape (n, H, W, D), prefix tokens left out.

    Args:
        backbone: where it is, it computes.
        feature: one feature, as ``-1.q``.

    Raises:
        UsageError: the feature is no map (a CLS token, say), for this size of images.
    """
    (wanted,) = parse_features([feature], backbone.info)

    def maps(images: Sequence[Path]) -> npt.NDArray[Any]:
        opened = [open_image(path) for path in images]
        details = backbone.details(wanted, (opened[0].height, opened[0].width))
        if details["grid"] is None:
            raise UsageError(f"{wanted} of {backbone.info.name} is no feature map; choose a feature such as -1.token.")
        batch = torch.stack([backbone.preprocess(image) for image in opened])
        rows = backbone.forward(batch, [wanted])[wanted][:, details["n_prefix"] :]
        array: npt.NDArray[Any] = rows.float().cpu().numpy()
        return np.ascontiguousarray(array.reshape(len(array), *details["grid"], -1))

    return maps
