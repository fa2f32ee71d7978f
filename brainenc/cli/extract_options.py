"""What ``brainenc extract`` and ``brainenc plan`` are both told: images, backbone, features, store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from brainenc.errors import UsageError
from brainenc.extract.config import COMPUTES, DTYPES, SHARD_BYTES, ExtractConfig, Source
from brainenc.redact import redact
from brainenc.units import parse_bytes

_OPTIONS = [
    click.option(
        "--subject-dir", "subject_dirs", multiple=True, metavar="DIR",
        help="Algonauts 2023 subject folder: makes the sets DIR-train and DIR-test. May be given again.",
    ),
    click.option(
        "--images", multiple=True, metavar="PATH",
        help="Folder (searched recursively), list (.txt, .csv, .tsv) or nsd_stimuli.hdf5; path or URL. Again for more.",
    ),
    click.option("--stimuli", metavar="NAME", help="Name of the stimulus set, instead of the folder's."),
    click.option(
        "--by-id", is_flag=True,
        help="Copy rows of images that other sets have, by id and content; with --stimuli NAME merge all sources.",
    ),
    click.option("--store", metavar="URL", help="Feature store: a folder or any fsspec URL; created if absent."),
    click.option(
        "--backbone", metavar="NAME",
        help="facebook/dinov2-base, a save_pretrained folder, open_clip:ViT-L-14/openai, timm:NAME, torchvision:NAME.",
    ),
    click.option(
        "--preset", metavar="NAME", help="A published recipe: dinov2_q, dinov2, clip, resnet50, or these with _cls."
    ),
    click.option(
        "--feature", "features", multiple=True, metavar="LAYER.FACET",
        help="11.q, -1.token, 8-11.k, norm.cls ... May be given again: all of them cost one pass.",
    ),
    click.option("--name", "slug", metavar="NAME", help="What keys call the backbone; by default as its name ends."),
    click.option(
        "--size-policy", type=click.Choice(("pad", "resize", "crop")),
        help="How images become the model's input; by default what it was made for.",
    ),
    click.option("--image-size", type=int, metavar="PIXELS", help="Edge of the model's input."),
    click.option(
        "--batch-size", metavar="N",
        help="Images a forward pass, or `auto`; by default 8 on a CPU, 32 on a GPU. A collection keeps its own.",
    ),
    click.option("--rows-per-shard", type=int, metavar="N", help="Images a shard, instead of --shard-size."),
    click.option(
        "--shard-size", default=f"{SHARD_BYTES >> 20}MiB", show_default=True, metavar="SIZE",
        help="Size of a shard of the largest feature.",
    ),
    click.option("--dtype", type=click.Choice(DTYPES), default="float16", show_default=True, help="What is stored."),
    click.option(
        "--compute", type=click.Choice(COMPUTES), default="float32", show_default=True,
        help="What the model computes in; anything but float32 is autocast, and part of the provenance.",
    ),
    click.option("--format", "shard_format", type=click.Choice(("arrow", "npy")), default="arrow", show_default=True),
    click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True),
    click.option("--actors", type=int, metavar="N", help="Copies of the model; by default one per GPU, else one."),
    click.option(
        "--threads", type=int, metavar="N", help="Threads a copy computes with; by default its share of the cores."
    ),
    click.option(
        "--address", metavar="HOST:PORT", help="Ray cluster to run on: auto or host:port; by default one of its own."
    ),
    click.option(
        "--stage/--no-stage", default=None,
        help="Treat the store as a mount without a real flush, or not; by default found out.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print objects instead of text."),
    click.option("--debug", is_flag=True, hidden=True),
    click.option("--data_dir", hidden=True),
    click.option("--output_dir", hidden=True),
    click.option("--subj", hidden=True),
    click.option("--batch_size", "old_batch_size", hidden=True),
]  # fmt: skip


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command all of these options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def config_from(options: dict[str, Any], **more: Any) -> ExtractConfig:
    """The configuration that the options describe; old spellings are taken, and answered with today's.

    Raises:
        UsageError: they do not go together.
    """
    o = _modern(options)
    backbone, features = _backbone(o)
    if not o["store"]:
        raise UsageError("No store was named. Add --store FOLDER (or a URL such as gs://lab/features).")
    return ExtractConfig(
        store=o["store"], backbone=backbone, features=features, sources=_sources(o), slug=o["slug"],
        by_id=o["by_id"], stimuli=o["stimuli"] if o["by_id"] else None, size_policy=o["size_policy"],
        image_size=o["image_size"], micro_batch=_batch(o["batch_size"]), rows_per_shard=o["rows_per_shard"],
        shard_bytes=parse_bytes(o["shard_size"]), dtype=o["dtype"], compute=o["compute"], format=o["shard_format"],
        actors=o["actors"], threads=o["threads"], device=o["device"], address=o["address"], stage=o["stage"], **more,
    )  # fmt: skip


def _backbone(options: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Backbone and features; a preset brings its own feature. ``--backbone dinov2_q``, as people typed, is a preset."""
    from brainenc.extract.presets import find_preset, names_preset  # late: torch

    name, features = options["preset"] or options["backbone"], options["features"]
    if options["preset"] and options["backbone"]:
        raise UsageError(
            "--preset names a backbone already; leave out --backbone. To put other weights of the same kind under it, "
            "write --preset NAME@BACKBONE."
        )
    if not name:
        raise UsageError("No backbone was named. Add --backbone facebook/dinov2-base, or --preset dinov2_q.")
    if not (options["preset"] or names_preset(name)):
        return name, features
    preset = find_preset(name)
    if preset.warning:
        click.echo(f"brainenc: {preset.warning}", err=True)
    return name, (preset.feature, *features)


def _sources(options: dict[str, Any]) -> tuple[Source, ...]:
    name = None if options["by_id"] else options["stimuli"]
    subjects = [Source(location=d, kind="subject", stimuli=name) for d in options["subject_dirs"]]
    return (*subjects, *(Source(location=d, stimuli=name) for d in options["images"]))


def _batch(text: str | None) -> Any:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"--batch-size {text!r} is neither a number nor `auto`.") from error


def _modern(options: dict[str, Any]) -> dict[str, Any]:
    """Take the spellings of the scripts that people come from, and say the new ones."""
    options, said = dict(options), []
    data_dir, subj = options.pop("data_dir"), options.pop("subj")
    output_dir, batch = options.pop("output_dir"), options.pop("old_batch_size")
    if data_dir:
        folder = _old_subject(data_dir, subj)
        options["subject_dirs"] = (*options["subject_dirs"], folder)
        said.append(f"--subject-dir {folder}")
    if output_dir:
        options["store"] = options["store"] or output_dir
        said.append(f"--store {options['store']}")
    if batch:
        options["batch_size"] = options["batch_size"] or batch
        said.append(f"--batch-size {options['batch_size']}")
    if said:
        click.echo(f"brainenc: these flags are old; today's are {redact(' '.join(said))}", err=True)
    return options


def _old_subject(data_dir: str, subj: str | None) -> str:
    """``--data_dir`` was either the subject's own folder or the one above it."""
    name = f"subj{int(subj):02d}" if subj and subj.isdecimal() else subj
    folder = data_dir.rstrip("/")
    return f"{folder}/{name}" if name and Path(folder, name).is_dir() else folder
