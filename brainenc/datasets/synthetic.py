"""Synthetic subjects in the Algonauts 2023 layout whose best reachable score is known.

Images are crops of photographs, responses a readout of real backbone features plus noise (`brainenc.datasets.planted`).
The features come through a callable, so that this module knows no torch. What organisers would keep to themselves
(test responses, noise ceilings, noiseless signals) goes into ``organiser/<subject>`` beside the subject's folder.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brainenc import atomic
from brainenc.datasets import layout, npy, planted
from brainenc.datasets.cortex import made_up_atlas, write_atlas
from brainenc.datasets.layout import Split
from brainenc.datasets.photographs import write_pictures
from brainenc.datasets.planted import Region
from brainenc.datasets.responses import ResponseFiles, write_responses
from brainenc.datasets.rois import HEMISPHERES, Hemisphere, RoiAtlas, RoiQueries
from brainenc.datasets.truth import N_NSD, HemisphereOutcome, Plan, Truth, write_truth
from brainenc.errors import DataError, NoSpace, UsageError
from brainenc.units import format_bytes

FeatureMaps = Callable[[Sequence[Path]], npt.NDArray[Any]]
"""Images -> feature maps of shape (n, H, W, D)."""
Progress = Callable[[int, int], None]
"""(images done, images in all)."""

_SPLITS: tuple[Split, Split] = ("train", "test")
_CALIBRATION = 512  # images whose pooled features are held at once to calibrate channels: 80 MB at 768 channels
_BATCH = 16
_PNG_BYTES = 400_000  # a generous photograph of 425 x 425
_UNFINISHED = ".synthesizing"


def synthesize(
    folder: str | Path,
    *,
    features: FeatureMaps,
    n_train: int,
    n_test: int,
    vertices: tuple[int, int],
    seed: int = 0,
    ceiling: float = 0.7,
    source: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **shape: Any,
) -> Truth:
    """Make a subject. The same arguments again find it finished; after an interruption they make it anew.

    Args:
        folder: the subject's folder (``.../subj01``).
        features: images -> feature maps (n, H, W, D); called with a few images at a time.
        n_train: training images.
        n_test: test images.
        vertices: (V_lh, V_rh).
        seed: of images, ROIs, readouts and noise.
        ceiling: mean best correlation, between 0 and 1.
        source: what the features are, to be recorded.
        progress: called after each batch of features.
        shape: the other fields of `Plan`: ``spread``, ``rank``, ``width``.

    Raises:
        UsageError: impossible arguments, or the folder holds something else.
        NoSpace: the disk cannot hold it.
        DataError: no photographs, or features of a wrong shape.
    """
    plan = Plan(
        n_train=n_train, n_test=n_test, vertices=vertices, seed=seed, ceiling=ceiling, source=source or {}, **shape
    )
    folder = Path(folder).expanduser().absolute()
    if (done := _finished(folder, plan)) is not None:
        return done
    atlas = made_up_atlas(plan.vertices, plan.seed)
    _claim(folder, plan)
    with _full_disk_named(folder):
        return _make(folder, plan, atlas, features, progress)


def _make(folder: Path, plan: Plan, atlas: RoiAtlas, features: FeatureMaps, progress: Progress | None) -> Truth:
    write_atlas(folder, atlas, plan.seed)
    images = _write_images(folder, plan)
    queries = atlas.queries("rois_all")
    regions = planted.plan_regions(queries, ceiling=plan.ceiling, spread=plan.spread, width=plan.width, seed=plan.seed)
    latents, feature_shape = _latents([*images["train"], *images["test"]], regions, plan, features, progress)
    outcomes: dict[Hemisphere, HemisphereOutcome] = {}
    for hemisphere in HEMISPHERES:
        own = [i for i, region in enumerate(regions) if region.hemisphere == hemisphere]
        flat = latents[:, own].reshape(len(latents), -1)
        outcomes[hemisphere] = _write_hemisphere(folder, plan, queries, [regions[i] for i in own], flat)
    truth = write_truth(folder, plan, regions, queries, outcomes, feature_shape)
    (folder / _UNFINISHED).unlink()
    return truth


@contextlib.contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    """Others may fill the disk while we write: the same error as if it had been full at the start."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoSpace(
            f"The disk filled up while {folder} was written ({error.strerror}). Make room and run the same command "
            "again: an unfinished subject is made anew."
        ) from error


def _finished(folder: Path, plan: Plan) -> Truth | None:
    truth = Truth.read(folder)
    if truth is not None and (difference := truth.difference(plan)):
        raise UsageError(f"{folder} holds another synthetic subject ({difference}). Choose another folder.")
    return truth


def _claim(folder: Path, plan: Plan) -> None:
    """Refuse to write over anything but an unfinished synthetic subject, and what the disk cannot hold."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _UNFINISHED).exists():
        raise UsageError(
            f"{folder} is not empty and no synthetic subject: nothing in it is overwritten. Choose another folder."
        )
    atomic.make_dirs(folder)
    n_images = plan.n_train + plan.n_test
    need = 2 * 4 * n_images * sum(plan.vertices) + _PNG_BYTES * n_images + 14 * 4 * layout.N_FSAVERAGE
    free = shutil.disk_usage(folder).free
    if need > free:
        raise NoSpace(
            f"A subject of {n_images} images and {sum(plan.vertices)} vertices takes about "
            f"{format_bytes(need)}; {folder} has {format_bytes(free)} left. Make it smaller or choose another disk."
        )
    (folder / _UNFINISHED).touch()


def _write_images(folder: Path, plan: Plan) -> dict[Split, list[Path]]:
    """Draw NSD ids, sort them within each split, and write one image each."""
    drawn = np.random.default_rng((plan.seed, 5)).choice(N_NSD, plan.n_train + plan.n_test, replace=False)
    ids: dict[Split, list[int]] = {
        "train": sorted(drawn[: plan.n_train].tolist()), "test": sorted(drawn[plan.n_train :].tolist()),
    }  # fmt: skip
    images: dict[Split, list[Path]] = {}
    digits = max(4, len(str(plan.n_train)))  # rows follow sorted names: more than 9999 images need a fifth digit
    for split in _SPLITS:
        into = folder / layout.images_dir(split)
        shutil.rmtree(into, ignore_errors=True)  # of an interrupted run, perhaps with other ids
        into.mkdir(parents=True)
        images[split] = [into / layout.image_name(split, i, nsd, digits) for i, nsd in enumerate(ids[split], 1)]
        write_pictures(images[split], seed=plan.seed, numbers=ids[split])
    return images


def _latents(
    images: Sequence[Path], regions: Sequence[Region], plan: Plan, features: FeatureMaps, progress: Progress | None
) -> tuple[planted.Floats, tuple[int, int, int]]:
    """Standardised latents (n_images, n_regions, K) of all images, and the shape (H, W, D) of a feature map."""
    n_calibration = min(plan.n_train, _CALIBRATION)
    waiting: list[planted.Floats] = []
    latents: list[planted.Floats] = []
    window, readouts, shape = None, None, (0, 0, 0)
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        maps = _checked(features(batch), len(batch))
        if window is None:
            shape = (maps.shape[1], maps.shape[2], maps.shape[3])
            window = planted.windows(regions, shape[:2])
        waiting.append(planted.pool(maps, window))
        if readouts is None and start + len(batch) >= n_calibration:
            readouts = planted.Readouts.calibrate(np.concatenate(waiting)[:n_calibration], regions, plan.rank)
        if readouts is not None:
            latents += [readouts.latents(pooled) for pooled in waiting]
            waiting.clear()
        if progress is not None:
            progress(start + len(batch), len(images))
    return planted.standardise(np.concatenate(latents), plan.n_train), shape


def _checked(maps: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
    if maps.ndim != 4 or len(maps) != n or not np.isfinite(maps).all():
        raise DataError(
            f"Feature maps of {n} images must be finite arrays of shape ({n}, H, W, D); "
            f"got shape {maps.shape} of {maps.dtype}."
        )
    return maps


def _write_hemisphere(
    folder: Path, plan: Plan, queries: RoiQueries, regions: Sequence[Region], latents: planted.Floats
) -> HemisphereOutcome:
    """Write responses of both splits of the regions' hemisphere, and the organisers' signals and noise ceilings.

    ``latents`` are those of ``regions`` alone, (n_images, n_regions * K).
    """
    hemisphere = regions[0].hemisphere
    masks = queries.masks(hemisphere)
    weights = planted.vertex_weights(latents[: plan.n_train], regions, masks)
    best = planted.vertex_ceilings(regions, masks, seed=plan.seed)
    organiser = layout.organiser_dir(folder)
    realised: dict[Split, npt.NDArray[np.float64]] = {}
    for split, rows in zip(_SPLITS, (latents[: plan.n_train], latents[plan.n_train :]), strict=True):
        own = folder if split == "train" else organiser
        files = ResponseFiles(
            measured=own / layout.responses_file(split, hemisphere),
            signal=organiser / layout.signal_file(split, hemisphere),
        )
        key = (plan.seed, 6, HEMISPHERES.index(hemisphere), _SPLITS.index(split))
        realised[split] = write_responses(files, rows, weights, best, key)
    ceiling_file = organiser / layout.noise_ceiling_file(hemisphere)
    ceiling_file.parent.mkdir(parents=True, exist_ok=True)
    npy.save(ceiling_file, np.square(best))
    return HemisphereOutcome(best, realised)
