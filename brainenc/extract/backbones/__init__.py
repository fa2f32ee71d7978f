"""Where backbones come from. Each module has ``load(name, ...) -> Network``; libraries are imported when needed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from brainenc.errors import UsageError
from brainenc.extract.backbones.hub import cache_only_if_unreachable
from brainenc.extract.network import Network
from brainenc.extract.presets import find_preset, names_preset

SOURCES = ("transformers", "open_clip", "timm", "torchvision")


def load_network(
    name: str, *, slug: str | None, size_policy: str | None, image_size: int | tuple[int, int] | None
) -> Network:
    """Find the source by the name's prefix; names without one are presets, or hub ids or folders of transformers.

    Raises:
        UnknownName: no such backbone, or not without a network.
        UsageError: the parts do not go together.
    """
    if names_preset(name) and not Path(name).is_dir():
        return _load_preset(name, slug, size_policy, image_size)
    prefix, colon, rest = name.partition(":")
    source, rest = (prefix, rest) if colon and prefix in SOURCES else _by_folder(name)
    module = import_module(f"brainenc.extract.backbones.{source}")
    with cache_only_if_unreachable():
        network: Network = module.load(rest, slug=slug, size_policy=size_policy, image_size=image_size)
    return network


def _by_folder(name: str) -> tuple[str, str]:
    """A folder says which library saved it; anything else is a hub id of transformers."""
    folder = Path(name)
    if (folder / "open_clip_config.json").is_file() and not (folder / "config.json").is_file():
        return "open_clip", f"local-dir:{name}"
    return "transformers", name


def _load_preset(
    name: str, slug: str | None, size_policy: str | None, image_size: int | tuple[int, int] | None
) -> Network:
    preset = find_preset(name)
    if size_policy or image_size:
        raise UsageError(
            f"The preset {preset.name} fixes how images are sized. For another size take the backbone itself: "
            f"--backbone {preset.backbone} --feature={preset.feature}."
        )
    plain = load_network(preset.backbone, slug=slug or preset.slug, size_policy=None, image_size=None)
    return preset.apply(plain)
