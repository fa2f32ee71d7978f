"""``brainenc train``."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import click

from brainenc.cli.progress import Progress
from brainenc.cli.train_options import absolute, config_from, given_fields, split_source, train_options
from brainenc.errors import UsageError

EXAMPLE = """
\b
Example:
  brainenc train --subject-dir data/subj01 --store features --feature dinov2-base/11.q \\
      --encoder transformer --readout rois_all --out runs/first
  brainenc train --resume runs/first
"""


@click.command(epilog=EXAMPLE)
@train_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and progress as JSON lines.")
def command(as_json: bool, resume_run: str | None, **options: Any) -> int:
    """Train a brain encoder on stored features, or go on with a run.

    Exit code 75 means stopped safely: `--resume RUN` goes on from there.
    """
    given, source = split_source(given_fields(options))
    with Progress("train", json_lines=as_json) as progress:
        shown = {"progress": _Shown(progress), "note": progress.note}
        result = _start(given, source, shown) if resume_run is None else _resume(resume_run, given, source, shown)
    click.echo(json.dumps(_plain(result)) if as_json else _summary(result))
    if result.error is not None:
        raise result.error
    return int(result.exit_code)


def _start(given: dict[str, Any], source: dict[str, Any], shown: dict[str, Any]) -> Any:
    from brainenc.train.launch import train

    if not source:
        return train(config_from(given), **shown)
    texts = tuple(given.pop("features", ()))
    config = config_from(given)
    views = _views(config.subject_dir, {**source, "features": texts})
    config = replace(config, features=tuple(views.names()), source={**source, "features": list(texts)})
    return train(config, open_views=views, **shown)


def _resume(run: str, given: dict[str, Any], source: dict[str, Any], shown: dict[str, Any]) -> Any:
    from brainenc.train.launch import resume
    from brainenc.train.run_folder import RunFolder

    if source:
        raise UsageError("A resumed run computes features as it did before: leave out --on-the-fly and its options.")
    config = RunFolder(absolute(run)).config()
    views = _views(given.get("subject_dir", config.subject_dir), dict(config.source)) if config.source else None
    return resume(run, given, open_views=views, **shown)


def _views(subject_dir: str, source: dict[str, Any]) -> Any:
    from brainenc.cli.on_the_fly import on_the_fly

    backbone = source.get("preset") or source.get("backbone")
    if not source.get("on_the_fly") or not backbone:
        raise UsageError("--on-the-fly and --backbone (or --preset) go together; with a --store neither is needed.")
    return on_the_fly(
        subject_dir, backbone, source.get("features", ()),
        size_policy=source.get("size_policy"), image_size=source.get("image_size"),
    )  # fmt: skip


class _Shown:
    """Records of a run on the progress line."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, record: Any) -> None:
        if record.get("split") == "val":
            self._progress.note(
                f"epoch {record['epoch']}: validation loss {record['loss']:.4g}, r {record['r_lh']:.4f} (lh) "
                f"{record['r_rh']:.4f} (rh), val_perf {record['val_perf']:.4f}"
            )
            return
        names = ("epoch", "loss", "samples_per_s", "data_wait_share")
        figures = {name: record[name] for name in names if record.get(name) is not None}
        self._progress.update(record["step"], record.get("steps"), **figures)


def _plain(result: Any) -> dict[str, Any]:
    return {
        "status": result.status, "exit_code": result.exit_code, "run_folder": result.run_folder, "epoch": result.epoch,
        "step": result.step, "val_perf": result.val_perf, "reason": result.reason, "checkpoint": result.checkpoint,
    }  # fmt: skip


def _summary(result: Any) -> str:
    if result.status == "done":
        return f"{result.run_folder}: done, {result.step} steps, best val_perf {result.val_perf:.4f}."
    where = f", saved in {result.checkpoint}" if result.checkpoint else ""
    return (
        f"{result.run_folder}: {result.status} at epoch {result.epoch}, step {result.step} ({result.reason}){where}. "
        f"Go on with: brainenc train --resume {result.run_folder}"
    )
