"""A frozen vision network: what it is, how images become its input, and any of its features in one forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import nn

from brainenc.errors import UnknownName, UsageError
from brainenc.extract import facets
from brainenc.extract.capture import Enough, Heads, Watch, watching
from brainenc.extract.features import FACETS, Feature, Layers, resolve_features
from brainenc.extract.network import Network, Sighting, look
from brainenc.extract.weights import hash_weights

__all__ = ["Backbone", "BackboneInfo", "Feature", "load_backbone", "parse_features"]

_ATTENTION = ("q", "k", "v", "q_cls", "k_cls", "v_cls")
_COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneInfo:
    """What there is to know about a backbone without running it."""

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
    preprocessing: dict[str, Any]
    preprocessing_text: str
    config: dict[str, Any]
    compute: str = "float32"
    """Arithmetic: ``float32``, or ``bfloat16``/``float16`` by autocast."""
    blocks: tuple[str, ...] = ()
    """Dotted module name of each numbered layer."""
    stations: tuple[str, ...] = ()
    layer_facets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Number, station or dotted module name -> facets."""

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an input (not image) of this height and width."""
        return image_size[0] // self.patch, image_size[1] // self.patch

    @property
    def numbered(self) -> bool:
        """Whether layers go by number (transformers) or by their modules' names (convolutional networks)."""
        return "0" in self.layer_facets

    def layers(self) -> Layers:
        """What :func:`parse_features` resolves names against."""
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


def parse_features(texts: Iterable[str], info: BackboneInfo) -> list[Feature]:
    """``["-1.q", "8-11.token", "norm.cls", "blocks.[02468].token"]`` -> resolved features, each once.

    Raises:
        UnknownName: a layer or facet that the backbone does not have, with those that it has.
        UsageError: not of the form ``LAYER.FACET``.
    """
    return resolve_features(texts, info.layers())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tap:
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


class Backbone:
    """A frozen network on one device.

    Not thread-safe: one forward pass at a time.
    """

    def __init__(self, network: Network, *, weights_hash: str | None = None) -> None:
        network.model.eval().requires_grad_(False)
        self.network = network
        self._sighting = look(network, *network.nominal)
        self._order = _order(network, self._sighting)
        self._compute = "float32"
        self._weights_hash = weights_hash or hash_weights(network.model.state_dict(), without=network.without)
        self._layer_facets = _layer_facets(network, self._sighting, self._order)
        self._shapes: dict[tuple[Feature, int, int], tuple[tuple[int, ...], tuple[int, int] | None]] = {}
        self.device = next(network.model.parameters()).device
        self.info = self._describe()

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> float32 (3, H, W), on the CPU; safe to call from several threads."""
        return self.network.preprocessing(image)

    def input_shape(self, image_shape: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the model's input made from an image of this height and width."""
        return self.network.preprocessing.output_shape(*image_shape)

    def row_shape(self, feature: Feature, image_shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of one image's row, for images of this height and width (before preprocessing)."""
        return self._shape(feature, image_shape)[0]

    def details(self, feature: Feature, image_shape: tuple[int, int]) -> dict[str, Any]:
        """``n_prefix`` and ``grid`` of the rows, for the collection's manifest; grid is None where rows are no map."""
        rows, grid = self._shape(feature, image_shape)
        prefix = rows[0] - grid[0] * grid[1] if grid is not None else 0
        return {"n_prefix": prefix, "grid": list(grid) if grid is not None else None}

    def identity(self, feature: Feature) -> dict[str, Any]:
        """What makes two rows of this feature comparable; JSON-able, no paths, no library versions."""
        return {
            "weights": self._weights_hash,
            "backbone": {"source": self.network.source, **self.network.config},
            "layer": feature.layer,
            "facet": feature.facet,
            "facets_version": facets.MEANING,
            "preprocessing": self.network.preprocessing.describe(),
            "compute": self._compute,
        }

    def to(self, device: str | torch.device, dtype: str | torch.dtype = "float32") -> Backbone:
        """Move to a device, and choose the arithmetic; once, before the first forward pass.

        Args:
            device: ``"cpu"``, ``"cuda"`` ...
            dtype: ``float32``, or ``bfloat16`` / ``float16``: autocast, in which matrix products run in that type and
                norms and softmax where PyTorch says. The weights of matrix products are converted once, here.

        Raises:
            UsageError: arithmetic that there is not, or a second change of it.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in _COMPUTE:
            raise UnknownName("compute dtype", name, list(_COMPUTE))
        if self._compute not in (name, "float32"):
            raise UsageError(f"The weights are in {self._compute} already; load the backbone again for {name}.")
        self.network.model.to(device)
        self.device = torch.device(device)
        if name != self._compute:
            _convert_products(self.network.model, _COMPUTE[name])
            self._compute = name
            self.info = self._describe()
        return self

    @torch.no_grad()  # not inference_mode: what comes out may be trained on
    def forward(
        self, batch: torch.Tensor, features: Sequence[Feature], *, dtype: torch.dtype | None = None
    ) -> dict[Feature, torch.Tensor]:
        """Every feature asked for, from one forward pass that ends at the last block needed.

        Args:
            batch: float32 (B, 3, H, W), preprocessed, on any device.
            features: resolved by :func:`parse_features`.
            dtype: of the results, converted as each layer passes, so that what waits is already small; None leaves
                the model's own. Values too large for it become infinite: the reader of the results must look.

        Returns:
            feature -> (B, *row_shape), on the backbone's device.
        """
        batch = batch.to(self.device, non_blocking=True)
        aspect = batch.shape[2] / batch.shape[3]
        pending = self._taps(features)
        results: dict[Feature, torch.Tensor] = {}
        calls: dict[str, int] = {}

        def finish(tap: _Tap, wanted: list[Feature], source: Callable[[str], torch.Tensor]) -> None:
            for feature in wanted:
                results[feature] = facets.keep(source(feature.facet), dtype, own=tap.own)
            del pending[tap]
            if not pending:
                raise Enough

        def on_output(module: str, output: torch.Tensor) -> None:
            calls[module] = calls.get(module, 0) + 1
            for tap in [t for t in pending if (t.kind, t.module, t.call) == ("output", module, calls[module])]:
                tokens = functools.reduce(lambda x, step: step(x), tap.through, output)
                finish(tap, pending[tap], functools.partial(self._take, tokens, aspect))

        def on_attention(block: str, heads: Heads) -> None:
            tap = _Tap(kind="attention", module=block)
            finish(tap, pending[tap], lambda facet: facets.take_attention(facet, heads, self._order))

        watch = Watch(
            outputs={t.module: functools.partial(on_output, t.module) for t in pending if t.kind == "output"},
            attention={t.module: functools.partial(on_attention, t.module) for t in pending if t.kind == "attention"},
        )
        if not pending:
            return results
        with contextlib.suppress(Enough), watching(self.network.model, watch), self._arithmetic():
            pooled = self.network.run(batch)
            result = _Tap(kind="result")
            if result in pending and pooled is not None:
                finish(result, pending[result], lambda _facet: pooled)
        return {feature: results[feature] for feature in features}

    def _take(self, tokens: torch.Tensor, aspect: float, facet: str) -> torch.Tensor:
        return facets.take(facet, tokens, self._order, aspect)

    def _taps(self, features: Sequence[Feature]) -> dict[_Tap, list[Feature]]:
        taps: dict[_Tap, list[Feature]] = {}
        for feature in dict.fromkeys(features):
            if feature.facet not in self._layer_facets.get(feature.layer, ()):
                parse_features([str(feature)], self.info)  # raises with what there is
            taps.setdefault(self._tap(feature), []).append(feature)
        return taps

    def _tap(self, feature: Feature) -> _Tap:
        network, layer = self.network, feature.layer
        if layer in self.info.stations:
            if feature.facet == "pool":
                return _Tap(kind="result")
            return self._station_tap(layer)
        if feature.facet in _ATTENTION:
            return _Tap(kind="attention", module=network.blocks[int(layer)])
        if layer.isdecimal():
            name = network.blocks[int(layer)]
            return _Tap(kind="output", module=name, call=len(self._sighting.outputs[name]), own=network.patch == 1)
        return _Tap(kind="output", module=layer, call=len(self._sighting.outputs[layer]), own=True)

    def _station_tap(self, station: str) -> _Tap:
        """After the final norm as the model calls it; where it norms only what it pools, as we call it on all tokens."""
        network = self.network
        project = (network.project,) if station == "proj" and network.project is not None else ()
        last = network.blocks[-1]
        if network.norm is None:
            return _Tap(kind="output", module=last, through=project)
        if self._sighting.outputs.get(network.norm) == self._sighting.outputs[last]:
            return _Tap(kind="output", module=network.norm, through=project)
        norm: nn.Module = network.model.get_submodule(network.norm)
        return _Tap(kind="output", module=last, through=(norm, *project))

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        if self._compute == "float32":
            yield
            return
        with torch.autocast(self.device.type, dtype=_COMPUTE[self._compute]):
            yield

    def _shape(self, feature: Feature, image_shape: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, int] | None]:
        height, width = self.input_shape(image_shape)
        key = (feature, height, width)
        if key not in self._shapes:
            self._shapes[key] = self._look_up_shape(feature, height, width)
        return self._shapes[key]

    def _look_up_shape(
        self, feature: Feature, height: int, width: int
    ) -> tuple[tuple[int, ...], tuple[int, int] | None]:
        with self._arithmetic():
            seen = look(self.network, height, width)
        tap = self._taps([feature]).popitem()[0]
        if tap.kind == "result":
            assert seen.pooled is not None  # else the facet would not be on offer
            return seen.pooled[1:], None
        tokens_grid = self.info.grid((height, width))
        if tap.kind == "attention":
            n_heads, tokens, d = seen.attention[tap.module][0]
            if feature.facet.endswith("_cls"):
                return (n_heads * d,), None
            return (tokens, n_heads * d), self._token_grid(tokens, tokens_grid)
        shape = seen.outputs[tap.module][tap.call - 1]
        blank: torch.Tensor = torch.empty(shape, device="meta")
        if len(tap.through) and self.network.project in tap.through:
            blank = torch.empty((*shape[:-1], self._project_width()), device="meta")
        rows = tuple(facets.take(feature.facet, blank, self._order, height / width).shape[1:])
        if feature.facet != "token" or len(shape) < 3:
            return rows, None
        if len(shape) == 4:
            return rows, facets.map_grid(shape, height / width)
        return rows, self._token_grid(shape[1], tokens_grid)

    def _token_grid(self, tokens: int, grid: tuple[int, int]) -> tuple[int, int] | None:
        if self.network.patch > 1:
            return grid if tokens - self._order.n_prefix == grid[0] * grid[1] else None
        rows = round((tokens * grid[0] / grid[1]) ** 0.5)  # stages that give their map out flattened
        columns = tokens // max(rows, 1)
        alike = rows * columns == tokens and round(rows * grid[1] / grid[0]) == columns
        return (rows, columns) if alike else None

    def _project_width(self) -> int:
        assert self._sighting.pooled is not None  # what has a projection pools with it
        return self._sighting.pooled[-1]

    def _describe(self) -> BackboneInfo:
        network = self.network
        offered = {facet for listed in self._layer_facets.values() for facet in listed}
        last = self._sighting.outputs[network.blocks[-1]][-1] if network.blocks else (self._sighting.pooled or (0,))
        width = last[1] if len(last) == 4 and not facets.channels_last(last, 1.0) else last[-1]
        return BackboneInfo(
            slug=network.slug,
            source=network.source,
            name=network.name,
            weights_hash=self._weights_hash,
            n_layers=len(network.blocks),
            facets=tuple(facet for facet in FACETS if facet in offered),
            n_prefix=self._order.n_prefix,
            n_registers=self._order.n_registers,
            width=width,
            patch=network.patch,
            preprocessing=network.preprocessing.describe(),
            preprocessing_text=network.preprocessing.sentence(),
            config=dict(network.config),
            compute=self._compute,
            blocks=network.blocks,
            stations=tuple(name for name in ("norm", "proj") if name in self._layer_facets),
            layer_facets=self._layer_facets,
        )


def load_backbone(
    name: str,
    *,
    slug: str | None = None,
    size_policy: str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Backbone:
    """Load a backbone by string, on the CPU in float32.

    Args:
        name: ``facebook/dinov2-base`` (a hub id) or a folder made by ``save_pretrained``: transformers;
            ``open_clip:ViT-L-14/openai`` or ``open_clip:ViT-L-14/path/to/checkpoint.pt``; ``timm:NAME`` or
            ``timm:NAME/path``; ``torchvision:resnet50`` or ``torchvision:resnet50/path``; or a preset's name.
        slug: what its collections are filed under; by default the last part of the name.
        size_policy: ``pad``, ``resize`` or ``crop``; by default what the model was made for.
        image_size: edge of the (square) input, or (height, width).

    Raises:
        UnknownName: no such model, weights or preset, or no network to fetch them.
        UsageError: the parts do not go together.
    """
    from brainenc.extract.backbones import load_network

    return Backbone(load_network(name, slug=slug, size_policy=size_policy, image_size=image_size))


def _order(network: Network, seen: Sighting) -> facets.Order:
    prefix = network.n_cls + network.n_registers
    if network.blocks and network.patch > 1:
        shape = seen.outputs.get(network.blocks[-1], [()])[-1]
        grid = (network.nominal[0] // network.patch) * (network.nominal[1] // network.patch)
        if len(shape) == 3 and shape[1] >= grid:
            prefix = shape[1] - grid
    if prefix < network.n_cls + network.n_registers:  # a class token that joins in later blocks only
        return facets.Order(n_cls=0, n_registers=0, n_prefix=prefix)
    return facets.Order(n_cls=network.n_cls, n_registers=network.n_registers, n_prefix=prefix)


def _layer_facets(network: Network, seen: Sighting, order: facets.Order) -> dict[str, tuple[str, ...]]:
    tokens = _n_tokens(network, seen)
    found: dict[str, tuple[str, ...]] = {}
    for number, name in enumerate(network.blocks):
        if name in seen.outputs:
            attends = _attends(seen.attention.get(name, []), tokens, order)
            found[str(number) if tokens is not None else name] = _listed(
                _output_facets(seen.outputs[name][-1], tokens, order) | attends
            )
    if network.blocks and (network.norm is not None or network.pools):
        normed = (
            _output_facets(seen.outputs[network.blocks[-1]][-1], tokens, order) - {"pool"} if network.norm else set()
        )
        pool = {"pool"} if network.pools and seen.pooled is not None else set()
        found["norm"] = _listed(normed | (pool if network.project is None else set()))
        if network.project is not None:
            found["proj"] = _listed(normed | pool)
    for name, shapes in seen.outputs.items():
        if name not in network.blocks:
            found[name] = _listed(_output_facets(shapes[-1], tokens, order))
    return {name: listed for name, listed in found.items() if listed}


def _n_tokens(network: Network, seen: Sighting) -> int | None:
    shape = seen.outputs.get(network.blocks[-1], [()])[-1] if network.blocks else ()
    return shape[1] if len(shape) == 3 else None


def _output_facets(shape: tuple[int, ...], tokens: int | None, order: facets.Order) -> set[str]:
    if len(shape) not in (2, 3, 4):
        return set()
    found = {"token"}
    if len(shape) == 4 or (len(shape) == 3 and shape[1] == tokens):
        found.add("pool")
    if len(shape) == 3 and shape[1] == tokens:
        found |= ({"cls"} if order.n_cls else set()) | ({"registers"} if order.n_registers else set())
    return found


def _attends(kernels: list[tuple[int, int, int]], tokens: int | None, order: facets.Order) -> set[str]:
    """q, k, v where the block has one attention, over all tokens; windows and several kernels have no such rows."""
    if len(kernels) != 1 or kernels[0][1] != tokens:
        return set()
    return {facet for facet in _ATTENTION if order.n_cls or not facet.endswith("_cls")}


def _listed(names: set[str]) -> tuple[str, ...]:
    return tuple(facet for facet in FACETS if facet in names)


def _convert_products(model: nn.Module, dtype: torch.dtype) -> None:
    """What autocast would convert at every call, once; norms and embeddings stay float32, as autocast wants them."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
