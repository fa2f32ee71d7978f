"""Small seeded models of real architectures, saved the way that their libraries save the big ones.

For demos and tests: no downloads, seconds to make, and loaded through the same code as the published weights.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from brainenc.errors import UnknownName
from brainenc.extract.backbones.transformers import no_progress_bars
from brainenc.extract.preprocess import IMAGENET, OPENAI_CLIP

_VIT = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}


def save_miniature(kind: str, folder: str | Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Save a small model of a real architecture with seeded weights.

    Args:
        kind: one of :func:`kinds`.
        folder: where to put it; created.
        seed: of the weights. The same seed gives the same weights.
        sizes: fields of the architecture to change, by the names that its library gives them, for example
            ``hidden_size``, ``num_hidden_layers``, ``image_size``, ``patch_size``.

    Returns:
        The folder (transformers, open_clip) or checkpoint file (timm, torchvision) that was written;
        :func:`backbone_string` says how to load it.

    Raises:
        UnknownName: no such kind.
    """
    if kind not in _KINDS:
        raise UnknownName("miniature", kind, kinds())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _seeded(seed):
        return _KINDS[kind](folder, sizes)


def kinds() -> list[str]:
    """Every architecture that there is a miniature of."""
    return sorted(_KINDS)


def backbone_string(kind: str, saved: str | Path) -> str:
    """What to tell :func:`~brainenc.extract.backbone.load_backbone` about a miniature that was saved at ``saved``."""
    if kind == "open_clip":
        return f"open_clip:local-dir:{saved}"
    if kind == "timm":
        return f"timm:{Path(saved).stem}/{saved}"
    return f"torchvision:{kind}/{saved}" if kind.startswith("resnet") else str(saved)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _rouse(model: torch.nn.Module) -> torch.nn.Module:
    """Give every weight a part to play: libraries start biases at 0 and scales at 1 or 1e-5, which hides mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 or parameter.abs().max() < 1e-3:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _transformers(model_class: str, config_class: str, **defaults: Any) -> Callable[[Path, dict[str, Any]], Path]:
    def save(folder: Path, sizes: dict[str, Any]) -> Path:
        import transformers

        config = getattr(transformers, config_class)(**(defaults | sizes))
        model: Any = getattr(transformers, model_class)(config)
        _rouse(model)
        with no_progress_bars():
            model.save_pretrained(folder)
        return folder

    return save


def _dino(model_class: str, config_class: str, **defaults: Any) -> Callable[[Path, dict[str, Any]], Path]:
    save_model = _transformers(model_class, config_class, **defaults)

    def save(folder: Path, sizes: dict[str, Any]) -> Path:
        import transformers

        mean, std = IMAGENET
        transformers.BitImageProcessor(
            size={"shortest_edge": 256},
            crop_size={"height": 224, "width": 224},
            image_mean=list(mean),
            image_std=list(std),
        ).save_pretrained(folder)
        return save_model(folder, sizes)

    return save


_DINO = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2, "patch_size": 14,
         "image_size": 112}  # fmt: skip
_PATCHES = _VIT | {"patch_size": 16, "image_size": 64}

_CLIP = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 4, "head_width": 12}


def _open_clip(folder: Path, sizes: dict[str, Any]) -> Path:
    """A folder that ``open_clip:local-dir:FOLDER`` loads: configuration and weights, as open_clip saves them."""
    import open_clip

    vision = _CLIP | sizes
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": vision.pop("embed_dim", 32), "vision_cfg": vision, "text_cfg": text}
    model = open_clip.CLIP(**config)
    preprocess = {
        "mean": list(OPENAI_CLIP[0]),
        "std": list(OPENAI_CLIP[1]),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    )
    torch.save(_rouse(model).state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def _timm(folder: Path, sizes: dict[str, Any]) -> Path:
    """A checkpoint of a model that timm names; ``model=`` chooses it (default ``vit_tiny_patch16_224``)."""
    import timm

    name = sizes.pop("model", "vit_tiny_patch16_224")
    path = folder / f"{name}.pth"
    torch.save(_rouse(timm.create_model(name, pretrained=False, **sizes)).state_dict(), path)
    return path


def _torchvision(name: str) -> Callable[[Path, dict[str, Any]], Path]:
    def save(folder: Path, sizes: dict[str, Any]) -> Path:
        import torchvision

        path = folder / f"{name}.pth"
        torch.save(_rouse(torchvision.models.get_model(name, weights=None, **sizes)).state_dict(), path)
        return path

    return save


_KINDS: dict[str, Callable[[Path, dict[str, Any]], Path]] = {
    "open_clip": _open_clip,
    "timm": _timm,
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "dinov2": _dino("Dinov2Model", "Dinov2Config", **_DINO),
    "dinov2_registers": _dino("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=4, **_DINO),
    "dinov3": _transformers("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4, key_bias=False, **_PATCHES),
    "vit": _transformers("ViTModel", "ViTConfig", **_PATCHES),
    "deit": _transformers("DeiTModel", "DeiTConfig", **_PATCHES),
    "mae": _transformers("ViTMAEModel", "ViTMAEConfig", **_PATCHES),
    "ijepa": _transformers("IJepaModel", "IJepaConfig", **_PATCHES),
    "beit": _transformers(
        "BeitModel", "BeitConfig", use_relative_position_bias=True, use_mean_pooling=True, **_PATCHES
    ),
    "data2vec": _transformers(
        "Data2VecVisionModel", "Data2VecVisionConfig", use_relative_position_bias=True, **_PATCHES
    ),
    "siglip": _transformers("SiglipVisionModel", "SiglipVisionConfig", **_PATCHES),
    "clip_vision": _transformers("CLIPVisionModel", "CLIPVisionConfig", **_PATCHES),
}
