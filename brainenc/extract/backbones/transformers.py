"""Vision models of Hugging Face transformers, through one path.

DINOv2 (with registers), DINOv3, ViT, DeiT, SigLIP, CLIP's image side, MAE, I-JEPA, data2vec, BEiT, and whatever else
takes ``pixel_values`` and has a list of blocks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brainenc.errors import UnknownName, UsageError
from brainenc.extract.backbones.processors import edge_of, processor_of
from brainenc.extract.network import Network, find_blocks, find_norm
from brainenc.extract.preprocess import Preprocessing
from brainenc.extract.presets import PRESETS

_KNOWN = tuple(
    f"facebook/{name}"
    for size in ("small", "base", "large", "giant")
    for name in (f"dinov2-{size}", f"dinov2-with-registers-{size}")
)
"""Hub ids to compare a misspelled one with."""
_NATIVE = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""Models that people feed native sizes, padded to the patch."""

# Fields of a configuration that make the architecture, under every name that the models give them. Not the whole
# configuration: other versions of transformers write other defaults into it, and stores outlive versions.
_ARCHITECTURE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp_ratio",
    "hidden_act", "layer_norm_eps", "patch_size", "image_size", "num_register_tokens", "depths", "hidden_sizes",
    "embed_dim",
)  # fmt: skip


def load(name: str, *, slug: str | None, size_policy: str | None, image_size: int | tuple[int, int] | None) -> Network:
    """A hub id or a folder made by ``save_pretrained``."""
    whole, missing = _load_model(name)
    model, project = _vision_side(whole)
    config: Any = model.config
    kind = str(config.model_type)
    wants = str(getattr(model, "main_input_name", "pixel_values"))
    if wants != "pixel_values":
        raise UsageError(f"{name} is a {kind} model, which takes {wants} and no images.")
    if "spatial_shapes" in _arguments(model):
        raise UsageError(f"{name}: models that take flattened patches of any aspect ratio have no fixed rows to store.")
    patch = edge_of(getattr(config, "patch_size", 1)) or 1
    patch = 1 if _is_hierarchical(config) else patch
    preprocessing = processor_of(name, config, kind)
    if size_policy or image_size or kind in _NATIVE:
        native = "pad" if kind in _NATIVE else None
        preprocessing = preprocessing.with_policy(size_policy or native, image_size, patch)
    prefix = _prefix_of(model, whole)
    unfilled = _relative(missing, prefix)
    pooler = frozenset(key for key in unfilled if "pooler" in key or key.startswith("head."))
    if unfilled - pooler:
        listed = ", ".join(sorted(unfilled - pooler)[:5])
        raise UsageError(f"{name} does not hold all weights of a {kind} model: {listed} ... are missing.")
    return Network(
        source="transformers",
        name=name,
        slug=slug or (Path(name).resolve() if Path(name).is_dir() else Path(name)).name,
        model=model,
        run=functools.partial(_run, model, _arguments(model), project, patch),
        blocks=find_blocks(model),
        norm=find_norm(model),
        project=project,
        n_cls=int(_has_class_token(model)),
        n_registers=int(getattr(config, "num_register_tokens", 0) or 0),
        patch=patch,
        nominal=_nominal(preprocessing, config, patch),
        pools=not pooler,
        preprocessing=preprocessing,
        config=_architecture(config),
        without=pooler,
    )


def _load_model(name: str) -> tuple[nn.Module, frozenset[str]]:
    import transformers

    try:
        with no_progress_bars():
            model, report = transformers.AutoModel.from_pretrained(
                name, output_loading_info=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise _unknown(name, error) from error
    if getattr(model.config, "mask_ratio", None):
        model.config.mask_ratio = 0.0  # a masked autoencoder that sees the whole image
    # Every version loads in its own default dtype; float32 holds all of them exactly.
    return model.float(), frozenset(report["missing_keys"])


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without transformers' own bars, which would tear the one live line of a command."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _unknown(name: str, error: Exception) -> UnknownName:
    from huggingface_hub import constants

    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = f"the hub, its cache or the file system ({reason})"
    if constants.HF_HUB_OFFLINE:
        where = "the file system or the hub's cache (the hub itself cannot be reached from here, so it was not asked)"
    return UnknownName(
        "backbone",
        name,
        [
            f"the presets {', '.join(PRESETS)}",
            "a hub id of transformers such as facebook/dinov2-base (needs the network or the hub's cache)",
            "a folder made by save_pretrained",
            "open_clip:MODEL/TAG",
            "timm:MODEL",
            "torchvision:MODEL",
        ],
        where,
        [*PRESETS, *_KNOWN],
    )


def _vision_side(whole: nn.Module) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor] | None]:
    """The image tower of a two-tower model, with its projection; another model as it is."""
    model = getattr(whole, "vision_model", whole)
    projection = getattr(whole, "visual_projection", None)
    if not hasattr(model, "config"):
        model.config = getattr(whole.config, "vision_config", whole.config)
    return model, projection if isinstance(projection, nn.Linear) else None


def _prefix_of(model: nn.Module, whole: nn.Module) -> str:
    return next((f"{name}." for name, module in whole.named_modules() if module is model and name), "")


def _relative(missing: frozenset[str], prefix: str) -> frozenset[str]:
    return frozenset(key.removeprefix(prefix) for key in missing if key.startswith(prefix))


def _arguments(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _run(
    model: nn.Module,
    arguments: frozenset[str],
    project: Callable[[torch.Tensor], torch.Tensor] | None,
    patch: int,
    batch: torch.Tensor,
) -> torch.Tensor | None:
    extra: dict[str, Any] = {}
    if "interpolate_pos_encoding" in arguments:
        extra["interpolate_pos_encoding"] = True
    if "noise" in arguments:  # a masked autoencoder shuffles its patches by it: rising noise keeps them in order
        patches = (batch.shape[2] // patch) * (batch.shape[3] // patch)
        extra["noise"] = torch.arange(patches, device=batch.device, dtype=torch.float32).expand(len(batch), -1)
    pooled = getattr(model(pixel_values=batch, **extra), "pooler_output", None)
    if pooled is None:
        return None
    pooled = pooled.flatten(1)
    return project(pooled) if project is not None else pooled


def _nominal(preprocessing: Preprocessing, config: Any, patch: int) -> tuple[int, int]:
    """Its one size, or, for a model that takes any, one that costs little to look at."""
    if preprocessing.policy != "pad":
        return preprocessing.output_shape(0, 0)
    if patch > 1:
        return 3 * patch, 4 * patch
    edge = edge_of(getattr(config, "image_size", None)) or 224
    return edge, edge


def _is_hierarchical(config: Any) -> bool:
    """Stages of falling resolution: the patch that begins them says nothing about the rows that come out."""
    return bool(getattr(config, "depths", None))


def _has_class_token(model: nn.Module) -> bool:
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    return bool(names & {"cls_token", "class_embedding", "class_token"})


def _architecture(config: Any) -> dict[str, Any]:
    found = {name: getattr(config, name) for name in _ARCHITECTURE if getattr(config, name, None) is not None}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain
