"""From a decoded image to the tensor that a backbone wants.

Three size policies:

- ``pad``: native size (or squashed to ``size`` first); after normalisation, zeros at the bottom and on the right up
  to the next multiple of the patch. What people do with DINOv2: 425 x 425 -> 434 x 434.
- ``resize``: squash to ``size``, whatever the aspect ratio.
- ``crop``: shortest edge to ``shortest``, keeping the aspect ratio, then the ``size`` in the centre.

Resampling is Pillow's (antialiased), on 8-bit RGB, as the models were trained; then ``(x / 255 - mean) / std`` in
float32.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from brainenc.errors import UnknownName, UsageError

MEANING = 1
"""Version of what the fields below mean. Raise it when the same fields begin to give other pixels."""

POLICIES = ("pad", "resize", "crop")

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How an RGB image becomes a float32 tensor (3, H, W). Part of the identity of what is stored."""

    policy: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: str = "bilinear"
    size: tuple[int, int] | None = None
    """Height and width after resizing or cropping; None only with ``pad``: native size."""
    shortest: int | None = None
    """For ``crop``: what the shortest edge becomes first."""
    multiple: int = 1
    """For ``pad``: height and width become multiples of this."""
    keep_aspect: bool = True
    """For ``crop``: False squashes to ``shortest`` x ``shortest`` before the crop."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UnknownName("size policy", self.policy, POLICIES)
        if self.resample not in _RESAMPLING:
            raise UnknownName("resampling", self.resample, list(_RESAMPLING))
        if self.policy != "pad" and self.size is None:
            raise UsageError(f"The size policy {self.policy!r} needs an image size.")

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> float32 (3, H, W), H and W as :meth:`output_shape` says."""
        fitted = self._fit(image)
        return self._normalise(fitted, self._padded(fitted.height, fitted.width))

    def output_shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the tensor made from an image of this height and width."""
        if self.policy != "pad":
            assert self.size is not None  # __post_init__
            return self.size
        return self._padded(*(self.size or (height, width)))

    def describe(self) -> dict[str, Any]:
        """Every field that plays a part, JSON-able, with the version of their meaning.

        What plays none (resampling at native size) is left out: it would tell apart what is the same.
        """
        parts = {"pad": ("size", "multiple"), "resize": ("size",), "crop": ("size", "shortest", "keep_aspect")}
        resampled = ("resample",) if self.size is not None else ()
        fields = dataclasses.asdict(self)
        named = {name: fields[name] for name in ("policy", "mean", "std", *parts[self.policy], *resampled)}
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in named.items()}
        return {"version": MEANING, **listed}

    def sentence(self) -> str:
        """The same for people."""
        return f"{self._fitting()}; (x / 255 - {_numbers(self.mean)}) / {_numbers(self.std)}"

    def with_policy(self, policy: str | None, image_size: int | tuple[int, int] | None, patch: int) -> Preprocessing:
        """The same normalisation with another size policy or image size.

        Raises:
            UsageError: the size is no multiple of the patch and the policy does not pad.
        """
        policy = policy or self.policy
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if policy == "pad":
            changed = dataclasses.replace(self, policy="pad", size=size, shortest=None, multiple=patch)
        else:
            size = size or self.size or (224, 224)
            ratio = self.shortest / min(self.size) if self.shortest and self.size else 256 / 224
            shortest = round(min(size) * ratio) if policy == "crop" else None
            changed = dataclasses.replace(self, policy=policy, size=size, shortest=shortest, multiple=1)
        height, width = changed.output_shape(*(size or (patch, patch)))
        if height % patch or width % patch:
            near = patch * max(1, round(height / patch))
            raise UsageError(
                f"An image size of {height} x {width} is no multiple of the model's patch of {patch}: "
                f"take {near}, or the size policy `pad`."
            )
        return changed

    def _fit(self, image: Image.Image) -> Image.Image:
        how = _RESAMPLING[self.resample]
        if self.policy == "crop":
            assert self.size is not None  # __post_init__
            return _centre(self._shrink(image, how), *self.size)
        if self.size is None or (image.height, image.width) == self.size:
            return image
        return image.resize((self.size[1], self.size[0]), how)

    def _shrink(self, image: Image.Image, how: Image.Resampling) -> Image.Image:
        if self.shortest is None:
            return image
        if not self.keep_aspect:
            return image.resize((self.shortest, self.shortest), how)
        # Torchvision's arithmetic, which every published evaluation used: the long edge is cut, not rounded.
        short, long = sorted(image.size)
        edges = (self.shortest, int(self.shortest * long / short))
        width, height = edges if image.width <= image.height else edges[::-1]
        return image if image.size == (width, height) else image.resize((width, height), how)

    def _normalise(self, image: Image.Image, shape: tuple[int, int]) -> torch.Tensor:
        """Into the top left of zeros, in place: one write of the pixels instead of four, which is most of the time."""
        canvas = torch.zeros(3, *shape)
        pixels = canvas[:, : image.height, : image.width]
        for plane, band in zip(pixels, image.split(), strict=True):
            plane.copy_(torch.from_numpy(np.array(band)))
        mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (self.mean, self.std))
        pixels.div_(255).sub_(mean).div_(std)
        return canvas

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        multiple = self.multiple if self.policy == "pad" else 1
        return _up(height, multiple), _up(width, multiple)

    def _fitting(self) -> str:
        at = f"{self.size[0]} x {self.size[1]}" if self.size else "native size"
        if self.policy == "pad":
            before = f"squash to {at} ({self.resample})" if self.size else at
            after = f", zero-padded at bottom and right to multiples of {self.multiple} after normalisation"
            return before + (after if self.multiple > 1 else ", as it is")
        if self.policy == "resize":
            return f"squash to {at} ({self.resample})"
        if self.shortest is None:
            return f"crop {at} in the centre"
        first = f"shortest edge to {self.shortest}" if self.keep_aspect else f"squash to {self.shortest} square"
        return f"{first} ({self.resample}), crop {at} in the centre"


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _centre(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle; a smaller image gets black borders, as torchvision's CenterCrop gives it."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:g}" for v in values) + ")"
