"""Preprocessing as transformers' image processors write it down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brainenc.extract.preprocess import HALF, IMAGENET, OPENAI_CLIP, Preprocessing

# What the published preprocessor_config.json say, for folders that have none (transformers' class defaults differ).
_STATISTICS = {
    "dinov2": IMAGENET, "dinov2_with_registers": IMAGENET, "dinov3_vit": IMAGENET, "ijepa": IMAGENET,
    "vit_mae": IMAGENET, "vit_msn": IMAGENET, "deit": IMAGENET, "resnet": IMAGENET, "convnext": IMAGENET,
    "convnextv2": IMAGENET, "swin": IMAGENET, "swinv2": IMAGENET, "dinov3_convnext": IMAGENET, "hiera": IMAGENET,
    "clip": OPENAI_CLIP, "clip_vision_model": OPENAI_CLIP, "metaclip_2": OPENAI_CLIP,
}  # fmt: skip
_BICUBIC = ("dinov2", "dinov2_with_registers", "clip", "clip_vision_model", "siglip", "siglip_vision_model", "vit_mae",
            "metaclip_2", "hiera")  # fmt: skip
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def processor_of(name: str, config: Any, kind: str) -> Preprocessing:
    """What the checkpoint's own preprocessor_config.json says; without one, what the published ones of its kind say."""
    import transformers

    try:
        # A checkpoint's own code is never run; left unsaid, transformers would ask on the terminal.
        processor = transformers.AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            name, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError):  # a folder without preprocessor_config.json
        mean, std = _STATISTICS.get(kind, HALF)
        edge = edge_of(getattr(config, "image_size", None)) or 224
        cropped = kind in ("clip", "clip_vision_model", "metaclip_2")
        return Preprocessing(
            policy="crop" if cropped else "resize",
            mean=mean,
            std=std,
            resample="bicubic" if kind in _BICUBIC else "bilinear",
            size=(edge, edge),
            shortest=edge if cropped else None,
        )
    return _from_processor(processor)


def _from_processor(processor: Any) -> Preprocessing:
    mean, std = (_three(getattr(processor, field)) for field in ("image_mean", "image_std"))
    if not getattr(processor, "do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    size, crop = _mapping(processor.size), _mapping(getattr(processor, "crop_size", None))
    resample = _RESAMPLING[int(getattr(processor, "resample", 2) or 2)]
    shortest = size.get("shortest_edge")
    if getattr(processor, "do_center_crop", False) and crop:
        target = (int(crop["height"]), int(crop["width"]))
        keep_aspect = shortest is not None
        first = int(shortest or size["height"]) if getattr(processor, "do_resize", True) else None
        return Preprocessing(
            policy="crop", mean=mean, std=std, resample=resample, size=target, shortest=first, keep_aspect=keep_aspect
        )
    if shortest is not None:  # a shortest edge without a crop gives no fixed size: take the square in its middle
        edge = int(shortest)
        fraction = float(getattr(processor, "crop_pct", None) or 1.0)
        return Preprocessing(
            policy="crop", mean=mean, std=std, resample=resample, size=(edge, edge), shortest=int(edge / fraction)
        )
    target = (int(size["height"]), int(size["width"]))
    return Preprocessing(policy="resize", mean=mean, std=std, resample=resample, size=target)


def _mapping(size: Any) -> dict[str, Any]:
    """transformers writes sizes as a number, a dict or an object of its own."""
    if size is None:
        return {}
    if isinstance(size, int):
        return {"height": size, "width": size}
    fields = size if isinstance(size, Mapping) else vars(size)
    return {key: value for key, value in fields.items() if value is not None}


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = [values] * 3 if isinstance(values, int | float) else values
    return float(red), float(green), float(blue)


def edge_of(value: Any) -> int | None:
    """Sizes are written as a number or as a pair."""
    if value is None:
        return None
    return int(value[0] if isinstance(value, list | tuple) else value)
