"""Ridge regression from features to vertices, with its own penalty for each vertex: the baseline everyone reports.

Minimises ``|Y - X W|^2 + penalty |W|^2`` for centred X (n stimuli, p features) and Y (n, V vertices), in its dual form
(Saunders, Gammerman, Vovk 1998): all it needs of the features is ``K = X X'``, an (n, n) matrix that is summed up
from chunks of features, so that maps with 740,000 features a stimulus never lie in memory. Vertices are solved in
blocks read from a memory map. One eigendecomposition a fold serves all penalties and all vertices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brainenc.datasets.algonauts import Responses
from brainenc.errors import DataError, UsageError
from brainenc.train.products import times_transposed

Rows = npt.NDArray[np.int64]
Solver = Literal["auto", "eigen", "himalaya"]
SOLVERS: tuple[Solver, ...] = ("auto", "eigen", "himalaya")

PENALTIES = tuple(float(p) for p in np.logspace(-3, 6, 10))
"""Tried for every vertex; in units of the mean diagonal of the centred kernel, so that they fit any features."""
BLOCK = 2048
"""Vertices solved at a time."""
HIMALAYA_BYTES = 1 << 30
"""Responses up to this size are given to himalaya, which wants all of them in memory several times over."""
_DOUBLE_UP_TO = 2000
"""Stimuli up to which everything is float64; beyond, float32 halves memory and time and costs r less than 1e-4."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RidgeConfig:
    """How the penalty is chosen."""

    penalties: Sequence[float] = PENALTIES
    n_folds: int = 5
    seed: int = 0
    """Decides which stimuli are in which fold."""
    solver: Solver = "auto"
    """``himalaya`` solves everything at once; ``eigen`` block by block of vertices; they agree to rounding."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.penalties or min(self.penalties) <= 0:
            raise UsageError(f"Ridge penalties must be above 0, found {list(self.penalties)}.")
        if self.n_folds < 2:
            raise UsageError(f"Cross-validation needs at least 2 folds, found {self.n_folds}.")
        if self.solver not in SOLVERS:
            raise UsageError(f"There is no ridge solver {self.solver!r}. There is: {', '.join(SOLVERS)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Results for some vertices."""

    vertices: slice
    penalties: npt.NDArray[np.float64]
    """Chosen for each, in the units of the configuration; shape (n,)."""
    predictions: Mapping[str, npt.NDArray[np.float32]]
    """For each set of stimuli that was asked for, shape (n_stimuli, n)."""


def sum_kernel(chunks: Iterable[Tensor], n: int) -> Tensor:
    """``X X'`` of the features less their means, from chunks of features.

    Args:
        chunks: arrays of shape (n, any number of features), float32, on one device.
        n: stimuli.

    Returns:
        array of shape (n, n) on their device, float64 for few stimuli, else float32.

    Raises:
        DataError: features are NaN or infinite, or overflow.
    """
    kernel: Tensor | None = None
    for chunk in chunks:
        # Shifting all stimuli alike changes no centred kernel, and large offsets would cost digits.
        shifted = chunk - chunk.mean(dim=0)
        shifted = shifted.double() if n <= _DOUBLE_UP_TO else shifted
        part = times_transposed(shifted, shifted)
        kernel = part if kernel is None else kernel.add_(part)
    if kernel is None or kernel.shape != (n, n):
        raise DataError(f"Ridge wants features of {n} stimuli, found {'none' if kernel is None else len(kernel)}.")
    if not bool(torch.isfinite(kernel).all()):
        raise DataError("Features hold NaN or infinite values, or values so large that their squares overflow.")
    return kernel


def solve(
    kernel: Tensor, responses: Responses, rows: Rows, train: Rows, sets: Mapping[str, Rows],
    config: RidgeConfig,
) -> Iterator[Block]:  # fmt: skip
    """Fit each vertex, and predict.

    Args:
        kernel: array of shape (n, n), of all stimuli that are trained on or predicted.
        responses: of shape (any, V), may be a memory map or a file; read a block of vertices at a time.
        rows: for each training stimulus its row in ``responses``; shape (len(train),).
        train: places of the training stimuli in the kernel.
        sets: name -> places of stimuli to predict.
        config: how the penalty is chosen.

    Yields:
        results of one block of vertices after another.
    """
    wide = kernel.to(torch.float64 if len(train) <= _DOUBLE_UP_TO else torch.float32)
    scale = float(_centred(wide, train, train).diagonal().mean()) or 1.0
    solver = _choose(config.solver, len(train), responses.shape[1])
    make = _himalaya if solver == "himalaya" else _eigen
    yield from make(wide, responses, rows, train, sets, config, scale)


def _choose(solver: Solver, n: int, n_vertices: int) -> Solver:
    if solver == "himalaya" and find_spec("himalaya") is None:
        raise UsageError("himalaya is not installed: pip install 'brainenc[ridge]', or use the solver 'eigen'.")
    if solver != "auto":
        return solver
    serves = find_spec("himalaya") is not None and n * n_vertices * 4 <= HIMALAYA_BYTES
    return "himalaya" if serves else "eigen"


def folds(n: int, config: RidgeConfig) -> list[tuple[Rows, Rows]]:
    """(training, validation) places of each fold, at random by the seed.

    Raises:
        DataError: fewer stimuli than folds.
    """
    if n < 2 * config.n_folds:
        raise DataError(f"{n} training stimuli are too few for {config.n_folds} folds; wanted two a fold at least.")
    order = np.random.default_rng(config.seed).permutation(n)
    parts = np.array_split(order, config.n_folds)
    return [(np.sort(np.setdiff1d(order, part)), np.sort(part)) for part in parts]


@dataclass(frozen=True, slots=True)
class _Spectrum:
    """Eigenvectors (m, m) and eigenvalues (m,) of the centred kernel of some stimuli, and others seen from them."""

    vectors: Tensor
    values: Tensor
    others: list[Tensor]
    """Centred kernel of others with them, times the eigenvectors: (n_others, m)."""

    @classmethod
    def of(cls, kernel: Tensor, train: Rows, others: Sequence[Rows]) -> _Spectrum:
        values, vectors = torch.linalg.eigh(_centred(kernel, train, train))
        return cls(vectors, values.clamp_(min=0), [_centred(kernel, rows, train) @ vectors for rows in others])


def _centred(kernel: Tensor, rows: Rows, train: Rows) -> Tensor:
    """Inner products of stimuli with training stimuli, after the training stimuli's mean is taken off both."""
    at = torch.from_numpy(train).to(kernel.device)
    cross = kernel[torch.from_numpy(rows).to(kernel.device)][:, at]
    means = kernel[at][:, at].mean(dim=0)
    return cross - cross.mean(dim=1, keepdim=True) - means + means.mean()


def _eigen(
    kernel: Tensor, responses: Responses, rows: Rows, train: Rows, sets: Mapping[str, Rows],
    config: RidgeConfig, scale: float,
) -> Iterator[Block]:  # fmt: skip
    splits = folds(len(train), config)
    spectra = [_Spectrum.of(kernel, train[a], [train[b]]) for a, b in splits]
    whole = _Spectrum.of(kernel, train, list(sets.values()))
    penalties = torch.tensor(config.penalties, dtype=kernel.dtype, device=kernel.device)
    for start in range(0, responses.shape[1], BLOCK):
        part = slice(start, min(start + BLOCK, responses.shape[1]))
        measured = torch.from_numpy(_read(responses, rows, part)).to(kernel)
        errors = torch.zeros(len(penalties), measured.shape[1]).to(kernel)
        for (a, b), spectrum in zip(splits, spectra, strict=True):
            _add_errors(errors, spectrum, measured[a], measured[b], penalties * scale)
        # Of equal errors (a constant vertex) the largest penalty wins.
        best = penalties[len(penalties) - 1 - errors.flip(0).argmin(dim=0)]
        offset = measured.mean(dim=0)
        weights = (whole.vectors.T @ (measured - offset)) / (whole.values[:, None] + best * scale)
        predictions = {
            name: (seen @ weights + offset).float().cpu().numpy() for name, seen in zip(sets, whole.others, strict=True)
        }
        yield Block(vertices=part, penalties=best.double().cpu().numpy(), predictions=predictions)


def _add_errors(errors: Tensor, spectrum: _Spectrum, known: Tensor, held_out: Tensor, penalties: Tensor) -> None:
    offset = known.mean(dim=0)
    projected = spectrum.vectors.T @ (known - offset)
    for i, penalty in enumerate(penalties):
        predicted = spectrum.others[0] @ (projected / (spectrum.values[:, None] + penalty))
        errors[i] += (predicted + offset - held_out).square().mean(dim=0)


def _himalaya(
    kernel: Tensor, responses: Responses, rows: Rows, train: Rows, sets: Mapping[str, Rows],
    config: RidgeConfig, scale: float,
) -> Iterator[Block]:  # fmt: skip
    """All vertices at once, by himalaya's solver. It runs on the CPU: its back end is a global that we leave alone."""
    from himalaya.kernel_ridge import solve_kernel_ridge_cv_eigenvalues

    part = slice(0, responses.shape[1])
    centred = _centred(kernel, train, train).cpu().numpy()
    measured = _read(responses, rows, part).astype(centred.dtype)
    offset = measured.mean(axis=0)
    best, dual, _scores, intercept = solve_kernel_ridge_cv_eigenvalues(
        centred, measured - offset, alphas=np.asarray(config.penalties[::-1], centred.dtype) * scale,
        cv=_Folds(folds(len(train), config)), fit_intercept=True, n_targets_batch=BLOCK, n_targets_batch_refit=BLOCK,
    )  # fmt: skip
    weights = np.asarray(dual)
    predictions = {
        name: (_centred(kernel, places, train).cpu().numpy() @ weights + intercept + offset).astype(np.float32)
        for name, places in sets.items()
    }
    given = np.asarray(config.penalties, np.float64)
    nearest = np.abs(np.log(np.asarray(best, np.float64) / scale)[:, None] - np.log(given)).argmin(axis=1)
    yield Block(vertices=part, penalties=given[nearest], predictions=predictions)


class _Folds:
    """Folds in scikit-learn's form."""

    def __init__(self, splits: list[tuple[Rows, Rows]]) -> None:
        self._splits = splits

    def split(self, *_: Any) -> Iterator[tuple[Rows, Rows]]:
        yield from self._splits

    def get_n_splits(self, *_: Any) -> int:
        return len(self._splits)


def _read(responses: Responses, rows: Rows, part: slice) -> npt.NDArray[np.float32]:
    """Rows of some vertices, copied from the map or the file."""
    return np.ascontiguousarray(responses[rows, part])
