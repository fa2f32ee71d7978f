"""``brainenc train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from brainenc.cli.progress import Progress
from brainenc.errors import UsageError

EXAMPLE = """
\b
Example:
  brainenc train --subject-dir data/subj01 --store features --feature dinov2-base/11.q \\
      --encoder transformer --readout rois_all --out runs/first
  brainenc train --resume runs/first
"""


def _path(value: str | None) -> str | None:
    """Absolute, because workers start elsewhere; URLs stay."""
    return value if value is None or "://" in value else str(Path(value).expanduser().absolute())


@click.command(epilog=EXAMPLE, context_settings={"show_default": True})
@click.option("--subject-dir", metavar="DIR", help="Algonauts 2023 subject folder.")
@click.option("--store", metavar="URL", help="Feature store: a folder or any fsspec URL.")
@click.option(
    "--feature", "features", multiple=True, metavar="BACKBONE/LAYER.FACET",
    help="Feature to train on, as in dinov2-base/11.q; again for more, joined along channels. :cls takes the CLS "
    "token alone, :mean the mean over the grid.",
)  # fmt: skip
@click.option("--stimuli", metavar="NAME", help="Stimulus set in the store; default <subject>-train.")
@click.option("--out", metavar="RUN", help="Run folder to make.")
@click.option("--resume", "resume_run", metavar="RUN", help="Go on with a run.")
@click.option("--encoder", help="transformer, custom_transformer, spatial_feature, linear.  [default: transformer]")
@click.option(
    "--readout", help="rois_all, streams, visuals, bodies, faces, places, words, hemis, voxels.  [default: rois_all]"
)
@click.option("--hidden", type=int, help="Width of tokens; that of the features when not given.")
@click.option("--heads", "n_heads", type=int, help="Attention heads.  [default: 16]")
@click.option("--decoder-layers", "n_decoder_layers", type=int, help="Decoder layers.  [default: 1]")
@click.option("--feedforward", type=int, help="Width inside the feed-forward network.  [default: 1024]")
@click.option("--dropout", type=float, help="[default: 0.1]")
@click.option("--epochs", type=int, help="[default: 15]")
@click.option("--batch-size", type=int, help="Over all workers.  [default: 16]")
@click.option("--micro-batch", type=int, help="Samples a worker computes at once; less memory, the same result.")
@click.option("--learning-rate", "--lr", type=float, help="[default: 0.0005]")
@click.option("--weight-decay", type=float, help="[default: 0.0001]")
@click.option("--lr-drop", type=int, help="Epochs between two drops of the learning rate.  [default: 100]")
@click.option("--clip", type=float, help="Largest norm of the gradient; 0: none.  [default: 0.1]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--split", metavar="idxs.npy", help="Reproduce a split: image numbers, those for training first.")
@click.option("--shuffle-responses", is_flag=True, default=None, help="Control: give each image another's responses.")
@click.option(
    "--workers", metavar="N|MIN:MAX", help="Workers; 0: in this process without Ray.  [default: GPUs, else 1]"
)
@click.option("--device", help="auto, cpu, cuda.  [default: auto]")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), help="[default: float32]")
@click.option("--compile", "compile_", is_flag=True, default=None, help="torch.compile the forward and loss.")
@click.option("--threads", type=int, help="CPU threads of a worker.")
@click.option("--address", help="Ray cluster to join: auto or host:port; else one is started for the run.")
@click.option("--max-failures", type=int, help="Worker failures survived before giving up; -1: any.  [default: 3]")
@click.option("--keep", type=int, help="Checkpoints kept beside the best.  [default: 2]")
@click.option(
    "--checkpoint-every", "checkpoint_every_s", metavar="TIME", help="Longest time between two.  [default: 5min]"
)
@click.option(
    "--snapshot-every", "snapshot_every_s", metavar="TIME", help="Rolling snapshots; 0: none.  [default: 15s]"
)
@click.option("--snapshot-dir", metavar="DIR", help="Local disk for rolling snapshots.")
@click.option("--tracker", "trackers", multiple=True, help="tensorboard, wandb; beside metrics.jsonl.")
@click.option(
    "--drill", multiple=True, metavar="FAULT@step=S,rank=R", help="A fault on purpose: oom, ram=0.95, sigterm, kill."
)
@click.option("--predict/--no-predict", default=None, help="Predict the test images at the end.  [default: predict]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and progress as JSON lines.")
def command(as_json: bool, resume_run: str | None, **options: Any) -> int:
    """Train a brain encoder on stored features, or go on with a run."""
    from brainenc.train.launch import resume, train

    given = _given(options)
    with Progress("train", json_lines=as_json) as progress:
        show = _Shown(progress)
        if resume_run is not None:
            result = resume(resume_run, given, progress=show, note=progress.note)
        else:
            result = train(_config(given), progress=show, note=progress.note)
    if as_json:
        click.echo(json.dumps(_plain(result)))
    else:
        click.echo(_summary(result))
    if result.error is not None:
        raise result.error
    return result.exit_code


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Options that were given, under the names of the configuration."""
    from brainenc.units import parse_seconds

    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if "compile_" in given:
        given["compile"] = given.pop("compile_")
    for name in ("subject_dir", "store", "out", "split", "snapshot_dir"):
        if name in given:
            given[name] = _path(given[name])
    for name in ("checkpoint_every_s", "snapshot_every_s"):
        if name in given:
            given[name] = parse_seconds(given[name])
    return given


_OF_THE_ENCODER = ("encoder", "readout", "hidden", "n_heads", "n_decoder_layers", "feedforward", "dropout")


def _config(given: dict[str, Any]) -> Any:
    from brainenc.train.config import TrainConfig
    from brainenc.train.encoders.base import EncoderConfig

    for name, option in (("subject_dir", "--subject-dir"), ("out", "--out")):
        if name not in given:
            raise UsageError(f"brainenc train needs {option}. For example: {EXAMPLE.split('Example:')[1].strip()}")
    encoder = EncoderConfig(**{name: given[name] for name in _OF_THE_ENCODER if name in given})
    rest = {name: value for name, value in given.items() if name not in _OF_THE_ENCODER}
    return TrainConfig(**rest, encoder=encoder)


class _Shown:
    """Records of a run on the progress line."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, record: Any) -> None:
        figures = {k: record[k] for k in ("epoch", "loss", "val_perf", "samples_per_s") if record.get(k) is not None}
        if record.get("split") == "val":
            self._progress.note(
                f"epoch {record['epoch']}: validation loss {record['loss']:.4g}, r {record['r_lh']:.4f} (lh) "
                f"{record['r_rh']:.4f} (rh), val_perf {record['val_perf']:.4f}"
            )
        else:
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
