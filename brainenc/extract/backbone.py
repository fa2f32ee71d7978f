"""A frozen vision network: what it is, how images become its input, and any of its features in one forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from brainenc.errors import UnknownName, UsageError
from brainenc.extract import facets
from brainenc.extract.anatomy import Anatomy, Tap
from brainenc.extract.capture import Enough, Heads, Watch, watching
from brainenc.extract.features import FACETS, Feature, resolve_features
from brainenc.extract.info import BackboneInfo
from brainenc.extract.network import Network
from brainenc.extract.weights import hash_weights

__all__ = ["Backbone", "BackboneInfo", "Feature", "load_backbone", "parse_features"]

_COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_features(texts: Iterable[str], info: BackboneInfo) -> list[Feature]:
    """``["-1.q", "8-11.token", "norm.cls", "blocks.[02468].token"]`` -> resolved features, each once.

    Raises:
        UnknownName: a layer or facet that the backbone does not have, with those that it has.
        UsageError: not of the form ``LAYER.FACET``.
    """
    return resolve_features(texts, info.layers())


class Backbone:
    """A frozen network on one device.

    Not thread-safe, but for :meth:`preprocess`: one forward pass at a time.
    """

    def __init__(self, network: Network) -> None:
        network.model.eval().requires_grad_(False)
        self.network = network
        self.device = next(network.model.parameters()).device
        self._anatomy = Anatomy(network)
        self._compute = "float32"
        self._weights_hash = hash_weights(network.model.state_dict(), without=network.without)
        self.info = self._describe()

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> float32 (3, H, W), on the CPU; safe to call from several threads."""
        return self.network.preprocessing(image)

    def input_shape(self, image_shape: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the model's input made from an image of this height and width."""
        return self.network.preprocessing.output_shape(*image_shape)

    def row_shape(self, feature: Feature, image_shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of one image's row, for images of this height and width (before preprocessing)."""
        with self._arithmetic():
            return self._anatomy.rows(feature, *self.input_shape(image_shape))[0]

    def details(self, feature: Feature, image_shape: tuple[int, int]) -> dict[str, Any]:
        """``n_prefix`` and ``grid`` of the rows, for the collection's manifest; grid is None where rows are no map."""
        with self._arithmetic():
            rows, grid = self._anatomy.rows(feature, *self.input_shape(image_shape))
        if grid is None:
            return {"n_prefix": 0, "grid": None}
        return {"n_prefix": rows[0] - grid[0] * grid[1], "grid": list(grid)}

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
        self, batch: torch.Tensor, features: Sequence[Feature], *, dtype: torch.dtype | None = None,
        out: Mapping[Feature, torch.Tensor] | None = None,
    ) -> dict[Feature, torch.Tensor]:  # fmt: skip
        """Every feature asked for, from one forward pass that ends at the last block needed.

        Args:
            batch: float32 (B, 3, H, W), preprocessed, on any device.
            features: resolved by :func:`parse_features`.
            dtype: of the results, converted as each layer passes, so that what waits is already small; None leaves
                the model's own. Values too large for it become infinite: the reader of the results must look.
            out: feature -> (B, *row_shape), where results are copied as each layer passes, instead; in their own dtype.

        Returns:
            feature -> (B, *row_shape), on the backbone's device or in ``out``; views of the model's own tensors where
            that keeps nothing else alive.

        Raises:
            UnknownName: a feature that the backbone does not have.
        """
        self._check(features)
        listener = _Listener(self._anatomy, features, dtype, out or {}, batch.shape[2] / batch.shape[3])
        if not features:
            return {}
        batch = batch.to(self.device, non_blocking=True)
        with contextlib.suppress(Enough), watching(self.network.model, listener.watch), self._arithmetic():
            listener.result(self.network.run(batch))
        return {feature: listener.heard[feature] for feature in features}

    def _check(self, features: Sequence[Feature]) -> None:
        for feature in features:
            if feature.facet not in self.info.layer_facets.get(feature.layer, ()):
                parse_features([str(feature)], self.info)  # raises with what there is
                raise UsageError(f"{feature} is not resolved: hand over what parse_features returns.")

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        if self._compute == "float32":
            yield
            return
        with torch.autocast(self.device.type, dtype=_COMPUTE[self._compute]):
            yield

    def _describe(self) -> BackboneInfo:
        network, anatomy = self.network, self._anatomy
        offered = {facet for listed in anatomy.layer_facets.values() for facet in listed}
        return BackboneInfo(
            slug=network.slug,
            source=network.source,
            name=network.name,
            weights_hash=self._weights_hash,
            n_layers=len(network.blocks),
            facets=tuple(facet for facet in FACETS if facet in offered),
            n_prefix=anatomy.order.n_prefix,
            n_registers=anatomy.order.n_registers,
            width=anatomy.width,
            patch=network.patch,
            preprocessing=network.preprocessing.describe(),
            preprocessing_text=network.preprocessing.sentence(),
            config=dict(network.config),
            compute=self._compute,
            blocks=network.blocks,
            stations=anatomy.stations,
            layer_facets=anatomy.layer_facets,
        )


class _Listener:
    """Collects the features of one forward pass, and ends it when it has them all."""

    def __init__(
        self, anatomy: Anatomy, features: Sequence[Feature], dtype: torch.dtype | None,
        out: Mapping[Feature, torch.Tensor], aspect: float,
    ) -> None:  # fmt: skip
        self._order, self._dtype, self._out, self._aspect = anatomy.order, dtype, out, aspect
        self._pending = anatomy.taps(features)
        self._calls: dict[str, int] = {}
        self.heard: dict[Feature, torch.Tensor] = {}
        self.watch = Watch(
            outputs={t.module: functools.partial(self._on_output, t.module) for t in self._of_kind("output")},
            attention={t.module: functools.partial(self._on_attention, t) for t in self._of_kind("attention")},
        )

    def result(self, pooled: torch.Tensor | None) -> None:
        """The forward pass went to its end, with this."""
        for tap in self._of_kind("result"):
            assert pooled is not None  # else the facet would not be on offer
            self._finish(tap, lambda _facet: pooled)

    def _of_kind(self, kind: str) -> list[Tap]:
        return [tap for tap in self._pending if tap.kind == kind]

    def _on_output(self, module: str, output: torch.Tensor) -> None:
        self._calls[module] = self._calls.get(module, 0) + 1
        for tap in self._of_kind("output"):
            if (tap.module, tap.call) == (module, self._calls[module]):
                tokens = functools.reduce(lambda x, step: step(x), tap.through, output)
                self._finish(tap, functools.partial(self._take, tokens))

    def _take(self, tokens: torch.Tensor, facet: str) -> torch.Tensor:
        return facets.take(facet, tokens, self._order, self._aspect)

    def _on_attention(self, tap: Tap, heads: Heads) -> None:
        self._finish(tap, lambda facet: facets.take_attention(facet, heads))

    def _finish(self, tap: Tap, source: Callable[[str], torch.Tensor]) -> None:
        for feature in self._pending.pop(tap):
            self.heard[feature] = facets.keep(
                source(feature.facet), self._dtype, own=tap.own, into=self._out.get(feature)
            )
        if not self._pending:
            raise Enough


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
            ``timm:NAME/path``; ``torchvision:resnet50`` or ``torchvision:resnet50/path``; or a preset's name,
            alone or with another backbone under it: ``dinov2_q@FOLDER``.
        slug: what its collections are filed under; by default the last part of the name.
        size_policy: ``pad``, ``resize`` or ``crop``; by default what the model was made for.
        image_size: edge of the (square) input, or (height, width).

    Raises:
        UnknownName: no such model, weights or preset, or no network to fetch them.
        UsageError: the parts do not go together.
    """
    from brainenc.extract.backbones import load_network

    return Backbone(load_network(name, slug=slug, size_policy=size_policy, image_size=image_size))


def _convert_products(model: nn.Module, dtype: torch.dtype) -> None:
    """What autocast would convert at every call, once; norms and embeddings stay float32, as autocast wants them."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
