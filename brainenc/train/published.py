"""Published checkpoints, ``{'model': state, 'args': Namespace, 'val_perf': ...}``, read without running code.

The published model builds more than it uses, and trains it nowhere: self-attention and a memory projection in the
transformer, three more layers in the custom one, a whole transformer beside ``linear``, the frozen backbone. Such
entries are left out when a checkpoint is read, and made up (zeros) when one is written for the published code.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brainenc.datasets import layout
from brainenc.datasets.algonauts import Subject
from brainenc.datasets.mapping import read_mapping
from brainenc.datasets.rois import ALIASES, HEMISPHERES, ROI_CLASSES, RoiAtlas, RoiQueries
from brainenc.errors import CheckpointUnusable, NotASubject, UnknownName
from brainenc.train.checkpoint import Contents, Manifest, Position, check_keys, list_checkpoints, read_manifest, write
from brainenc.train.config import TrainConfig
from brainenc.train.inputs import read_split
from brainenc.train.model import ENCODERS, BrainEncoder, EncoderConfig, build_encoder
from brainenc.train.order import split_indices
from brainenc.train.run_folder import RunFolder, save_array

log = logging.getLogger(__name__)

_ORIGIN = "published"
"""In the provenance of an imported checkpoint: the name of its file. Nothing else is known of what it learned from."""
_UNUSED = re.compile(r"(backbone|transformer\.(encoder|memory_proj|decoder\.layers\.\d+\.self_attn)\b)")
_UNUSED_BY = {
    "custom_transformer": re.compile(r".*\.(cross_attn\.(c_attn|v_proj)|norm1|norm2)\."),
    "spatial_feature": re.compile(r"(transformer|query_embed|input_proj)\b"),
    "linear": re.compile(r"(transformer|query_embed)\b"),
}
_TORN_OR_FOREIGN = (
    RuntimeError, EOFError, ValueError, OSError, TypeError, AttributeError, LookupError, struct.error, AssertionError,
)  # fmt: skip
"""What an unpickler raises over bytes that are not its own."""
_GRID = (31, 31)
"""Of all published encoders: 425 pixels, padded to 434, in patches of 14."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedCheckpoint:
    """What a published checkpoint says."""

    path: Path
    state: Mapping[str, Tensor]
    """Names as in the file, without the ``module.`` of distributed training."""
    args: Mapping[str, Any]
    epoch: int
    val_perf: float | None


def load_published(checkpoint: str | Path, subject_dir: str | Path) -> BrainEncoder:
    """Load a checkpoint of the published code as a model, in evaluation mode, on the CPU.

    Args:
        checkpoint: the file, usually ``checkpoint.pth``.
        subject_dir: the subject that it was trained on: its ROIs say which query answers for which vertex.

    Raises:
        CheckpointUnusable: no such checkpoint, or one of another model or subject; the keys that differ are listed.
        NotASubject: ``subject_dir`` has no ROI masks.
    """
    found = read_published(checkpoint)
    config = config_of(found)
    return model_of(found, config, _atlas(Path(subject_dir)).queries(config.readout))


def import_published(
    checkpoint: str | Path, subject_dir: str | Path, out: str | Path, *, store: str | None = None,
    features: Sequence[str] = (), split: str | Path | None = None, note: Callable[[str], None] = log.warning,
) -> dict[str, Any]:  # fmt: skip
    """Make a run folder of ours from a published checkpoint.

    The run stands before its first step, with the published weights: it can be evaluated, can predict, and resuming it
    trains on from them.

    Args:
        checkpoint: the file.
        subject_dir: the subject that it was trained on.
        out: run folder to make.
        store: where the features lie that it will be used with.
        features: as for training.
        split: the ``idxs.npy`` of the published run. Without it nobody knows which images the checkpoint left out, and
            a split is drawn by the seed, whose validation images are mostly those that it was trained on.
        note: called with lines for a person.

    Returns:
        what was imported: ``run, encoder, readout, epoch, val_perf, n_parameters, split``.

    Raises:
        CheckpointUnusable: as :func:`load_published`.
        UsageError: ``out`` holds a run already.
        DataError: ``split`` holds no permutation of the subject's training images; nothing was written.
        NotASubject: for a ``split`` the subject must be whole, its ROI masks alone do not say how many images it has.
    """
    found = read_published(checkpoint)
    config = config_of(found)
    model = model_of(found, config, _atlas(Path(subject_dir)).queries(config.readout))
    folder = RunFolder(Path(out).absolute())
    run = TrainConfig(
        subject_dir=str(Path(subject_dir).absolute()), out=str(folder.path), encoder=config, features=tuple(features),
        store=None if store is None else store if "://" in store else str(Path(store).absolute()),
        split=None if split is None else str(Path(split).absolute()),
    )  # fmt: skip
    indices = None if split is None else read_split(run, len(Subject.open(subject_dir).images("train")))
    origin = {_ORIGIN: found.path.name, "epoch": found.epoch, "val_perf": found.val_perf}
    contents = Contents(
        position=Position(step=0, epoch=0, best=found.val_perf, val_perf=found.val_perf),
        weights=model.state_dict, optimizer={"state": {}},
        config=run.to_public_dict(), provenance=origin,
    )  # fmt: skip
    folder.create(run)
    if indices is not None:
        save_array(folder.split_file, indices)
    written = write(folder.checkpoints, contents)
    for name in ("last", "best"):
        folder.point(name, checkpoint=written.name, epoch=0, step=0, val_perf=found.val_perf)
    if warning := split_unknown(folder):
        note(warning)
    return {
        "run": str(folder.path), "encoder": config.encoder, "readout": config.readout, "epoch": found.epoch,
        "val_perf": found.val_perf, "n_parameters": sum(p.numel() for p in model.parameters()), "split": run.split,
    }  # fmt: skip


def split_unknown(folder: RunFolder) -> str:
    """What to say of a run that was imported without the split of its checkpoint; empty for all others."""
    config = folder.config()
    found = [checkpoint.folder for checkpoint in list_checkpoints(folder.checkpoints)]
    if config.split is not None or not any(map(_is_imported, found)):
        return ""
    if folder.split_file.exists():  # drawn when the run was resumed, unless somebody put the published one there
        indices = np.load(folder.split_file, allow_pickle=False)
        if not np.array_equal(indices, split_indices(len(indices), config.seed)):
            return ""
    return (
        f"WARNING: this run was imported without --split. Its validation images are drawn by seed {config.seed} "
        "and are not those that the published checkpoint left out: it was trained on most of them, and scores on them "
        "come out too high. Import it again with --split idxs.npy, from the folder of the published run; test images "
        "are not concerned."
    )


def _is_imported(checkpoint: Path) -> bool:
    with suppress(CheckpointUnusable, OSError):
        return knows_no_data(read_manifest(checkpoint))
    return False


def knows_no_data(manifest: Manifest) -> bool:
    """Whether a checkpoint was imported, so that nothing says what it was trained on."""
    return _ORIGIN in manifest.provenance


def read_published(checkpoint: str | Path) -> PublishedCheckpoint:
    """Read the file with weights only: tensors, numbers, and the arguments' ``argparse.Namespace``.

    Raises:
        CheckpointUnusable: no file, not whole, or not what the published code writes.
    """
    path = Path(checkpoint)
    try:
        with torch.serialization.safe_globals(_allowed()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # what it cannot read it refuses
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointUnusable(f"There is no checkpoint {path}.") from error
    except pickle.UnpicklingError as error:
        raise CheckpointUnusable(
            f"{path} holds more than weights and arguments, and reading it whole could run code: {_first_line(error)} "
            "Save it again with only 'model' and 'args', where it was made and is trusted."
        ) from error
    except _TORN_OR_FOREIGN as error:
        raise CheckpointUnusable(f"{path} cannot be read as a checkpoint: {_first_line(error)}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict) or "args" not in found:
        kind = f"the entries {sorted(map(str, found))}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise CheckpointUnusable(f"{path} is no published checkpoint: wanted 'model' and 'args', found {kind}.")
    args = found["args"] if isinstance(found["args"], dict) else vars(found["args"])
    state = {str(name).removeprefix("module."): value for name, value in found["model"].items()}
    perf = found.get("val_perf", args.get("val_perf"))
    return PublishedCheckpoint(
        path=path, state=state, args=args, epoch=int(found.get("epoch", 0)),
        val_perf=None if perf is None else float(perf),
    )  # fmt: skip


def config_of(found: PublishedCheckpoint) -> EncoderConfig:
    """The configuration that a checkpoint was trained with; widths are those of its tensors.

    Raises:
        CheckpointUnusable: an encoder or readout that we do not have, or parts that change the function.
    """
    args, state = found.args, found.state
    encoder, readout = str(args.get("encoder_arch", "transformer")), str(args.get("readout_res", "rois_all"))
    if encoder not in ENCODERS:
        raise CheckpointUnusable(f"{found.path}: {UnknownName('encoder', encoder, ENCODERS)}")
    transforms = encoder in ("transformer", "custom_transformer")
    if transforms and (args.get("enc_layers") or args.get("position_embedding", "sine") != "sine"):
        raise CheckpointUnusable(
            f"{found.path} has {args.get('enc_layers')} encoder layer(s) and position embedding "
            f"{args.get('position_embedding')!r}; wanted none and 'sine', the published defaults."
        )
    layers = {m[1] for name in state if (m := re.match(r"transformer\.decoder\.layers\.(\d+)\.linear1", name))}
    inner = state.get("transformer.decoder.layers.0.linear1.weight")
    return EncoderConfig(
        encoder=encoder, readout=ALIASES.get(readout, readout), hidden=_hidden(found, encoder),
        n_heads=int(args.get("nheads", 16)), n_decoder_layers=max(len(layers), 1) if transforms else 1,
        feedforward=len(inner) if isinstance(inner, Tensor) else int(args.get("dim_feedforward", 1024)),
        dropout=float(args.get("dropout", 0.1)), prenorm=bool(args.get("pre_norm", True)),
    )  # fmt: skip


def model_of(found: PublishedCheckpoint, config: EncoderConfig, queries: RoiQueries) -> BrainEncoder:
    """The model of a checkpoint, for the queries of its subject.

    Raises:
        CheckpointUnusable: names or shapes are not those of the model; those that differ are listed.
    """
    state = {k: v for k, v in found.state.items() if not _is_unused(k, config.encoder)}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointUnusable(f"{found.path}: {name} is a {type(value).__name__}, wanted a tensor.")
    channels, grid = _input_shape(state, config, args=found.args)
    model = build_encoder(config, queries, channels=channels, grid=grid)
    if "query_embed.weight" in state and config.encoder in ("transformer", "custom_transformer"):
        state["query_embed.weight"] = _used_queries(state["query_embed.weight"], queries)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_keys(found.path, {name: tuple(value.shape) for name, value in state.items()}, wanted)
    model.load_state_dict(state)
    return model.eval()


def published_state(model: BrainEncoder) -> dict[str, Tensor]:
    """A state dict that the published code loads: ours, and zeros for what it has and does not use."""
    state: dict[str, Tensor] = dict(model.state_dict())
    hidden = model.hidden
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(model.config.n_decoder_layers):
        at = f"transformer.decoder.layers.{layer}."
        if model.config.encoder == "transformer":
            shapes |= {
                at + "self_attn.in_proj_weight": (3 * hidden, hidden), at + "self_attn.in_proj_bias": (3 * hidden,),
                at + "self_attn.out_proj.weight": (hidden, hidden), at + "self_attn.out_proj.bias": (hidden,),
            }  # fmt: skip
        elif model.config.encoder == "custom_transformer":
            shapes |= {
                at + "cross_attn.c_attn.weight": (3 * hidden, hidden), at + "cross_attn.c_attn.bias": (3 * hidden,),
                at + "cross_attn.v_proj.weight": (hidden, hidden), at + "cross_attn.v_proj.bias": (hidden,),
                at + "norm1.weight": (hidden,), at + "norm1.bias": (hidden,),
                at + "norm2.weight": (hidden,), at + "norm2.bias": (hidden,),
            }  # fmt: skip
    if model.config.encoder in ("transformer", "custom_transformer"):
        shapes |= {
            "transformer.memory_proj.weight": (_MEMORY, hidden, 1, 1),
            "transformer.memory_proj.bias": (_MEMORY,),
        }
    return state | {name: torch.zeros(shape) for name, shape in shapes.items()}


_MEMORY = 64
"""Width of the published memory projection, which nothing reads."""


def _is_unused(name: str, encoder: str) -> bool:
    pattern = _UNUSED_BY.get(encoder)
    return bool(_UNUSED.match(name)) or bool(pattern and pattern.match(name))


def _atlas(folder: Path) -> RoiAtlas:
    """The ROIs of a subject folder; its ROI masks are enough."""
    try:
        return Subject.open(folder).rois
    except NotASubject:
        needed = {(h, c): folder / layout.mask_file(h, c, "challenge") for h in HEMISPHERES for c in ROI_CLASSES}
        mappings = {c: folder / layout.mapping_file(c) for c in ROI_CLASSES}
        if not all(path.is_file() for path in (*needed.values(), *mappings.values())):
            raise
        labels = {h: {c: np.load(needed[h, c], allow_pickle=False) for c in ROI_CLASSES} for h in HEMISPHERES}
        return RoiAtlas(labels, {c: read_mapping(path) for c, path in mappings.items()})


def _hidden(found: PublishedCheckpoint, encoder: str) -> int | None:
    if encoder == "linear":
        return None
    readout = found.state.get("lh_embed.0.weight")
    if not isinstance(readout, Tensor) or readout.ndim != 2:
        raise CheckpointUnusable(
            f"{found.path} is a checkpoint of another model: lh_embed.0.weight is missing or no matrix. "
            f"It has {', '.join(sorted(found.state)[:8]) or 'no tensors'}."
        )
    return int(readout.shape[1])


def _input_shape(
    state: Mapping[str, Tensor], config: EncoderConfig, *, args: Mapping[str, Any]
) -> tuple[int, tuple[int, int]]:
    """Channels and grid of the features, as far as the tensors tell."""
    projection = state.get("input_proj.weight")
    channels = projection.shape[1] if projection is not None and projection.ndim == 4 else config.hidden
    maps = state.get("spatial_embed.weight")
    side = round(maps.shape[1] ** 0.5) if maps is not None and maps.ndim == 2 else 0
    square = maps is not None and side * side == maps.shape[1]
    return int(channels or args.get("hidden_dim", 768)), (side, side) if square else _GRID


def _used_queries(embed: Tensor, queries: RoiQueries) -> Tensor:
    """The published families have 16 queries whatever they need, of which each half's first ones are used."""
    n_lh, n_rh, half = queries.n_queries("lh"), queries.n_queries("rh"), len(embed) // 2
    if queries.per_vertex or n_lh != n_rh or half <= n_lh or len(embed) % 2:
        return embed
    return torch.cat([embed[:n_lh], embed[half : half + n_rh]])


def _allowed() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What may be rebuilt besides tensors: arguments, and NumPy's numbers under the module names of NumPy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    array = np.zeros(1).__reduce__()[0]
    assert callable(scalar)
    assert callable(array)
    names = ("numpy.core.multiarray", "numpy._core.multiarray")
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdUS"}
    return [
        argparse.Namespace, np.dtype, np.ndarray, *kinds,
        *((scalar, f"{module}.scalar") for module in names), *((array, f"{module}._reconstruct") for module in names),
    ]  # fmt: skip


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
