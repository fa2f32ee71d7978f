"""What ``brainenc train`` is told, in today's words and in those of the scripts that people come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from brainenc.cli.local_out import LocalOut
from brainenc.errors import UsageError
from brainenc.redact import redact
from brainenc.units import parse_seconds

_OF_THE_ENCODER = ("encoder", "readout", "hidden", "n_heads", "n_decoder_layers", "feedforward", "dropout")
_OF_THE_SOURCE = ("on_the_fly", "backbone", "preset", "size_policy", "image_size")

_OPTIONS = [
    click.option("--subject-dir", metavar="DIR", help="Algonauts 2023 subject folder."),
    click.option("--store", metavar="URL", help="Feature store: a folder or any fsspec URL."),
    click.option(
        "--feature", "features", multiple=True, metavar="BACKBONE/LAYER.FACET",
        help="Feature to train on, as in dinov2-base/11.q; again for more, joined along channels. :cls takes the "
        "class token alone, :mean the mean over the grid.",
    ),
    click.option("--preset", metavar="NAME", help="The feature of a published recipe: dinov2_q, dinov2, clip ..."),
    click.option("--stimuli", metavar="NAME", help="Stimulus set in the store; default <subject>-train."),
    click.option("--test-stimuli", metavar="NAME", help="Stimulus set to predict; default <subject>-test."),
    click.option("--on-the-fly", is_flag=True, default=None, help="Compute features while training; no store."),
    click.option("--backbone", metavar="NAME", help="With --on-the-fly: what computes, as for brainenc extract."),
    click.option("--size-policy", type=click.Choice(["pad", "resize", "crop"]), help="With --on-the-fly."),
    click.option("--image-size", type=int, metavar="PIXELS", help="With --on-the-fly."),
    click.option("--out", metavar="RUN", help="Run folder to make."),
    click.option("--resume", "resume_run", metavar="RUN", help="Go on with a run."),
    click.option(
        "--encoder", help="transformer, custom_transformer, spatial_feature, linear, or ridge.  [default: transformer]"
    ),
    click.option(
        "--readout",
        help="rois_all, streams, visuals, bodies, faces, places, words, hemis, voxels.  [default: rois_all]",
    ),
    click.option("--hidden", type=int, help="Width of tokens; that of the features when not given."),
    click.option("--heads", "n_heads", type=int, help="Attention heads.  [default: 16]"),
    click.option("--decoder-layers", "n_decoder_layers", type=int, help="Decoder layers.  [default: 1]"),
    click.option("--feedforward", type=int, help="Width inside the feed-forward network.  [default: 1024]"),
    click.option("--dropout", type=float, help="[default: 0.1]"),
    click.option("--epochs", type=int, help="[default: 15]"),
    click.option("--batch-size", type=int, help="Over all workers.  [default: 16]"),
    click.option("--micro-batch", type=int, help="Samples a worker computes at once; less memory, the same result."),
    click.option("--learning-rate", "--lr", type=float, help="[default: 0.0005]"),
    click.option("--weight-decay", type=float, help="[default: 0.0001]"),
    click.option("--lr-drop", type=int, help="Epochs between two drops of the learning rate.  [default: 100]"),
    click.option("--clip", type=float, help="Largest norm of the gradient; 0: none.  [default: 0.1]"),
    click.option("--seed", type=int, help="[default: 0]"),
    click.option("--split", metavar="idxs.npy", help="Reproduce a split: image numbers, those for training first."),
    click.option("--shuffle-responses", is_flag=True, default=None, help="Control: each image gets another's."),
    click.option(
        "--workers", metavar="N|MIN:MAX",
        help="0: in this process, without Ray.  [default: the GPUs here, or of the cluster; else 1]",
    ),
    click.option("--device", help="auto, cpu, cuda.  [default: auto]"),
    click.option("--precision", type=click.Choice(["float32", "bfloat16"]), help="[default: float32]"),
    click.option("--compile", "compile_", is_flag=True, default=None, help="torch.compile forward and loss."),
    click.option("--threads", type=int, help="CPU threads of a worker; by default its share of the cores."),
    click.option(
        "--address",
        help="Ray cluster to join: auto or host:port; else one is started for the run. With --resume give it again.",
    ),
    click.option("--max-failures", type=int, help="Worker failures survived; -1: any number.  [default: 3]"),
    click.option("--keep", type=int, help="Checkpoints kept beside the best.  [default: 2]"),
    click.option("--checkpoint-every", "checkpoint_every_s", metavar="TIME", help="[default: 5min, and each epoch]"),
    click.option("--snapshot-every", "snapshot_every_s", metavar="TIME", help="0: none.  [default: 20s]"),
    click.option(
        "--snapshot-dir", metavar="DIR", type=LocalOut(file_okay=False),
        help="For snapshots, on each machine's own disk where RUN is on a shared one.  [default: RUN/.snapshots]",
    ),
    click.option("--tracker", "trackers", multiple=True, help="tensorboard, wandb; beside metrics.jsonl."),
    click.option("--ram", metavar="WARN,CRITICAL", help="Guard: fractions of memory.  [default: 0.85,0.88]"),
    click.option("--gpu", metavar="WARN,CRITICAL", help="Guard: fractions of GPU memory.  [default: 0.90,0.92]"),
    click.option(
        "--on-critical", type=click.Choice(["shrink", "stop"]),
        help="Guard: halve the micro-batch and go on, or stop.  [default: shrink]",
    ),
    click.option("--guard/--no-guard", "guarded", default=None, help="Watch memory.  [default: guard]"),
    click.option(
        "--drill", multiple=True, metavar="FAULT@step=S,rank=R",
        help="A fault on purpose: oom, kill, sigterm, ram=0.95, gpu=0.95. The last two last an hour: the run shrinks, "
        "and stops 5 s later.",
    ),
    click.option("--predict/--no-predict", default=None, help="Predict the test images at the end.  [default: yes]"),
    # The spellings of the published scripts.
    click.option("--data_dir", hidden=True),
    click.option("--subj", hidden=True),
    click.option("--output_dir", hidden=True),
    click.option("--saved_feats", hidden=True),
    click.option("--saved_feats_dir", hidden=True),
    click.option("--backbone_arch", hidden=True),
    click.option("--encoder_arch", hidden=True),
    click.option("--readout_res", hidden=True),
    click.option("--enc_output_layer", type=int, hidden=True),
    click.option("--batch_size", "old_batch_size", type=int, hidden=True),
]  # fmt: skip


def train_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command all of these options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def given_fields(options: dict[str, Any]) -> dict[str, Any]:
    """What was given, under the names of the configuration; old spellings are answered with today's."""
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    given, said = _modern(given)
    if said:
        click.echo(f"brainenc: these flags are old; today's are {redact(' '.join(said))}", err=True)
    if "compile_" in given:
        given["compile"] = given.pop("compile_")
    for name in ("subject_dir", "store", "out", "split", "snapshot_dir"):
        if name in given:
            given[name] = absolute(given[name])
    if guard := _guard(given):
        given["guard"] = guard
    for name in ("checkpoint_every_s", "snapshot_every_s"):
        if name in given:
            given[name] = parse_seconds(given[name])
    return given


def _guard(given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {name: _pair(name, given.pop(name)) for name in ("ram", "gpu") if name in given}
    if "on_critical" in given:
        found["on_critical"] = given.pop("on_critical")
    if "guarded" in given:
        found["enabled"] = given.pop("guarded")
    return found


def _pair(name: str, text: str) -> list[float]:
    try:
        warn, critical = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--{name} {text!r} is no pair of fractions; write for example --{name} 0.85,0.88.") from None
    return [warn, critical]


def absolute(text: str) -> str:
    """An absolute path, because workers start elsewhere; URLs stay as they are."""
    return text if "://" in text else str(Path(text).expanduser().absolute())


def split_source(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the configuration, and what says where features are computed."""
    source = {name: given[name] for name in _OF_THE_SOURCE if name in given}
    return {name: value for name, value in given.items() if name not in source}, source


def config_from(given: dict[str, Any]) -> Any:
    """The configuration of a new run.

    Raises:
        UsageError: something is lacking or does not exist.
    """
    from brainenc.train.config import TrainConfig
    from brainenc.train.encoders.base import EncoderConfig

    for name, option in (("subject_dir", "--subject-dir"), ("out", "--out")):
        if name not in given:
            raise UsageError(
                f"brainenc train needs {option}. For example: brainenc train --subject-dir data/subj01 --store "
                "features --feature dinov2-base/11.q --out runs/first; or brainenc train --resume runs/first."
            )
    for feature in given.get("features", ()):
        if "/-" in feature:
            raise UsageError(
                f"--feature {feature}: a store's keys hold the layer's number, as in dinov2-base/11.q, not its place "
                "from the end. `brainenc store ls` shows them."
            )
    encoder = EncoderConfig(**{name: given[name] for name in _OF_THE_ENCODER if name in given})
    rest = {name: value for name, value in given.items() if name not in _OF_THE_ENCODER}
    return TrainConfig(**rest, encoder=encoder)


_OLD_BACKBONES = {
    "dinov2_q": ("dinov2-base", "q", 12),
    "dinov2": ("dinov2-base", "token", 12),
    "dinov2_q_cls": ("dinov2-base", "q_cls", 12),
    "dinov2_cls": ("dinov2-base", "cls", 12),
    "clip": ("clip", "token", 24),
    "clip_cls": ("clip", "cls", 24),
    "resnet50": ("resnet50", "token", 0),
    "resnet50_cls": ("resnet50", "pool", 0),
    "resnet18": ("resnet18", "token", 0),
    "resnet18_cls": ("resnet18", "pool", 0),
}
"""Published name -> slug in the store, facet, number of blocks."""

_LAST = {"dinov2": "norm.token", "dinov2_cls": "norm.cls", "clip": "proj.token", "clip_cls": "proj.cls"}
"""What the last layer of these meant: the model's own output, after its final norm."""


def preset_feature(name: str, from_the_end: int = 1) -> str:
    """``("dinov2_q", 2)`` -> ``"dinov2-base/10.q"``: the published ``--enc_output_layer`` counts 1 for the last layer.

    Raises:
        UsageError: no such name or layer.
    """
    if name not in _OLD_BACKBONES:
        raise UsageError(f"There is no preset {name!r}. There is: {', '.join(_OLD_BACKBONES)}.")
    slug, facet, blocks = _OLD_BACKBONES[name]
    if blocks == 0:
        return f"{slug}/layer4.{facet}"
    if from_the_end == 1 and name in _LAST:
        return f"{slug}/{_LAST[name]}"
    if not 1 <= from_the_end <= blocks:
        raise UsageError(f"--enc_output_layer {from_the_end}: {name} has {blocks} layers, counted from 1, the last.")
    return f"{slug}/{blocks - from_the_end}.{facet}"


def _modern(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Today's options, and how to write the old ones that were given."""
    given, said = dict(given), []

    def put(name: str, value: Any, option: str) -> None:
        given.setdefault(name, value)
        said.append(f"{option} {value}")

    data_dir, subj = given.pop("data_dir", None), given.pop("subj", None)
    if data_dir:
        put("subject_dir", _old_subject(data_dir, subj), "--subject-dir")
    for old, name, option in (
        ("output_dir", "out", "--out"), ("saved_feats_dir", "store", "--store"),
        ("encoder_arch", "encoder", "--encoder"),
        ("readout_res", "readout", "--readout"), ("old_batch_size", "batch_size", "--batch-size"),
    ):  # fmt: skip
        if old in given:
            put(name, given.pop(old), option)
    layer = given.pop("enc_output_layer", None)
    arch, saved = given.pop("backbone_arch", None), given.pop("saved_feats", None)
    preset = given.get("preset")
    if (old_name := saved or arch or (preset if not given.get("on_the_fly") else None)) and not given.get("features"):
        feature = preset_feature(str(old_name), layer or 1)
        given["features"] = (feature,)
        if not preset or layer:
            said.append(f"--feature {feature}")
    if not given.get("on_the_fly"):
        given.pop("preset", None)
    return given, said


def _old_subject(data_dir: str, subj: str | None) -> str:
    """``--data_dir`` was either the subject's own folder or the one above it."""
    name = f"subj{int(subj):02d}" if subj and subj.isdecimal() else subj
    folder = data_dir.rstrip("/")
    return folder if not name or folder.split("/")[-1] == name else f"{folder}/{name}"
