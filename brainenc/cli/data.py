"""``brainenc data``: make and check subject folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from brainenc.cli.local_out import LocalOut
from brainenc.cli.progress import Progress

EXAMPLE = """
\b
Example:
  brainenc data synth --out data/subj01 --n-train 400 --n-test 40 --vertices 600,640
  brainenc data check data/subj01
"""


@click.group("data", epilog=EXAMPLE)
def command() -> None:
    """Make a synthetic subject, or check a subject folder."""


class _Vertices(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in click 8.3 only
    """``19004,20544``, or one number for both hemispheres."""

    name = "LH,RH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = [int(part) for part in str(value).split(",")]
            lh, rh = numbers * 2 if len(numbers) == 1 else numbers
        except ValueError:
            self.fail(f"{value!r} is not one or two numbers of vertices; write for example 19004,20544.", param, ctx)
        return lh, rh


@command.command("synth", epilog=EXAMPLE)
@click.option(
    "--out", required=True, type=LocalOut(file_okay=False, path_type=Path),
    help="The subject's folder if its name is subj01 to subj99; else subj01 is made in it.",
)  # fmt: skip
@click.option("--n-train", "--train", type=int, default=400, show_default=True, help="Training images.")
@click.option("--n-test", "--test", type=int, default=40, show_default=True, help="Test images.")
@click.option("--vertices", type=_Vertices(), default="600,640", show_default=True, help="Of each hemisphere.")
@click.option("--ceiling", type=float, default=0.7, show_default=True, help="Best reachable correlation, mean of ROIs.")
@click.option("--rank", type=int, default=3, show_default=True, help="Values that a ROI reads out of its location.")
@click.option(
    "--width", type=float, default=0.1, show_default=True, help="SD of a ROI's window, a fraction of the image."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of images, ROIs, readouts and noise.")
@click.option(
    "--backbone", metavar="NAME|FOLDER",
    help="Whose features the responses are read out of. By default a small seeded DINOv2, saved in `backbone` beside.",
)  # fmt: skip
@click.option("--feature", default="-1.token", show_default=True, help="Layer and facet of it; a map of tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print the truth as JSON.")
def synth(out: Path, backbone: str | None, feature: str, as_json: bool, **sizes: Any) -> None:
    """A subject in the Algonauts 2023 layout with a planted, known answer.

    Images are crops, flips and blends of the photographs in scikit-image. Responses are a readout of real backbone
    features at each ROI's own location, plus noise of known size: truth.json says what can be reached. Test responses
    and noise ceilings go to the folder `organiser` beside the subject.
    """
    from brainenc.datasets.layout import is_subject_name
    from brainenc.datasets.synthetic import synthesize
    from brainenc.extract.backbone import load_backbone
    from brainenc.extract.maps import feature_maps

    out = out.expanduser().absolute()
    folder = out if is_subject_name(out.name) else out / "subj01"
    model = load_backbone(backbone or _small_backbone(folder.parent / "backbone", seed=sizes["seed"]))
    source = {"backbone": model.info.slug, "weights": model.info.weights_hash, "feature": feature}
    with Progress("data synth", json_lines=as_json) as progress:
        truth = synthesize(
            folder, features=feature_maps(model, feature), source=source, progress=progress.update, **sizes
        )
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **truth.content}))
        return
    click.echo(f"{folder}: {sizes['n_train']} training and {sizes['n_test']} test images.")
    click.echo(
        f"Best reachable val_perf {truth.max_val_perf:.4f} (truth.json); responses of {model.info.slug} {feature}."
    )


def _small_backbone(folder: Path, *, seed: int) -> str:
    from brainenc.extract.miniature import save_miniature

    if not (folder / "config.json").exists():
        save_miniature("dinov2", folder, seed=seed, hidden_size=64, num_hidden_layers=3, image_size=434, patch_size=14)
    return str(folder)


@command.command("check", epilog=EXAMPLE)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def check_command(folder: Path, as_json: bool) -> int:
    """Is DIR a usable subject folder, and what is missing? Exit code 0 if it is, 1 if not. Reads all responses."""
    from brainenc.datasets.check import check
    from brainenc.featurestore.places import may_be_mapped

    result = check(folder, mapped=may_be_mapped(folder))
    if as_json:
        click.echo(json.dumps(result.to_dict()))
    else:
        lh, rh = result.n_vertices
        click.echo(f"{result.folder}{' (synthetic)' if result.synthetic else ''}")
        click.echo(
            f"  {result.n_train} training and {result.n_test} test images; {lh} + {rh} vertices; {result.n_rois} ROIs"
        )
        for problem in result.problems:
            click.echo(f"  problem: {problem}")
        for note in result.notes:
            click.echo(f"  note: {note}")
        click.echo("usable" if result.usable else "not usable")
    return 0 if result.usable else 1
