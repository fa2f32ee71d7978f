"""A loaded model, described in the terms that features need, whatever library it came from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from brainenc.extract.capture import Heads, Watch, watching
from brainenc.extract.preprocess import Preprocessing

_BLOCK_LISTS = ("layer", "layers", "blocks", "resblocks", "stages", "block")
_NORMS = ("layernorm", "post_layernorm", "norm", "ln_post", "layer_norm", "rms_norm", "ln")


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a source (transformers, open_clip ...) hands over."""

    source: str
    name: str
    """What the user called it; a hub id, tag or folder."""
    slug: str
    model: nn.Module
    run: Callable[[torch.Tensor], torch.Tensor | None]
    """Batch (B, 3, H, W) -> what the model itself pools, (B, D), or None; must call ``model``."""
    blocks: tuple[str, ...]
    """Dotted names of the blocks, in order; empty where numbers make no sense."""
    norm: str | None
    """Dotted name of the final norm."""
    project: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Visual projection of normed tokens, (..., D) -> (..., E), where the model has one."""
    n_cls: int
    """How many tokens stand before the registers and patches: 1 with a class token, else 0."""
    n_registers: int = 0
    patch: int = 1
    """Edge of a patch in pixels; 1 for convolutional networks."""
    nominal: tuple[int, int]
    """Height and width that the model takes in any case, to look at it."""
    pools: bool = True
    """Whether ``run`` gives a pooled output that the checkpoint's own weights determine."""
    preprocessing: Preprocessing
    config: Mapping[str, Any] = field(default_factory=dict)
    """What makes it this architecture: JSON-able, the same on every machine and library version."""
    without: frozenset[str] = frozenset()
    """Weights that no checkpoint filled and that no feature uses; left out of the hash."""


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """What was seen of a network in a forward pass."""

    outputs: dict[str, list[tuple[int, ...]]]
    """Module -> shape of its tensor output at each call; modules without one are absent."""
    attention: dict[str, list[tuple[int, int, int]]]
    """Block -> (query heads, query tokens, d) of each attention kernel in it."""
    pooled: tuple[int, ...] | None


def look(network: Network, height: int, width: int) -> Sighting:
    """Shapes everywhere for inputs of this size, from one forward pass of a black image.

    A real pass: models keep tensors that they derive from the size (positions, indices), and a pass with fake or
    meta tensors would leave such tensors behind for the real ones to stumble over.
    """
    outputs: dict[str, list[tuple[int, ...]]] = {}
    attention: dict[str, list[tuple[int, int, int]]] = {}

    def saw_output(name: str, tensor: torch.Tensor) -> None:
        outputs.setdefault(name, []).append(tuple(tensor.shape))

    def saw_attention(name: str, heads: Heads) -> None:
        shape = heads.q.shape if heads.q.ndim == 4 else (0, 0, 0, 0)  # windows have no rows of the image's tokens
        attention.setdefault(name, []).append((shape[1], shape[2], shape[3]))

    names = [name for name, _ in network.model.named_modules() if name]
    watch = Watch(
        outputs={name: functools.partial(saw_output, name) for name in names},
        attention={name: functools.partial(saw_attention, name) for name in network.blocks},
    )
    device = next(network.model.parameters()).device
    with torch.no_grad(), watching(network.model, watch):
        pooled = network.run(torch.zeros(1, 3, height, width, device=device))
    return Sighting(outputs=outputs, attention=attention, pooled=None if pooled is None else tuple(pooled.shape))


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the children of the model's main list of like blocks, or () if it has none.

    The shallowest list of the names that libraries use; of several, the longest.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and name.rpartition(".")[2] in _BLOCK_LISTS
        and len({type(child) for child in module}) == 1
    ]
    if not lists:
        return ()
    name, module = min(lists, key=lambda item: (item[0].count("."), -len(item[1])))
    return tuple(f"{name}.{child}" for child, _ in module.named_children())


def find_norm(model: nn.Module, names: Sequence[str] = _NORMS) -> str | None:
    """Name of the final norm, None if there is none (or it is an identity)."""
    modules = dict(model.named_modules())
    return next((name for name in names if name in modules and not isinstance(modules[name], nn.Identity)), None)
