"""Where backbones come from. Each module has ``load(name, ...) -> Network``; libraries are imported when needed."""

from __future__ import annotations

from importlib import import_module

from brainenc.extract.network import Network

SOURCES = ("transformers", "open_clip", "timm", "torchvision")


def load_network(
    name: str, *, slug: str | None, size_policy: str | None, image_size: int | tuple[int, int] | None
) -> Network:
    """Find the source by the name's prefix; names without one are hub ids or folders of transformers."""
    prefix, colon, rest = name.partition(":")
    source, rest = (prefix, rest) if colon and prefix in SOURCES else ("transformers", name)
    module = import_module(f"brainenc.extract.backbones.{source}")
    network: Network = module.load(rest, slug=slug, size_policy=size_policy, image_size=image_size)
    return network
