"""``brainenc extract``: features of images into a store."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from brainenc.cli.progress import Progress
from brainenc.errors import UsageError
from brainenc.extract.config import (
    COMPUTES,
    DTYPES,
    SHARD_BYTES,
    ExtractConfig,
    ExtractProgress,
    ExtractSummary,
    Source,
)
from brainenc.units import format_bytes, format_seconds, parse_bytes, parse_seconds

_Command = Callable[..., Any]


def source_options(command: _Command) -> _Command:
    """What to extract, from what, and where to: shared by ``extract`` and ``plan``."""
    options = [
        click.option("--subject-dir", "subject_dirs", multiple=True, metavar="DIR", help="Algonauts 2023 subject folder: makes the sets DIR-train and DIR-test. May be given again."),
        click.option("--images", "images", multiple=True, metavar="PATH", help="Folder (searched recursively), list (.txt, .csv, .tsv) or nsd_stimuli.hdf5; a path or URL. May be given again."),
        click.option("--stimuli", metavar="NAME", help="Name of the stimulus set, instead of the folder's."),
        click.option("--by-id", is_flag=True, help="Merge all sources into one set (--stimuli NAME) by stimulus id: shared images get one row."),
        click.option("--store", metavar="URL", help="Feature store: a folder or any fsspec URL; created if absent."),
        click.option("--backbone", metavar="NAME", help="facebook/dinov2-base, a save_pretrained folder, open_clip:ViT-L-14/openai, timm:NAME, torchvision:resnet50."),
        click.option("--preset", metavar="NAME", help="A published recipe: dinov2_q, dinov2, clip, resnet50, or one of these with _cls."),
        click.option("--feature", "features", multiple=True, metavar="LAYER.FACET", help="11.q, -1.token, 8-11.k, norm.cls ... May be given again: all cost one pass."),
        click.option("--name", "slug", metavar="NAME", help="Name of the backbone in keys, instead of the last part of its own."),
        click.option("--size-policy", type=click.Choice(("pad", "resize", "crop")), help="How images become the model's input; by default what it was made for."),
        click.option("--image-size", type=int, metavar="PIXELS", help="Edge of the model's input."),
        click.option("--batch-size", metavar="N", help="Images a forward pass, or `auto`; by default 8 on a CPU, 32 on a GPU. A collection keeps its own."),
        click.option("--rows-per-shard", type=int, metavar="N", help="By default what makes shards of --shard-size."),
        click.option("--shard-size", default=f"{SHARD_BYTES >> 20}MiB", show_default=True, metavar="SIZE", help="Size of a shard of the largest feature."),
        click.option("--dtype", type=click.Choice(DTYPES), default="float16", show_default=True, help="What is stored."),
        click.option("--compute", type=click.Choice(COMPUTES), default="float32", show_default=True, help="What the model computes in; other than float32: autocast, and part of the provenance."),
        click.option("--format", "shard_format", type=click.Choice(("arrow", "npy")), default="arrow", show_default=True, help="Format of the shards."),
        click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True, help="Where the model runs."),
        click.option("--actors", type=int, metavar="N", help="Copies of the model; by default one per GPU, else one."),
        click.option("--threads", type=int, metavar="N", help="Threads a copy computes with; by default the cores divided among the copies."),
        click.option("--stage/--no-stage", default=None, help="Treat the store as a mount without a real flush, or not; by default found out."),
        click.option("--json", "as_json", is_flag=True, help="Print objects instead of text."),
        click.option("--debug", is_flag=True, hidden=True),
        click.option("--data_dir", hidden=True),
        click.option("--output_dir", hidden=True),
        click.option("--subj", hidden=True),
        click.option("--batch_size", "old_batch_size", hidden=True),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command("extract")
@source_options
@click.option("--on-bad-image", type=click.Choice(("fail", "null")), default="fail", show_default=True, help="List unreadable images in one error after everything else is sealed, or leave their rows empty.")  # fmt: skip
@click.option(
    "--check-images", is_flag=True, help="Read all images again and compare them with what features were made of."
)
@click.option("--max-attempts", type=int, default=3, show_default=True, help="How often a shard may lose its worker.")
@click.option("--commit-every", default="60s", show_default=True, metavar="TIME", help="How often readers get to see what is sealed.")  # fmt: skip
@click.option("--address", metavar="HOST:PORT", help="Ray cluster to run on: auto or host:port; by default a local one for this run.")  # fmt: skip
def command(
    on_bad_image: str, check_images: bool, max_attempts: int, commit_every: str, address: str | None, as_json: bool,
    debug: bool, **options: Any,
) -> int:  # fmt: skip
    """Compute features of images with a frozen backbone, and add them to a store.

    Whatever the store has already is left alone, so that the same command goes on after any interruption, and another
    layer costs only that layer.

    \b
    Example:
      brainenc extract --subject-dir data/subj01 --store features --backbone facebook/dinov2-base \\
        --feature 11.q --feature norm.token
    """
    config = config_from(
        options, on_bad_image=on_bad_image, check_images=check_images, max_attempts=max_attempts,
        commit_every_s=parse_seconds(commit_every), address=address,
    )  # fmt: skip
    from brainenc.extract.pipeline import extract  # late: imports Ray and torch, which --help needs not

    with Progress("extract", json_lines=as_json) as shown:
        summary = extract(config, progress=lambda p: _show(shown, p))
    _print(summary, as_json)
    return 0


def config_from(options: dict[str, Any], **more: Any) -> ExtractConfig:
    """The configuration that the shared options describe; old spellings are taken and answered with the new ones.

    Raises:
        UsageError: they do not go together.
    """
    options = _modern(options)
    backbone, features, extra = _backbone(options)
    if not options["store"]:
        raise UsageError("No store was named. Add --store FOLDER (or a URL such as gs://lab/features).")
    return ExtractConfig(
        store=options["store"], backbone=backbone, features=features, sources=_sources(options), slug=options["slug"],
        by_id=options["by_id"], stimuli=options["stimuli"] if options["by_id"] else None,
        micro_batch=_batch(options["batch_size"]), rows_per_shard=options["rows_per_shard"],
        shard_bytes=parse_bytes(options["shard_size"]), dtype=options["dtype"], compute=options["compute"],
        format=options["shard_format"], actors=options["actors"], threads=options["threads"], device=options["device"],
        stage=options["stage"], **({"size_policy": options["size_policy"], "image_size": options["image_size"]} | extra),
        **more,
    )  # fmt: skip


def _sources(options: dict[str, Any]) -> tuple[Source, ...]:
    name = None if options["by_id"] else options["stimuli"]
    subjects = [Source(location=d, kind="subject", stimuli=name) for d in options["subject_dirs"]]
    return (*subjects, *(Source(location=d, stimuli=name) for d in options["images"]))


def _backbone(options: dict[str, Any]) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    if options["preset"] and options["backbone"]:
        raise UsageError("--preset names a backbone already; leave out --backbone.")
    name = options["preset"] or options["backbone"]
    if not name:
        raise UsageError("No backbone was named. Add --backbone facebook/dinov2-base, or --preset dinov2_q.")
    return name, options["features"], {}


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
        click.echo(f"brainenc: old flags were given; today's are {' '.join(said)}", err=True)
    return options


def _old_subject(data_dir: str, subj: str | None) -> str:
    """``--data_dir`` was either the subject's own folder or the one above it."""
    name = f"subj{int(subj):02d}" if subj and subj.isdecimal() else subj
    folder = data_dir.rstrip("/")
    return folder if not name or folder.split("/")[-1] == name else f"{folder}/{name}"


def _show(shown: Progress, p: ExtractProgress) -> None:
    if p.note:
        shown.note(p.note)
    figures = {"images_per_s": round(p.images_per_s, 2), "shards": f"{p.shards_sealed}/{p.shards_total}"}
    if p.memory_bytes:
        figures["RAM"] = format_bytes(p.memory_bytes)
    if p.gpu_fraction is not None:
        figures["GPU"] = f"{p.gpu_fraction:.0%}"
    if p.retries:
        figures["retries"] = p.retries
    shown.update(p.images_done, p.images_total, **figures)


def _print(summary: ExtractSummary, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(summary.to_dict()))
        return
    for warning in summary.warnings:
        click.echo(f"note: {warning}")
    if not summary.images:
        click.echo(f"Nothing to do: all {summary.shards_before} shards were there ({format_seconds(summary.seconds)}).")
    else:
        click.echo(
            f"{summary.images} images at {summary.images_per_s:.3g} a second, {summary.shards_sealed} shards sealed "
            f"({summary.shards_before} were there), in {format_seconds(summary.seconds)}."
        )
    for uri, why in summary.missing.items():
        click.echo(f"missing row: {uri}: {why}")
    for key in summary.keys:
        click.echo(f"{summary.store}  {key}")
