"""What there is to know about a backbone without running it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from brainenc.extract.features import Layers


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneInfo:
    """A backbone on paper: names, sizes, preprocessing. Pickles."""

    slug: str
    source: str
    """``transformers``, ``open_clip``, ``timm`` or ``torchvision``."""
    name: str
    weights_hash: str
    n_layers: int
    facets: tuple[str, ...]
    """Every facet that some layer has."""
    n_prefix: int
    """Tokens before the patches: class token, registers."""
    n_registers: int
    width: int
    """Features of a token of the last layer."""
    patch: int
    """Edge of a patch in pixels; 1 where rows are no patches."""
    preprocessing: dict[str, Any]
    preprocessing_text: str
    config: dict[str, Any]
    """What makes the architecture."""
    compute: str = "float32"
    """Arithmetic: ``float32``, or ``bfloat16``/``float16`` by autocast."""
    blocks: tuple[str, ...] = ()
    """Dotted module name of each numbered layer."""
    stations: tuple[str, ...] = ()
    """``norm`` and ``proj``, where there are such."""
    layer_facets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Number, station or dotted module name -> facets."""

    def grid(self, input_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an input (not image) of this height and width."""
        return input_size[0] // self.patch, input_size[1] // self.patch

    @property
    def numbered(self) -> bool:
        """Whether layers go by number (transformers) or by their modules' names (convolutional networks)."""
        return "0" in self.layer_facets

    def layers(self) -> Layers:
        """What feature names are resolved against."""
        others = {*self.stations, *self.blocks}
        named = [name for name in self.layer_facets if not name.isdecimal() and name not in others]
        return Layers(
            where=self.name,
            blocks=self.blocks,
            stations=self.stations,
            modules=(*self.blocks, *named),
            facets=lambda layer: self.layer_facets.get(layer, ()),
            numbered=self.numbered,
        )
