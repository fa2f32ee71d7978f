"""``brainenc submit``: the challenge's zip from runs, checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from brainenc.cli.local_out import LocalOut
from brainenc.datasets.algonauts import Subject
from brainenc.datasets.rois import FAMILIES, HEMISPHERES
from brainenc.datasets.submission import CHALLENGE_SHAPES, SubmissionCheck, check_submission, write_submission
from brainenc.errors import UsageError
from brainenc.report.run_files import RunFiles

EXAMPLE = """
\b
Example:
  brainenc submit runs/subj0* --out submission.zip
  brainenc submit --check submission.zip
"""


@click.command("submit", epilog=EXAMPLE)
@click.argument("runs", metavar="RUN...", nargs=-1)
@click.option(
    "--out",
    type=LocalOut(dir_okay=False, path_type=Path),
    default=Path("submission.zip"),
    show_default=True,
    help="The zip.",
)
@click.option(
    "--check", "only_check", type=click.Path(dir_okay=False, path_type=Path), metavar="ZIP", help="Only check this zip."
)
@click.option("--all-subjects", is_flag=True, help="Fail unless all eight subjects are there, as the server wants.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def command(runs: Sequence[str], out: Path, only_check: Path | None, all_subjects: bool, as_json: bool) -> int:
    """Write the Algonauts 2023 submission from one run a subject, and check it before the server does.

    Shapes are held against each run's own subject folder; with --check alone, against the challenge's subjects (or
    those of the runs that are given beside it).
    """
    from brainenc.train.elsewhere import run_to_look_at

    if not runs and only_check is None:
        raise click.UsageError("Give one run a subject, or --check ZIP.")
    with ExitStack() as stack:
        folders = [stack.enter_context(run_to_look_at(run)) for run in runs]
        check, path = _submit(folders, out, only_check)
        against = _held_against(folders)
    _tell(check, path, against, as_json)
    return 1 if check.problems or (all_subjects and check.missing) else 0


def _submit(runs: Sequence[Path], out: Path, only_check: Path | None) -> tuple[SubmissionCheck, Path]:
    """Write the zip, or only check one; what was found, and the zip's path."""
    subjects = {_subject_of(run).name: run for run in runs}
    if len(subjects) < len(runs):
        raise UsageError(
            f"{len(runs)} runs are of {len(subjects)} subjects ({', '.join(subjects)}): give one run each."
        )
    shapes = dict(CHALLENGE_SHAPES) | {name: _shapes(_subject_of(run)) for name, run in subjects.items()}
    if only_check is not None:
        return check_submission(only_check, shapes), only_check
    return write_submission(out, {name: run / "predictions" for name, run in subjects.items()}, shapes), out


def _subject_of(run: Path) -> Subject:
    """The subject of a run.

    Raises:
        UsageError: no run, or one that predicts a part of the vertices only.
    """
    files = RunFiles(run)
    if files.readout in FAMILIES:
        raise UsageError(
            f"{run} predicts the ROIs of {files.readout!r} only and 0 elsewhere; the challenge scores all vertices. "
            "Submit a run with the readout rois_all, streams, hemis or voxels."
        )
    return files.subject()


def _shapes(subject: Subject) -> dict[str, tuple[int, int]]:
    n = len(subject.images("test"))
    return {h: (n, v) for h, v in zip(HEMISPHERES, subject.n_vertices, strict=True)}


def _held_against(runs: Sequence[Path]) -> str:
    """What the shapes were compared with, and whether the server would compare them with the same."""
    if not runs:
        return "the challenge's own subjects"
    subjects = [_subject_of(run) for run in runs]
    own = [s.name for s in subjects if _shapes(s) != CHALLENGE_SHAPES.get(s.name)]
    if not own:
        return "the subject folders of the runs"
    return (
        f"the subject folders of the runs, but {', '.join(own)} there has other shapes than in the challenge: its "
        "server would refuse these, and so does --check without the runs beside it"
    )


def _tell(check: SubmissionCheck, path: Path, against: str, as_json: bool) -> None:
    if as_json:
        found = {
            "zip": str(path),
            "against": against,
            "subjects": check.subjects,
            "problems": check.problems,
            "missing": check.missing,
        }
        click.echo(json.dumps(found))
        return
    click.echo(f"{path}: predictions of {', '.join(check.subjects) or 'nobody'}")
    for problem in check.problems:
        click.echo(f"  problem: {problem}")
    if check.missing:
        click.echo(f"  note: the server wants all eight subjects; missing: {', '.join(check.missing)}")
    if check.problems:
        click.echo(f"  held against {against}")
    else:
        click.echo(f"  type, values and folders are as the challenge wants them; shapes fit {against}")
