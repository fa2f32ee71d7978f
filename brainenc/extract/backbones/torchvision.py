"""Models of torchvision; residual networks with frozen batch norm, as the published encoder uses them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brainenc.errors import UnknownName, UsageError
from brainenc.extract.backbones.timm import stages
from brainenc.extract.network import Network, find_blocks, find_norm
from brainenc.extract.preprocess import IMAGENET, Preprocessing

_FIRST_WEIGHTS = "IMAGENET1K_V1"
"""What ``pretrained=True`` has always meant; the better V2 are there by name."""


def load(name: str, *, slug: str | None, size_policy: str | None, image_size: int | tuple[int, int] | None) -> Network:
    """``resnet50``, ``resnet50/IMAGENET1K_V2`` or ``resnet50/path/to/state_dict.pth``."""
    import torchvision

    model_name, _, weights = name.partition("/")
    if model_name not in torchvision.models.list_models(module=torchvision.models):
        raise UnknownName("torchvision model", model_name, torchvision.models.list_models(module=torchvision.models))
    model, preprocessing = _create(name, model_name, weights or _FIRST_WEIGHTS)
    patch = int(getattr(model, "patch_size", 1))
    if size_policy or image_size:
        preprocessing = preprocessing.with_policy(size_policy, image_size, patch)
    blocks = find_blocks(model) or stages(model)
    return Network(
        source="torchvision",
        name=f"torchvision:{name}",
        slug=slug or (f"{model_name}-{weights}" if weights and not Path(weights).is_file() else model_name),
        model=model,
        run=functools.partial(_run, model),
        blocks=blocks,
        norm=find_norm(model, ("encoder.ln",)),
        n_cls=int(hasattr(model, "class_token")),
        patch=patch,
        nominal=preprocessing.output_shape(224, 224),
        preprocessing=preprocessing,
        config={"model": model_name},
    )


def _create(name: str, model_name: str, weights: str) -> tuple[nn.Module, Preprocessing]:
    import torchvision

    options = (
        {"norm_layer": torchvision.ops.FrozenBatchNorm2d} if model_name.startswith(("resnet", "wide_resnet")) else {}
    )
    if Path(weights).is_file():
        model: nn.Module = torchvision.models.get_model(model_name, weights=None, **options)
        _fill(name, model, weights)
        return _headless(model), _preprocessing(_default_transforms(model_name))
    known = torchvision.models.get_model_weights(model_name)
    if weights not in known.__members__:
        raise UnknownName(
            "weights", weights, [*known.__members__, "the path of a state dict"], f"torchvision:{model_name}"
        )
    try:
        model = torchvision.models.get_model(model_name, weights=known[weights], **options)
    except OSError as error:
        raise UsageError(
            f"torchvision:{name} could not be downloaded ({error}). Without a network, download the weights elsewhere "
            f"and write torchvision:{model_name}/path/to/state_dict.pth."
        ) from error
    return _headless(model), _preprocessing(known[weights].transforms())


def _fill(name: str, model: nn.Module, path: str) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except (RuntimeError, ValueError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{path} does not hold the weights of torchvision:{name.partition('/')[0]} ({first})."
        ) from error


def _headless(model: nn.Module) -> nn.Module:
    """Without the classifier, so that the model's own output is what it pools."""
    for head in ("fc", "heads", "head"):
        if isinstance(getattr(model, head, None), nn.Module):
            setattr(model, head, nn.Identity())
    return model


def _run(model: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    return model(batch)


def _default_transforms(model_name: str) -> Any:
    import torchvision

    known = torchvision.models.get_model_weights(model_name).__members__
    return known[_FIRST_WEIGHTS].transforms() if _FIRST_WEIGHTS in known else next(iter(known.values())).transforms()


def _preprocessing(transforms: Any) -> Preprocessing:
    edge, shortest = int(transforms.crop_size[0]), int(transforms.resize_size[0])
    mean, std = getattr(transforms, "mean", IMAGENET[0]), getattr(transforms, "std", IMAGENET[1])
    return Preprocessing(
        policy="crop",
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        resample=transforms.interpolation.value,
        size=(edge, edge),
        shortest=shortest,
    )
