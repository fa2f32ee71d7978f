"""``brainenc report``."""

from __future__ import annotations

import json

import click

from brainenc.redact import redact

EXAMPLE = """
\b
Example:
  brainenc report runs/first
"""


@click.command("report", epilog=EXAMPLE)
@click.argument("run", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print the paths as JSON.")
def command(run: str, as_json: bool) -> None:
    """Write RUN/report.html: accuracy per ROI against its ceiling, training, memory and configuration on one page.

    Also draws RUN/accuracy_per_roi.png where the run has been scored. Works on a run that is still going on.
    """
    from brainenc.report.figures import accuracy_per_roi
    from brainenc.report.page import write_report
    from brainenc.report.run_files import RunFiles
    from brainenc.train.elsewhere import run_to_look_at

    with run_to_look_at(run) as folder:
        page = write_report(folder)
        picture = accuracy_per_roi(folder) if RunFiles(folder).scores() is not None else None
        names = [path.name for path in (page, picture) if path is not None]
    written = [f"{redact(run.rstrip('/'))}/{name}" for name in names]  # where the run is, not where it was worked on
    click.echo(json.dumps(written) if as_json else "\n".join(written))
