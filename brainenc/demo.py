"""The whole path on a small subject: make it, extract, train, compare with what was planted.

Everything is real and small: a DINOv2 with seeded weights loaded as any local model is, Ray Data, the feature store,
Ray Train with two workers. Leaves ``data/subj01``, ``backbone``, ``store`` and ``run`` to go on from.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from brainenc.datasets.synthetic import synthesize
from brainenc.datasets.truth import Truth
from brainenc.errors import TrainingFailed
from brainenc.extract.config import ExtractConfig, ExtractProgress, ExtractSummary, Source
from brainenc.train.config import TrainConfig
from brainenc.units import format_seconds

FEATURE = "-1.q"
SLUG = "dino-mini"
BACKBONE = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 434, "patch_size": 14,
}  # fmt: skip
"""A DINOv2 at its real resolution (31 x 31 tokens and CLS), narrow and shallow enough for two cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """How large the demo is. The defaults stay under two minutes and 4 GB on two cores."""

    out: Path
    n_train: int = 320
    n_test: int = 40
    vertices: tuple[int, int] = (480, 520)
    epochs: int = 12
    learning_rate: float = 2e-3
    """Higher than published: a few hundred images and a minute, not ten thousand and an hour."""
    workers: int = 2
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What was reached against what could be."""

    val_perf: float
    max_val_perf: float
    run_folder: Path
    picture: Path | None
    seconds: float

    @property
    def share(self) -> float:
        """Of the planted ceiling."""
        return self.val_perf / self.max_val_perf


class Stage(Protocol):
    """Shows one stage: ``brainenc.cli.progress.Progress`` is one."""

    def update(self, done: float, total: float | None = None, **figures: Any) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


def run_demo(config: DemoConfig, stage: Callable[[str], Stage]) -> DemoResult:
    """Run the four stages; each finds what an earlier, interrupted demo finished.

    Args:
        config: sizes and where to.
        stage: makes what shows the progress of a stage, from its name.

    Raises:
        BrainencError: a stage failed.
    """
    started = time.monotonic()
    backbone = make_backbone(config)
    truth = make_subject(config, backbone, stage("subject"))
    extracted = extract_features(config, backbone, stage("extract"))
    feature = extracted.keys[0].partition("/")[2]  # without the stimulus set; -1 has become a number
    val_perf = train_encoder(config, feature, stage("train"))
    run = config.out / "run"
    return DemoResult(
        val_perf=val_perf, max_val_perf=truth.max_val_perf, run_folder=run, picture=draw(config, run),
        seconds=time.monotonic() - started,
    )  # fmt: skip


def make_backbone(config: DemoConfig) -> Path:
    """Save the small DINOv2, unless it is there."""
    from brainenc.extract.miniature import save_miniature

    folder = config.out / "backbone"
    if not (folder / "config.json").exists():
        save_miniature("dinov2", folder, seed=config.seed, **BACKBONE)
    return folder


def make_subject(config: DemoConfig, backbone: Path, shown: Stage) -> Truth:
    """Make the synthetic subject, whose responses are read out of that backbone's features."""
    import torch

    from brainenc.extract.backbone import load_backbone
    from brainenc.extract.maps import feature_maps

    threads = torch.get_num_threads()
    try:
        return synthesize(
            config.out / "data" / "subj01",
            features=feature_maps(load_backbone(str(backbone)), FEATURE),
            n_train=config.n_train, n_test=config.n_test, vertices=config.vertices, seed=config.seed,
            source={"backbone": SLUG, "feature": FEATURE}, progress=shown.update,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
        shown.close()


def extract_features(config: DemoConfig, backbone: Path, shown: Stage) -> ExtractSummary:
    """Ray Data over the subject's images, into the store."""
    from brainenc.extract.driver import extract

    asked = ExtractConfig(
        store=str(config.out / "store"), backbone=str(backbone), slug=SLUG, features=(FEATURE,),
        sources=(Source(location=str(config.out / "data" / "subj01"), kind="subject"),),
        actors=config.workers, threads=1, rows_per_shard=32, address="local",
    )  # fmt: skip

    def show(now: ExtractProgress) -> None:
        shown.update(now.images_done, now.images_total, images_per_s=now.images_per_s, shards=now.shards_sealed)

    try:
        return extract(asked, progress=show)
    finally:
        shown.close()


def train_encoder(config: DemoConfig, feature: str, shown: Stage) -> float:
    """Ray Train on the store; returns the best validation correlation."""
    from brainenc.allocator import give_back
    from brainenc.train.launch import resume, train

    give_back()  # what making features and extraction took in this process: the workers need it now
    run = config.out / "run"
    asked = TrainConfig(
        subject_dir=str(config.out / "data" / "subj01"),
        out=str(run),
        store=str(config.out / "store"),
        features=(feature,),
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_drop=max(1, config.epochs // 2),
        lr_gamma=0.2,
        workers=str(config.workers),
        threads=1,
        seed=config.seed,
        address="local",
    )

    def show(record: Mapping[str, Any]) -> None:
        if record.get("split") == "val":
            shown.update(record["epoch"] + 1, config.epochs, val_perf=record["val_perf"])

    try:
        begun = (run / "config.yaml").exists()
        result = resume(run, progress=show, note=shown.note) if begun else train(asked, progress=show, note=shown.note)
    finally:
        shown.close()
    if result.error is not None:
        raise result.error
    if result.val_perf is None:
        raise TrainingFailed(f"The run in {run} ended without a validation: {result.reason or result.status}.")
    return result.val_perf


def draw(config: DemoConfig, run: Path) -> Path | None:
    """Accuracy per ROI against its ceiling, where matplotlib is installed."""
    from brainenc.report.figures import accuracy_per_roi

    return accuracy_per_roi(run)


def closing_lines(result: DemoResult) -> list[str]:
    """What a newcomer reads at the end."""
    picture = (
        f"Accuracy per ROI against its ceiling: {result.picture}" if result.picture else "No picture: no matplotlib."
    )
    return [
        f"Reached a validation correlation of {result.val_perf:.3f}; {result.max_val_perf:.3f} could be reached: "
        f"{result.share:.0%} of the planted ceiling, in {format_seconds(result.seconds)}.",
        picture,
        f"Go on from here: brainenc report {shlex.quote(str(result.run_folder))}",
    ]
