"""The backbones that people name today, with the numbers that the published encoder computes.

| preset                     | backbone, feature                        | input                                    |
|----------------------------|------------------------------------------|------------------------------------------|
| dinov2_q, dinov2_q_cls     | facebook/dinov2-base, q of last block    | native size, zero-padded to the patch    |
| dinov2, dinov2_cls         | facebook/dinov2-base, after final norm   | the same                                 |
| clip, clip_cls             | open_clip ViT-L-14/openai, projected     | squashed to 224, **ImageNet** statistics |
| resnet50, resnet18, _cls   | torchvision, layer4 (_cls: its mean)     | native size                              |

All of them normalise with the ImageNet statistics, CLIP too: that is what was published, not what CLIP was trained
with. ``open_clip:ViT-L-14/openai`` is the right one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from brainenc.errors import UnknownName, UsageError

if TYPE_CHECKING:  # torch: names of presets are asked for where none is loaded
    from brainenc.extract.network import Network
    from brainenc.extract.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One published choice of backbone, feature and preprocessing."""

    name: str
    backbone: str
    """What it is loaded from; another of the same kind can be put in its place: ``dinov2_q@FOLDER``."""
    feature: str
    """What to hand to ``parse_features``."""
    slug: str | None
    """What its collections are filed under; None: after the backbone."""
    warning: str | None = None
    """What a person should know before using it."""

    def apply(self, network: Network) -> Network:
        """The network with this preset's preprocessing."""
        preprocessing = _preprocessing(self.name, network)
        return dataclasses.replace(network, preprocessing=preprocessing)


_CLIP_WARNING = (
    "The preset `clip` keeps the published preprocessing: ImageNet statistics and a squash to 224, which CLIP was not "
    "trained with. `--backbone open_clip:ViT-L-14/openai --feature proj.token` is the right one."
)


def _pair(name: str, backbone: str, features: tuple[str, str], slug: str | None, warning: str | None) -> list[Preset]:
    names = (name, f"{name}_cls")
    return [
        Preset(name=n, backbone=backbone, feature=f, slug=slug, warning=warning)
        for n, f in zip(names, features, strict=True)
    ]


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        *_pair("dinov2_q", "facebook/dinov2-base", ("-1.q", "-1.q_cls"), None, None),
        *_pair("dinov2", "facebook/dinov2-base", ("norm.token", "norm.cls"), None, None),
        *_pair("clip", "open_clip:ViT-L-14/openai", ("proj.token", "proj.cls"), "clip", _CLIP_WARNING),
        *_pair("resnet50", "torchvision:resnet50", ("layer4.token", "layer4.pool"), "resnet50", None),
        *_pair("resnet18", "torchvision:resnet18", ("layer4.token", "layer4.pool"), "resnet18", None),
    )
}


def find_preset(name: str) -> Preset:
    """The preset of this name; ``NAME@BACKBONE`` puts another backbone under it.

    Raises:
        UnknownName: there is none, with those that there are.
    """
    bare, at, backbone = name.partition("@")
    if bare not in PRESETS:
        raise UnknownName("preset", bare, list(PRESETS))
    preset = PRESETS[bare]
    return dataclasses.replace(preset, backbone=backbone) if at else preset


def names_preset(name: str) -> bool:
    """Whether a backbone string is a preset's name, or one with another backbone under it."""
    return name.partition("@")[0] in PRESETS


def _preprocessing(name: str, network: Network) -> Preprocessing:
    from brainenc.extract.preprocess import IMAGENET, Preprocessing

    mean, std = IMAGENET
    if name.startswith("clip"):
        # Image.resize without an argument, as published, is bicubic.
        return Preprocessing(policy="resize", mean=mean, std=std, resample="bicubic", size=network.nominal)
    if name.startswith("dinov2") and network.patch == 1:
        raise UsageError(f"The preset {name} pads to the patch, but {network.name} has no patches.")
    return Preprocessing(policy="pad", mean=mean, std=std, multiple=network.patch)
