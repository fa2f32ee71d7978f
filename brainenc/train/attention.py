"""Where each ROI looks: attention maps as arrays, and as colours on the images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from brainenc import atomic
from brainenc.datasets.rois import HEMISPHERES, Hemisphere
from brainenc.errors import UnknownName, UsageError
from brainenc.train.encoders.base import BrainEncoder, QueryEncoder
from brainenc.train.evaluate import OpenRun, Part
from brainenc.train.inputs import Split, open_samples
from brainenc.train.run_folder import save_array

Maps = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]

STRENGTH = 0.75
"""Opacity of an overlay where attention is highest."""
_COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)
"""From dark to bright, evenly lighter to the eye (five stops of the colour map "inferno")."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoiMaps:
    """Attention of one hemisphere."""

    hemisphere: Hemisphere
    labels: tuple[str, ...]
    """ROIs with a vertex in this subject."""
    maps: Maps
    """Shape (n_images, n_labels, H, W); each map sums to 1."""


@torch.no_grad()
def roi_attention(model: BrainEncoder, features: torch.Tensor) -> list[RoiMaps]:
    """Attention of each ROI's query to each place of the map, last decoder layer, mean over heads.

    With a query per vertex, a ROI's map is the mean over its vertices.

    Args:
        model: with queries, in evaluation mode or not: dropout is never applied.
        features: array of shape (n_images, D, H, W).

    Raises:
        UsageError: ``linear`` has no queries.
    """
    if not isinstance(model, QueryEncoder):
        raise UsageError("The linear encoder has no queries, and so no attention. Use one of the other encoders.")
    per_vertex, (n_lh, _) = model.queries.per_vertex, model.n_queries
    n_images, grid = len(features), tuple(features.shape[2:])
    found = []
    for hemisphere, first in zip(HEMISPHERES, (0, n_lh), strict=True):
        masks = model.queries.masks(hemisphere)
        here = np.flatnonzero(masks.any(axis=1))
        if per_vertex:
            shares = torch.from_numpy(masks[here] / masks[here].sum(axis=1, keepdims=True)).float()
            pieces = model.attention_pieces(features, first, first + masks.shape[1])
            maps = sum(torch.einsum("rq,bqn->brn", shares[:, a - first : b - first].to(p), p) for a, b, p in pieces)
        else:
            maps = model.attention(features)[:, first : first + len(masks)][:, torch.from_numpy(here)]
        array = torch.as_tensor(maps).float().cpu().numpy().reshape(n_images, len(here), *grid)
        labels = tuple(model.queries.labels[i] for i in here)
        found.append(RoiMaps(hemisphere=hemisphere, labels=labels, maps=array))
    return found


def maps_of_run(opened: OpenRun, part: Part, stimuli: Sequence[str], out: Path) -> Iterator[Path]:
    """Maps of some images of a run, with its best weights, as `write_maps` writes them.

    Args:
        opened: the run.
        part: split that the images are of.
        stimuli: their ids.
        out: folder to write to.

    Raises:
        UnknownName: an id that is not in the split; the encoder has no queries.
    """
    split: Split = "test" if part == "test" else "train"
    samples = open_samples(opened.config, opened.subject, opened.open_views, split, responses=False)
    places = {stimulus: i for i, stimulus in enumerate(samples.ids)}
    for stimulus in stimuli:
        if stimulus not in places:
            shown = [*samples.ids[:5], *(["..."] if len(samples.ids) > 5 else [])]
            raise UnknownName(f"{split} image", stimulus, shown, str(opened.config.subject_dir))
    chosen = np.array([places[stimulus] for stimulus in stimuli])
    rows = [view.gather(r[chosen]) for view, r in zip(samples.views, samples.feature_rows, strict=True)]
    device = next(opened.predictor.model.parameters()).device
    features = samples.layout.assemble([torch.from_numpy(np.asarray(r, np.float32)) for r in rows]).to(device)
    files = opened.subject.images(split)
    images = {stimulus: files[places[stimulus]] for stimulus in stimuli}
    identity = getattr(samples.views[0], "identity", None) or {}
    model: Any = opened.predictor.model
    yield from write_maps(out, roi_attention(model, features), images, identity.get("preprocessing"))


def n_files(model: torch.nn.Module, n_images: int) -> int:
    """How many files `maps_of_run` writes for so many images."""
    if not isinstance(model, QueryEncoder):
        return 0
    rois = sum(int(model.queries.masks(hemisphere).any(axis=1).sum()) for hemisphere in HEMISPHERES)
    return len(HEMISPHERES) + 1 + n_images * rois


def covered_box(image_size: tuple[int, int], preprocessing: Mapping[str, Any] | None) -> Box:
    """What of an image the grid of tokens covers.

    Args:
        image_size: (width, height) of the image.
        preprocessing: as the store recorded it (``identity["preprocessing"]``); None: the whole image.

    Returns:
        left, top, right, bottom in pixels of the image. Padding reaches beyond the image, a crop stays inside.
    """
    width, height = image_size
    policy = (preprocessing or {}).get("policy", "resize")
    if policy == "pad" and preprocessing is not None:
        fitted_h, fitted_w = preprocessing.get("size") or (height, width)
        multiple = int(preprocessing.get("multiple") or 1)
        return 0.0, 0.0, _up(fitted_w, multiple) * width / fitted_w, _up(fitted_h, multiple) * height / fitted_h
    if policy == "crop" and preprocessing is not None:
        crop_h, crop_w = preprocessing["size"]
        shortest = preprocessing.get("shortest") or min(crop_h, crop_w)
        scale_w, scale_h = (width / shortest, height / shortest)
        if preprocessing.get("keep_aspect", True):
            scale_w = scale_h = min(width, height) / shortest
        half_w, half_h = crop_w * scale_w / 2, crop_h * scale_h / 2
        return width / 2 - half_w, height / 2 - half_h, width / 2 + half_w, height / 2 + half_h
    return 0.0, 0.0, float(width), float(height)


def _up(n: float, multiple: int) -> float:
    return -(-n // multiple) * multiple


def overlay(image: Image.Image, attention: Maps, box: Box | None = None) -> Image.Image:
    """Lay one map over its image: brighter where there is more attention, the image itself where there is none.

    Args:
        image: of any size.
        attention: array of shape (H, W), not negative.
        box: what of the image the map covers, see `covered_box`; None: all of it.
    """
    left, top, right, bottom = box or (0.0, 0.0, float(image.width), float(image.height))
    size = max(1, round(right - left)), max(1, round(bottom - top))
    peak = float(attention.max())
    scaled = Image.fromarray((attention / peak if peak > 0 else attention).astype(np.float32))
    spread = Image.new("F", image.size, 0.0)
    spread.paste(scaled.resize(size, Image.Resampling.BICUBIC), (round(left), round(top)))
    level = np.clip(np.asarray(spread, dtype=np.float64), 0, 1)
    stops = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(level, stops, _COLOURS[:, c]) for c in range(3)], axis=-1)
    opacity = STRENGTH * level[..., None]
    mixed = (1 - opacity) * np.asarray(image.convert("RGB"), dtype=np.float64) + opacity * colours
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def write_maps(
    folder: Path, found: Sequence[RoiMaps], images: Mapping[str, Path], preprocessing: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Write arrays and overlays: ``{lh,rh}_attention.npy``, ``attention.json`` on their axes, a PNG per image and ROI.

    Args:
        folder: made if absent.
        found: as `roi_attention` gives them.
        images: stimulus id -> file, in the order of the maps.
        preprocessing: what the backbone did to the images.

    Yields:
        each file as it is written.
    """
    atomic.make_dirs(folder)
    for roi in found:
        path = folder / f"{roi.hemisphere}_attention.npy"
        save_array(path, roi.maps)
        yield path
    axes = {"images": list(images), "axes": "images, rois, rows, columns"}
    axes |= {roi.hemisphere: list(roi.labels) for roi in found}
    atomic.replace(folder / "attention.json", json.dumps(axes, indent=1).encode() + b"\n")
    yield folder / "attention.json"
    for number, (stimulus, file) in enumerate(images.items()):
        with Image.open(file) as image:
            image.load()
        box = covered_box(image.size, preprocessing)
        for roi in found:
            for label, attention in zip(roi.labels, roi.maps[number], strict=True):
                path = folder / f"{stimulus.replace('/', '_')}_{roi.hemisphere}_{label}.png"
                overlay(image, attention, box).save(path)
                yield path
