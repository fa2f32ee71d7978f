"""Any model of timm, with its own pretrained weights or a local checkpoint."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brainenc.errors import UnknownName, UsageError
from brainenc.extract.network import Network, find_blocks, find_norm
from brainenc.extract.preprocess import Preprocessing


def load(name: str, *, slug: str | None, size_policy: str | None, image_size: int | tuple[int, int] | None) -> Network:
    """``vit_base_patch14_dinov2.lvd142m``, ``hf-hub:org/repository``, or ``NAME/path/to/checkpoint``."""
    model_name, checkpoint = _split(name)
    model = _create(name, model_name, checkpoint, size_policy, image_size)
    preprocessing = _preprocessing(name, model, size_policy)
    if size_policy or image_size:
        preprocessing = preprocessing.with_policy(size_policy, image_size, patch(model))
    blocks = find_blocks(model) or stages(model)
    return Network(
        source="timm",
        name=f"timm:{name}",
        slug=slug or Path(model_name).name.replace(":", "-"),
        model=model,
        run=functools.partial(_run, model),
        blocks=blocks,
        norm=find_norm(model, ("norm",)),
        n_cls=n_cls(model),
        n_registers=n_registers(model),
        patch=patch(model),
        nominal=_nominal(model) if patch(model) > 1 else preprocessing.output_shape(224, 224),
        preprocessing=preprocessing,
        config=architecture(model),
    )


def patch(model: nn.Module) -> int:
    """Edge of a patch of a plain vision transformer; 1 for everything whose rows are not patches."""
    size = getattr(getattr(model, "patch_embed", getattr(model, "embeds", None)), "patch_size", None)
    if size is None or not hasattr(model, "blocks"):
        return 1
    return int(size[0] if isinstance(size, list | tuple) else size)


def n_cls(model: nn.Module) -> int:
    """1 with a class token, else 0."""
    return int(getattr(model, "cls_token", None) is not None)


def n_registers(model: nn.Module) -> int:
    """How many register tokens follow the class token."""
    tokens = getattr(model, "reg_token", None)
    return int(tokens.shape[1]) if isinstance(tokens, torch.Tensor) else int(getattr(model, "num_reg_tokens", 0) or 0)


def stages(model: nn.Module) -> tuple[str, ...]:
    """The four stages of a residual network, which keeps them apart instead of in a list."""
    return tuple(name for name in ("layer1", "layer2", "layer3", "layer4") if hasattr(model, name))


def architecture(model: nn.Module) -> dict[str, Any]:
    """What makes it this architecture, without the weights' name."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return {"model": config.get("architecture") or type(model).__name__, "image_size": list(_nominal(model))}


def _split(name: str) -> tuple[str, str | None]:
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return name, None
    model, _, checkpoint = name.partition("/")
    return model, checkpoint or None


def _create(
    name: str, model_name: str, checkpoint: str | None, policy: str | None, size: int | tuple[int, int] | None
) -> nn.Module:
    import timm

    if ":" not in model_name and not timm.is_model(model_name.partition(".")[0]):
        raise UnknownName(
            "timm model", model_name, timm.list_models(f"*{model_name[:6]}*")[:12] or ["see timm.list_models()"]
        )
    options: dict[str, Any] = {}
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise UnknownName("checkpoint file", checkpoint, ["the path of a file that timm can load"], f"timm:{name}")
        options["pretrained_cfg_overlay"] = {"file": checkpoint}
    sizes = {"dynamic_img_size": True} if policy == "pad" else {"img_size": size} if size is not None else {}
    try:
        create = functools.partial(timm.create_model, model_name, pretrained=True, num_classes=0)
        return _any_size(create, options, sizes).float()
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"timm:{name} could not be loaded ({reason}). Without a network, download the weights elsewhere and write "
            f"timm:{model_name}/path/to/checkpoint."
        ) from error


def _any_size(create: Callable[..., nn.Module], options: dict[str, Any], sizes: dict[str, Any]) -> nn.Module:
    """Convolutional networks take any size and know no option for it; what cannot is found out by looking at it."""
    try:
        return create(**options, **sizes)
    except TypeError:
        if not sizes:
            raise
        return create(**options)


def _run(model: Any, batch: torch.Tensor) -> torch.Tensor:
    pooled: torch.Tensor = model.forward_head(model.forward_features(batch), pre_logits=True)
    return pooled


def _nominal(model: nn.Module) -> tuple[int, int]:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    return int(size[0]), int(size[1])


def _preprocessing(name: str, model: nn.Module, policy: str | None) -> Preprocessing:
    from timm.data.config import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    _, height, width = config["input_size"]
    mode, fraction = config.get("crop_mode", "center"), config.get("crop_pct") or 1.0
    if mode == "border" and policy is None:
        raise UsageError(f"timm:{name} was trained on bordered images: choose a size policy (pad, resize or crop).")
    (red, green, blue), (s_red, s_green, s_blue) = config["mean"], config["std"]
    squash = mode == "squash"
    whole = squash and fraction == 1.0
    return Preprocessing(
        policy="resize" if whole else "crop",
        mean=(float(red), float(green), float(blue)),
        std=(float(s_red), float(s_green), float(s_blue)),
        resample=config["interpolation"],
        size=(height, width),
        shortest=None if whole else math.floor(min(height, width) / fraction),
        keep_aspect=not squash,
    )
