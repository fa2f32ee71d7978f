"""Image towers of open_clip: any model with any of its pretrained tags, a local checkpoint, or a hub repository."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brainenc.errors import UnknownName, UsageError
from brainenc.extract.backbones import timm as timm_source
from brainenc.extract.network import Network, find_blocks, find_norm
from brainenc.extract.preprocess import Preprocessing


def load(name: str, *, slug: str | None, size_policy: str | None, image_size: int | tuple[int, int] | None) -> Network:
    """``ViT-L-14/openai``, ``ViT-L-14/path/to/checkpoint.pt``, ``hf-hub:org/repository`` or ``local-dir:folder``."""
    model_name, weights = _split(name)
    size = _forced_size(size_policy, image_size)
    visual, quick = _load_visual(name, model_name, weights, size)
    patch = _patch(visual)
    preprocessing = _preprocessing(name, visual, size_policy)
    if size_policy or image_size:
        preprocessing = preprocessing.with_policy(size_policy, image_size, patch)
    trunk = getattr(visual, "trunk", None)
    blocks = find_blocks(visual) or timm_source.stages(visual)
    project = functools.partial(_project, visual) if _projects_tokens(visual) else None
    return Network(
        source="open_clip",
        name=f"open_clip:{name}",
        slug=slug or _slug(model_name, weights),
        model=visual,
        run=functools.partial(_run, visual),
        blocks=blocks,
        norm=find_norm(visual, ("ln_post", "trunk.norm")),
        project=project,
        n_cls=timm_source.n_cls(trunk) if trunk is not None else int(hasattr(visual, "class_embedding")),
        n_registers=timm_source.n_registers(trunk) if trunk is not None else 0,
        patch=patch,
        nominal=_pair(visual.image_size),
        preprocessing=preprocessing,
        config=_architecture(visual, quick),
    )


def _split(name: str) -> tuple[str, str | None]:
    if name.startswith(("hf-hub:", "local-dir:")):
        return name, None
    model, _, weights = name.partition("/")
    return model, weights or None


def _slug(model: str, weights: str | None) -> str:
    if weights is None:
        return Path(model.partition(":")[2]).name
    return f"{model}-{Path(weights).stem}"


def _forced_size(policy: str | None, size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
    if policy == "pad" and size is None:
        raise UsageError(
            "open_clip's models are built for one image size: give it (--image-size) with the size policy `pad`."
        )
    return size


def _load_visual(
    name: str, model_name: str, weights: str | None, size: int | tuple[int, int] | None
) -> tuple[nn.Module, bool]:
    import open_clip

    if weights is None and ":" not in model_name:
        raise UnknownName("pretrained tag", "", _tags(model_name), f"open_clip:{name} (write open_clip:MODEL/TAG)")
    if ":" not in model_name and model_name not in open_clip.list_models():
        raise UnknownName("open_clip model", model_name, open_clip.list_models())
    tagged = open_clip.get_pretrained_cfg(model_name, weights) if weights is not None else {}
    if weights is not None and not tagged and not Path(weights).is_file():
        raise UnknownName("pretrained tag or checkpoint file", weights, _tags(model_name), f"open_clip:{model_name}")
    quick = bool(tagged.get("quick_gelu", False))
    try:
        # The tag knows which activation its weights were trained with; newer open_clip only warns about a mismatch.
        model, _, _ = open_clip.create_model_and_transforms(
            model_name, pretrained=weights, force_image_size=size, force_quick_gelu=quick
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"open_clip:{name} could not be loaded ({_first_line(error)}). Without a network, download the checkpoint "
            f"elsewhere and write open_clip:{model_name}/path/to/checkpoint."
        ) from error
    return model.visual.float(), quick


def _tags(model_name: str) -> list[str]:
    import open_clip

    return [*open_clip.list_pretrained_tags_by_model(model_name), "the path of a checkpoint file"]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _preprocessing(name: str, visual: nn.Module, size_policy: str | None) -> Preprocessing:
    config: Mapping[str, Any] = visual.preprocess_cfg  # type: ignore[assignment]
    size = _pair(config["size"])
    mode = config.get("resize_mode") or "shortest"
    if mode == "longest" and size_policy is None:
        raise UsageError(
            f"open_clip:{name} was trained on letterboxed images, which would store borders as features: "
            "choose a size policy (pad, resize or crop)."
        )
    return Preprocessing(
        policy="resize" if mode == "squash" else "crop",
        mean=_three(config["mean"]),
        std=_three(config["std"]),
        resample=config.get("interpolation") or "bicubic",
        size=size,
        shortest=None if mode == "squash" else min(size),
    )


def _run(visual: nn.Module, batch: torch.Tensor) -> torch.Tensor | None:
    output = visual(batch)
    pooled: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return pooled


def _projects_tokens(visual: nn.Module) -> bool:
    return isinstance(getattr(visual, "proj", None), nn.Parameter) and getattr(visual, "attn_pool", None) is None


def _project(visual: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    projection: torch.Tensor = visual.proj  # type: ignore[assignment]
    return tokens @ projection


def _patch(visual: nn.Module) -> int:
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        return timm_source.patch(trunk)
    return _pair(getattr(visual, "patch_size", 1))[0]


def _architecture(visual: nn.Module, quick_gelu: bool) -> dict[str, Any]:
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        return {"tower": "timm", **timm_source.architecture(trunk)}
    blocks = find_blocks(visual)
    first = visual.get_submodule(blocks[0]) if blocks else None
    heads: Callable[[Any], int | None] = lambda block: getattr(getattr(block, "attn", None), "num_heads", None)  # noqa: E731
    return {
        "tower": type(visual).__name__,
        "layers": len(blocks),
        "heads": heads(first),
        "patch_size": _patch(visual),
        "image_size": list(_pair(visual.image_size)),
        "quick_gelu": quick_gelu,
    }


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)
