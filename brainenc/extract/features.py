"""What can be taken from a backbone: a layer, and a facet of it, written ``11.q``.

The facet follows the last dot. Layers are blocks by 0-based number (``11``, ``-1``, ``8-11``, ``0,5,11``,
``1?``), the named stations ``norm`` and ``proj``, or modules by dotted name (``encoder.layer.3.mlp``,
``blocks.[02468]``, where a glob never crosses a dot).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from brainenc.errors import UnknownName, UsageError

FACETS = ("token", "cls", "registers", "q", "k", "v", "q_cls", "k_cls", "v_cls", "pool")
"""Every facet there is, in the order in which they are listed."""

ALIASES = {"query": "q", "key": "k", "value": "v", "tokens": "token"}
"""What other tools call them."""

_TOWERS = ("visual.", "vision_model.", "model.")
_BLOCK_LISTS = ("layer", "layers", "blocks", "resblocks", "block")
_RANGE = re.compile(r"(-?\d+)-(-?\d+)")
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True, order=True, slots=True)
class Feature:
    """One facet of one layer, resolved: ``Feature("11", "q")``, printed as ``11.q``."""

    layer: str
    """Number of a block, ``norm``, ``proj``, or the dotted name of a module."""
    facet: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.facet}"

    @classmethod
    def parse(cls, text: str) -> Feature:
        """``"11.q"`` -> ``Feature("11", "q")``; for resolved names, as they stand in a store's keys.

        Raises:
            UsageError: there is no facet in it.
        """
        layer, facet = _split(text)
        return cls(layer, facet)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """What a backbone has, as far as names go."""

    where: str
    """The backbone, for messages."""
    blocks: tuple[str, ...]
    """Dotted module name of each block; its position is its number."""
    stations: tuple[str, ...]
    """``norm``, ``proj``: layers that are neither blocks nor modules."""
    modules: tuple[str, ...]
    """Dotted names of all modules whose output can be taken."""
    facets: Callable[[str], Sequence[str]]
    """Resolved layer -> its facets."""
    numbered: bool = True
    """Blocks go by number in resolved names; those of convolutional networks go by their module's name (``layer4``)."""

    def label(self, number: int) -> str:
        """The resolved name of a block."""
        return str(number) if self.numbered else self.blocks[number]


def resolve_features(texts: Iterable[str], layers: Layers) -> list[Feature]:
    """Resolve what a user typed into features, each once, in the order asked for.

    Raises:
        UnknownName: a layer or facet that the backbone does not have.
        UsageError: not of the form ``LAYER.FACET``.
    """
    found: dict[Feature, None] = {}
    for text in texts:
        pattern, facet = _split(text)
        for layer in _resolve_layers(pattern, layers):
            there = layers.facets(layer)
            if facet not in there:
                raise UnknownName("facet", facet, there, f"layer {layer} of {layers.where}")
            found[Feature(layer, facet)] = None
    return list(found)


def _split(text: str) -> tuple[str, str]:
    layer, dot, facet = text.strip().rpartition(".")
    if not dot or not layer:
        raise UsageError(f"{text!r} names no feature: write LAYER.FACET, for example 11.q, -1.token or 8-11.k.")
    facet = ALIASES.get(facet, facet)
    if facet not in FACETS:
        raise UnknownName("facet", facet, FACETS, f"{text!r} (the facet follows the last dot, as in 11.q)")
    return layer, facet


def _resolve_layers(pattern: str, layers: Layers) -> list[str]:
    """One text may hold a list: ``0,5,8-11``."""
    return [name for part in pattern.split(",") for name in _resolve_layer(part.strip(), layers)]


def _resolve_layer(part: str, layers: Layers) -> list[str]:
    if _NUMBER.fullmatch(part):
        return [layers.label(_number(int(part), layers))]
    if span := _RANGE.fullmatch(part):
        first, last = (_number(int(end), layers) for end in span.groups())
        if first > last:
            raise UsageError(f"{part!r} is an empty range of layers: the first is after the last.")
        return [layers.label(n) for n in range(first, last + 1)]
    if part in layers.stations:
        return [part]
    labels = {name: layers.label(n) for n, name in enumerate(layers.blocks)}
    for spelling in (part, *(part.removeprefix(tower) for tower in _TOWERS if part.startswith(tower))):
        if spelling in layers.modules:
            return [labels.get(spelling, spelling)]
        if names := _glob(spelling, layers):
            return [labels.get(name, name) for name in names]
    if names := _block_by_another_name(part, layers):
        return names
    raise UnknownName("layer", part, _choices(part, layers), layers.where)


def _block_by_another_name(part: str, layers: Layers) -> list[str]:
    """``blocks.11`` and ``encoder.layer.11`` are block 11, whatever this library's version calls its list of blocks."""
    head, _, tail = part.rpartition(".")
    if not layers.numbered or head.rpartition(".")[2] not in _BLOCK_LISTS:
        return []
    return [layers.label(n) for n in range(len(layers.blocks)) if fnmatchcase(str(n), tail)]


def _number(number: int, layers: Layers) -> int:
    count = len(layers.blocks)
    if not -count <= number < count:
        raise UnknownName("layer", str(number), _choices("", layers), layers.where)
    return number % count


def _glob(pattern: str, layers: Layers) -> list[str]:
    if not any(sign in pattern for sign in "*?["):
        return []
    if "." not in pattern:  # of numbers: "*" is every block, "1?" are 10 to 19
        numbers = [n for n in range(len(layers.blocks)) if fnmatchcase(str(n), pattern)]
        if numbers:
            return [layers.label(n) for n in numbers]
    parts = pattern.split(".")
    return [
        name
        for name in layers.modules
        if len(split := name.split(".")) == len(parts) and all(map(fnmatchcase, split, parts))
    ]


def _choices(wanted: str, layers: Layers) -> list[str]:
    """Numbers, stations, and the module names that look most like what was asked for (all are by show-model)."""
    count = len(layers.blocks)
    numbers = [f"0 to {count - 1} (or -{count} to -1)"] if count > 1 else ["0 (or -1)"] * count
    close = difflib.get_close_matches(wanted, layers.modules, n=6, cutoff=0.5) if wanted else []
    modules = close or [name for name in layers.modules if "." not in name]
    return [*numbers, *layers.stations, *modules]
