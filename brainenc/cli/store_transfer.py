"""``brainenc store cp | export | import``: features between stores, and to and from plain NumPy files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from brainenc.cli.local_out import LocalOut
from brainenc.cli.progress import Progress
from brainenc.cli.staging import stage_option, tell_handed_over
from brainenc.datasets.algonauts import Subject
from brainenc.errors import DataError, UsageError
from brainenc.featurestore.exports import Exported, adeli_note, export_adeli, export_folder
from brainenc.featurestore.imports import adeli_import_note, import_adeli, import_images, import_npy, is_adeli
from brainenc.featurestore.places import is_staged
from brainenc.featurestore.store import FeatureStore, open_store
from brainenc.featurestore.transfer import copy, select_keys
from brainenc.featurestore.view import FeatureView
from brainenc.units import format_bytes, format_seconds

_json = click.option("--json", "as_json", is_flag=True, help="Print results as JSON.")


@click.command("cp", epilog="\b\nExample: brainenc store cp gs://lab/features ~/features 'subj01-*/dinov2-base/11.q'")
@click.argument("source")
@click.argument("target")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option(
    "--source-stage/--no-source-stage",
    default=None,
    help="The same for the source.",
)
@stage_option
@_json
def cp_command(
    source: str, target: str, keys: tuple[str, ...], source_stage: bool | None, stage: bool | None, as_json: bool
) -> None:
    """Copy collections (all, or by key or pattern) from one store to another, wherever both lie.

    Every shard is checked when it arrives. What is in the target already is passed over: the same command goes on where
    an interrupted one stopped.
    """
    origin = open_store(source, stage=source_stage)
    chosen = select_keys(origin, keys)
    goal = open_store(target, create=True, stage=stage)
    with Progress("cp", json_lines=as_json) as progress:
        done = copy(
            origin,
            goal,
            chosen,
            progress=lambda n, of, n_bytes: progress.update(n, of, copied=format_bytes(n_bytes)),
        )
    if as_json:
        fields: dict[str, Any] = {
            "keys": done.keys, "shards": done.shards, "shards_there": done.shards_there, "bytes": done.bytes,
            "confirmed": goal.place.can.real_flush,
        }  # fmt: skip
        click.echo(json.dumps({"source": origin.url, "target": goal.url, **fields, "seconds": done.seconds}))
        return
    there = f" ({done.shards_there} were there already)" if done.shards_there else ""
    speed = format_bytes(done.bytes / max(done.seconds, 1e-9))
    click.echo(
        f"{goal.url}: {len(done.keys)} collections, {done.shards} shards copied{there}, {format_bytes(done.bytes)} in "
        f"{format_seconds(done.seconds)} ({speed}/s)."
    )
    tell_handed_over(goal.place.can.real_flush)


@click.command(
    "export",
    epilog="\b\nExample: brainenc store export features subj01-train/dinov2-base/11.q --layout adeli --out saved_feats",
)
@click.argument("store")
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@click.option(
    "--layout", type=click.Choice(["adeli", "npy"]), default="npy", show_default=True, help="Folders to write."
)
@click.option("--out", type=LocalOut(path_type=Path, file_okay=False), required=True, help="Parent of the folders.")
@click.option("--test", "test_key", metavar="KEY", help="adeli: the test images' collection [default: ...-test/...].")
@click.option("--clip", "clip_key", metavar="KEY", help="adeli: features of width 512 for clip_vit_512/.")
@click.option("--subject", type=click.IntRange(1, 99), help="adeli: the subject's number [default: from the key].")
@click.option("--dtype", type=click.Choice(["float32", "float16", "stored"]), default="float32", show_default=True)
@stage_option
@_json
def export_command(
    store: str, keys: tuple[str, ...], layout: str, out: Path, test_key: str | None, clip_key: str | None,
    subject: int | None, dtype: str, stage: bool | None, as_json: bool,
) -> None:  # fmt: skip
    """Write features as plain NumPy files: the published code's folders (adeli), or one .npy a collection (npy).

    A file that is there with the same rows is left alone, one with others is an error.
    """
    opened = open_store(store, stage=stage)
    with Progress("export", json_lines=as_json) as progress:

        def shown(done: int, total: int) -> None:
            progress.update(done, total)

        if layout == "adeli":
            if len(keys) != 1:
                raise UsageError("The adeli layout takes one KEY, the q features of a subject's training images.")
            made = export_adeli(
                opened, keys[0], out, test_key=test_key, clip_key=clip_key, subject=subject, progress=shown
            )
        else:
            made = export_folder(
                opened, select_keys(opened, keys), out, dtype=None if dtype == "stored" else dtype, progress=shown
            )
    note = adeli_note(made) if layout == "adeli" else ""
    _print_exported(made, note, as_json, flushed=not is_staged(out))


@click.command(
    "import",
    epilog="\b\nExample: brainenc store import features saved_feats/dinov2_q_last/01 --subject-dir data/subj01",
)
@click.argument("store")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--key", help="Collection to make; dinov2_q_last/01 and clip_vit_512/01 take none.")
@click.option("--ids", "ids_file", type=click.Path(path_type=Path), help="Stimulus ids, one a line.")
@click.option("--subject-dir", type=click.Path(path_type=Path), help="Take the ids from its images.")
@click.option(
    "--dtype", type=click.Choice(["float16", "float32", "bfloat16"]), help="Storage dtype [default: the file's]."
)
@click.option(
    "--backbone", help="For folders with train.npy: second part of the keys [default: by dinov2_q_last, clip_vit_512]."
)
@click.option("--feature", help="For folders with train.npy: third part of the keys [default: as for --backbone].")
@stage_option
@_json
def import_command(
    store: str, path: Path, key: str | None, ids_file: Path | None, subject_dir: Path | None, dtype: str | None,
    backbone: str | None, feature: str | None, stage: bool | None, as_json: bool,
) -> None:  # fmt: skip
    """Take over features made elsewhere: one .npy of rows, dinov2_q_last/01, or a folder with one .npy an image."""
    for wanted in (path, ids_file):
        if wanted is not None and not wanted.exists():
            raise DataError(f"{wanted} is not there.")
    published = path.is_dir() and is_adeli(path)
    if published and key is not None:
        raise UsageError(
            f"{path} holds two splits and --key {key} names one collection: say --backbone and --feature instead, or "
            "import its files one by one."
        )
    opened, note = open_store(store, create=True, stage=stage), ""
    with Progress("import", json_lines=as_json) as progress:

        def shown(done: int, total: int) -> None:
            progress.update(done, total)

        if published:
            ids = (
                None
                if subject_dir is None
                else {split: Subject.open(subject_dir).ids(split) for split in ("train", "test")}
            )
            views = import_adeli(opened, path, backbone=backbone, feature=feature, ids=ids, dtype=dtype, progress=shown)
            note = adeli_import_note(views)
        elif key is None:
            raise UsageError(
                f"{path} does not say what it holds: name the collection, --key subj01-train/net/layer.facet."
            )
        elif path.is_dir():
            views = [import_images(opened, key, path, dtype=dtype, progress=shown)]
        else:
            names = _ids(key, ids_file, subject_dir)
            views = [import_npy(opened, key, path, ids=names, dtype=dtype, progress=shown)]
    _print_imported(opened, views, note, as_json)


def _ids(key: str, ids_file: Path | None, subject_dir: Path | None) -> Sequence[str] | None:
    if ids_file is not None:
        return ids_file.read_text(encoding="utf-8").splitlines()
    if subject_dir is None:
        return None
    return Subject.open(subject_dir).ids("test" if key.partition("/")[0].endswith("-test") else "train")


def _print_exported(made: Sequence[Exported], note: str, as_json: bool, *, flushed: bool) -> None:
    if as_json:
        files: list[dict[str, Any]] = [
            {"path": str(one.path), "key": one.key, "shape": one.shape, "dtype": one.dtype, "there": one.there}
            for one in made
        ]
        click.echo(json.dumps({"files": files, "note": note, "confirmed": flushed}))
        return
    for one in made:
        there = ", was there already" if one.there else ""
        click.echo(f"{one.path}: {'x'.join(map(str, one.shape))} {one.dtype}, from {one.key}{there}")
    if note:
        click.echo(note, err=True)
    tell_handed_over(flushed)


def _print_imported(store: FeatureStore, views: Sequence[FeatureView], note: str, as_json: bool) -> None:
    url, flushed = store.url, store.place.can.real_flush
    if as_json:
        found = [{"key": view.key, "shape": view.shape, "dtype": view.dtype.name} for view in views]
        click.echo(json.dumps({"store": url, "collections": found, "note": note, "confirmed": flushed}))
        return
    for view in views:
        click.echo(f"{view.key}: {'x'.join(map(str, view.shape))} {view.dtype}, in {url}")
    if note:
        click.echo(note, err=True)
    tell_handed_over(flushed)
