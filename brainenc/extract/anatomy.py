"""Which features a network has, where in a forward pass each comes from, and what shape its rows have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from brainenc.errors import UsageError
from brainenc.extract import facets
from brainenc.extract.features import FACETS, Feature
from brainenc.extract.network import Network, Sighting, look

ATTENTION = ("q", "k", "v", "q_cls", "k_cls", "v_cls")
Rows = tuple[tuple[int, ...], tuple[int, int] | None]
"""Shape of one image's row, and the grid that its tokens make, if they do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """Where one layer's numbers come from."""

    kind: str
    """``output`` of a module, ``attention`` of a block, or ``result`` of the whole."""
    module: str = ""
    call: int = 1
    """Which call of the module; those that are called several times give their last output."""
    through: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
    """What is applied to the output first: final norm, projection."""
    own: bool = False
    """Later modules may write into the output in place."""


class Anatomy:
    """A network as one look at it shows it.

    Raises:
        UsageError: it does not take images of its size.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.seen = _first_look(network)
        self.order = _order(network, self.seen)
        self.layer_facets = _layer_facets(network, self.seen, self.order)
        self.stations = tuple(name for name in ("norm", "proj") if name in self.layer_facets)
        self._rows: dict[tuple[Feature, int, int], Rows] = {}

    @property
    def width(self) -> int:
        """Features of a token of the last layer."""
        if not self.network.blocks:
            return (self.seen.pooled or (0,))[-1]
        last = self.seen.outputs[self.network.blocks[-1]][-1]
        blank = torch.empty(last, device="meta")
        return facets.as_rows(blank, self._aspect(*self.network.nominal)).shape[-1]

    def taps(self, features: Sequence[Feature]) -> dict[Tap, list[Feature]]:
        """The places to listen at, each with the features that come from it."""
        taps: dict[Tap, list[Feature]] = {}
        for feature in dict.fromkeys(features):
            taps.setdefault(self.tap(feature), []).append(feature)
        return taps

    def tap(self, feature: Feature) -> Tap:
        """Where a feature that there is comes from."""
        network, layer = self.network, feature.layer
        if layer in self.stations:
            return Tap(kind="result") if feature.facet == "pool" else self._station(layer)
        if feature.facet in ATTENTION:
            return Tap(kind="attention", module=network.blocks[int(layer)])
        name = network.blocks[int(layer)] if layer.isdecimal() else layer
        # What leaves the block of a transformer is read by the next one only; other modules' outputs may be written
        # into (residual networks add and rectify in place).
        return Tap(kind="output", module=name, call=len(self.seen.outputs[name]), own=not layer.isdecimal())

    def rows(self, feature: Feature, height: int, width: int) -> Rows:
        """Shape and grid of a feature's rows for inputs of this height and width."""
        key = (feature, height, width)
        if key not in self._rows:
            self._rows[key] = self._look_up(feature, height, width)
        return self._rows[key]

    def _station(self, station: str) -> Tap:
        """After the final norm as the model calls it; where it norms only what it pools, we call it on all tokens."""
        network = self.network
        project = (network.project,) if station == "proj" and network.project is not None else ()
        last = network.blocks[-1]
        if network.norm is None:
            return Tap(kind="output", module=last, through=project)
        calls = self.seen.outputs.get(network.norm, [()])
        if len(calls[-1]) == 3:
            return Tap(kind="output", module=network.norm, call=len(calls), through=project)
        norm: nn.Module = network.model.get_submodule(network.norm)
        return Tap(kind="output", module=last, through=(norm, *project))

    def _look_up(self, feature: Feature, height: int, width: int) -> Rows:
        tap = self.tap(feature)
        if tap.kind == "result":
            return (self.seen.pooled or (0, 0))[1:], None
        seen = self._seen_at(tap, height, width)
        if tap.kind == "attention":
            n_heads, tokens, d = seen.attention[tap.module][0]
            whole = not feature.facet.endswith("_cls")
            return ((tokens, n_heads * d), self._grid(tokens, height, width)) if whole else ((n_heads * d,), None)
        shape = seen.outputs[tap.module][tap.call - 1]
        if self.network.project is not None and self.network.project in tap.through:
            shape = (*shape[:-1], (self.seen.pooled or (0, 0))[-1])
        aspect = self._aspect(height, width)
        rows = tuple(facets.take(feature.facet, torch.empty(shape, device="meta"), self.order, aspect).shape[1:])
        if feature.facet != "token" or len(shape) < 3:
            return rows, None
        return rows, facets.map_grid(shape, aspect) if len(shape) == 4 else self._grid(shape[1], height, width)

    def _seen_at(self, tap: Tap, height: int, width: int) -> Sighting:
        """Shapes at another input size: by arithmetic where rows are tokens, else by a pass of that size."""
        if (height, width) == self.network.nominal:
            return self.seen
        old = self._n_tokens(*self.network.nominal)
        shape = self.seen.outputs[tap.module][tap.call - 1]
        if self.network.patch > 1 and len(shape) == 3 and shape[1] == old:
            return _with_tokens(self.seen, tap.module, old, self._n_tokens(height, width))
        return look(self.network, height, width)

    def _n_tokens(self, height: int, width: int) -> int:
        rows, columns = height // self.network.patch, width // self.network.patch
        return self.order.n_prefix + rows * columns

    def _grid(self, tokens: int, height: int, width: int) -> tuple[int, int] | None:
        if self.network.patch > 1:
            grid = height // self.network.patch, width // self.network.patch
            return grid if tokens - self.order.n_prefix == grid[0] * grid[1] else None
        rows = round((tokens * height / width) ** 0.5)  # stages that give their map out flattened
        columns = tokens // max(rows, 1)
        alike = rows * columns == tokens and round(rows * width / height) == columns
        return (rows, columns) if alike else None

    @staticmethod
    def _aspect(height: int, width: int) -> float:
        return height / width


def _first_look(network: Network) -> Sighting:
    try:
        return look(network, *network.nominal)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        height, width = network.nominal
        raise UsageError(
            f"{network.name} does not take images of {height} x {width} ({error}): leave out the image size and the "
            "size policy, or choose others."
        ) from error


def _with_tokens(seen: Sighting, module: str, old: int, new: int) -> Sighting:
    """The same, with another number of tokens in one module."""
    outputs = [(shape[0], new, shape[2]) if shape[1] == old else shape for shape in seen.outputs[module]]
    attention = [(heads, new, d) for heads, _, d in seen.attention.get(module, [])]
    return Sighting(outputs={module: outputs}, attention={module: attention}, pooled=seen.pooled)


def _order(network: Network, seen: Sighting) -> facets.Order:
    prefix = network.n_cls + network.n_registers
    if network.blocks and network.patch > 1:
        shape = seen.outputs.get(network.blocks[-1], [()])[-1]
        patches = (network.nominal[0] // network.patch) * (network.nominal[1] // network.patch)
        if len(shape) == 3 and shape[1] >= patches:
            prefix = shape[1] - patches
    if prefix < network.n_cls + network.n_registers:  # a class token that joins in later blocks only
        return facets.Order(n_cls=0, n_registers=0, n_prefix=prefix)
    return facets.Order(n_cls=network.n_cls, n_registers=network.n_registers, n_prefix=prefix)


def _layer_facets(network: Network, seen: Sighting, order: facets.Order) -> dict[str, tuple[str, ...]]:
    tokens = _n_tokens(network, seen)
    found: dict[str, set[str]] = {}
    for number, name in enumerate(network.blocks):
        if name in seen.outputs:
            attends = _attends(seen.attention.get(name, []), tokens, order)
            label = str(number) if tokens is not None else name
            found[label] = _of_output(seen.outputs[name][-1], tokens, order) | attends
    if network.blocks:
        found |= _of_stations(network, seen, tokens, order)
    for name, shapes in seen.outputs.items():
        if name not in network.blocks:
            found[name] = _of_output(shapes[-1], tokens, order)
    return {name: tuple(f for f in FACETS if f in offered) for name, offered in found.items() if offered}


def _of_stations(network: Network, seen: Sighting, tokens: int | None, order: facets.Order) -> dict[str, set[str]]:
    as_called = seen.outputs.get(network.norm or "", [()])[-1]
    shape = as_called if len(as_called) == 3 else seen.outputs[network.blocks[-1]][-1]
    normed = _of_output(shape, tokens, order) - {"pool"} if network.norm is not None and len(shape) == 3 else set()
    pool = {"pool"} if network.pools and seen.pooled is not None else set()
    if network.project is None:
        return {"norm": normed | pool}
    return {"norm": normed, "proj": normed | pool}


def _n_tokens(network: Network, seen: Sighting) -> int | None:
    shape = seen.outputs.get(network.blocks[-1], [()])[-1] if network.blocks else ()
    return shape[1] if len(shape) == 3 else None


def _of_output(shape: tuple[int, ...], tokens: int | None, order: facets.Order) -> set[str]:
    if len(shape) not in (2, 3, 4):
        return set()
    found = {"token"}
    if len(shape) == 4 or (len(shape) == 3 and (shape[1] == tokens or order.n_prefix == 0)):
        found.add("pool")
    if len(shape) == 3 and shape[1] == tokens:
        found |= ({"cls"} if order.n_cls else set()) | ({"registers"} if order.n_registers else set())
    return found


def _attends(kernels: list[tuple[int, int, int]], tokens: int | None, order: facets.Order) -> set[str]:
    """q, k, v where the block has one attention, over all tokens; windows and several kernels have no such rows."""
    if len(kernels) != 1 or kernels[0][1] != tokens:
        return set()
    return {facet for facet in ATTENTION if order.n_cls or not facet.endswith("_cls")}
