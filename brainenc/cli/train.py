"""``brainenc train``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from brainenc.addresses import resolve
from brainenc.cli.progress import Progress
from brainenc.cli.train_options import absolute, config_from, given_fields, split_source, train_options
from brainenc.errors import UsageError
from brainenc.redact import redact

if TYPE_CHECKING:  # torch takes seconds, which `--help` need not wait for
    from brainenc.train.config import TrainConfig

Announce = Callable[[Mapping[str, Any]], None]
"""Says what the guard will do with these settings."""

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

    Exit code 75 means stopped safely: the same command, or `--resume RUN`, goes on from there.
    """
    given, source = split_source(given_fields(options))
    resolve(given.get("address"), command="train")  # refuse what cannot be joined before a run folder is touched
    run = resume_run or given.get("out")
    if resume_run is not None and "out" in given:
        raise UsageError(f"--resume {resume_run} goes on in its own folder: leave out --out {given['out']}.")
    begun = resume_run is None and run is not None and _begun(run)
    new = resume_run is None and not begun
    with Progress("train", json_lines=as_json) as progress, _worked_on(run, new, progress) as folder:
        shown = {"progress": _Shown(progress), "note": progress.note}
        banner: Announce = (lambda _: None) if as_json else (lambda settings: _banner(settings, progress.note))
        if new:
            result = _start({**given, **folder}, source, shown, banner)
        elif begun:
            result = _again({**given, **folder}, source, shown, banner)
        else:
            result = _resume(folder["out"], given, source, shown, banner)
    worked_in = result.run_folder
    if run:
        result = replace(result, run_folder=redact(absolute(run)))
    if result.checkpoint and not as_json:
        click.echo(_emergency(result), err=True)
    click.echo(json.dumps(_plain(result)) if as_json else _summary(result, given.get("address"), worked_in))
    if result.error is not None:
        raise result.error
    return int(result.exit_code)


@contextmanager
def _worked_on(run: str | None, new: bool, progress: Progress) -> Iterator[dict[str, str]]:
    """``out``, as training takes it: a local folder, sent on where the run is to be elsewhere."""
    from brainenc.train.elsewhere import local_run

    if run is None:  # refused with all else that is lacking
        yield {}
        return
    with local_run(absolute(run) or run, new=new, note=progress.note) as folder:
        yield {"out": str(folder)}


def _begun(run: str) -> bool:
    from brainenc.train.elsewhere import has_run

    return has_run(absolute(run) or run)


def _start(given: dict[str, Any], source: dict[str, Any], shown: dict[str, Any], banner: Announce) -> Any:
    from brainenc.train.launch import train

    config, views = _asked(given, source)
    banner(config.guard)  # not before what was asked for makes sense: an error must not hide below it
    return train(config, open_views=views, **shown)


def _again(given: dict[str, Any], source: dict[str, Any], shown: dict[str, Any], banner: Announce) -> Any:
    """The same command again, as a scheduler gives it after a requeue: go on, unless it means another run."""
    from brainenc.train.launch import resume

    config, views = _asked(given, source)
    asked = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("id", "split")}
    if (left := _left(config.out, asked)) is not None:
        banner(left.guard)
    return resume(config.out, asked, open_views=views, **shown)


def _asked(given: dict[str, Any], source: dict[str, Any]) -> tuple[TrainConfig, Any]:
    """The configuration that the options mean, and what computes features on the fly, if anything does."""
    if not source:
        return config_from(given), None
    from brainenc.cli.on_the_fly import views_of

    texts = tuple(given.pop("features", ()))
    config = config_from(given)
    views = views_of(config.subject_dir, {**source, "features": texts})
    return replace(config, features=tuple(views.names()), source={**source, "features": list(texts)}), views


def _resume(run: str, given: dict[str, Any], source: dict[str, Any], shown: dict[str, Any], banner: Announce) -> Any:
    from brainenc.cli.on_the_fly import views_of_run
    from brainenc.train.launch import resume
    from brainenc.train.run_folder import RunFolder

    if source:
        raise UsageError("A resumed run computes features as it did before: leave out --on-the-fly and its options.")
    views = views_of_run(run, given.get("subject_dir"))
    if "guard" in given:  # what is not said again stays
        given = {**given, "guard": {**RunFolder(run).config().guard, **given["guard"]}}
    if (left := _left(run, given)) is not None:
        banner(left.guard)
    return resume(run, given, open_views=views, **shown)


def _left(run: str, changes: dict[str, Any]) -> TrainConfig | None:
    """How the run goes on; None where nothing is left to guard: of a finished run one line says so, and no more."""
    from brainenc.train import finished
    from brainenc.train.run_folder import RunFolder

    config = RunFolder(run).config().resumed_with({**changes, "out": run})
    return config if finished.find(config) is None else None


def _banner(settings: Mapping[str, Any], note: Any) -> None:
    from brainenc.train import guarding

    if settings.get("enabled", True):
        note(guarding.start_banner(settings))


def _emergency(result: Any) -> str:
    from brainenc.train import guarding

    size = sum(file.stat().st_size for file in Path(result.checkpoint).glob("*"))
    return guarding.emergency_block(
        reason=result.reason, epoch=result.epoch, step=result.step, saved=result.checkpoint, seconds=result.save_s,
        n_bytes=size,
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


def _summary(result: Any, address: str | None, folder: str) -> str:
    """How it ended, for people; the guard's record lies in this folder, a bucket's run's too."""
    if result.status == "done":
        best = "not known" if result.val_perf is None else f"{result.val_perf:.4f}"
        return f"{result.run_folder}: done, {result.step} steps, best val_perf {best}."
    from brainenc.train.elsewhere import resume_command

    where = f", saved in {result.checkpoint}" if result.checkpoint else ""
    guarded = (Path(folder) / "guard.jsonl").exists()
    saw = f"\nWhat the guard saw: brainenc guard status {shlex.quote(folder)}" if guarded else ""
    return (
        f"{result.run_folder}: {result.status} at epoch {result.epoch}, step {result.step} ({result.reason}){where}. "
        f"Go on with: {resume_command(result.run_folder, address)}" + saw
    )
