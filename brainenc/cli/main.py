"""``brainenc``: finds the command, runs it, turns errors into one paragraph and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped safely and resumable, 130 interrupted.
"""

from __future__ import annotations

import io
import logging
import sys
import traceback
from importlib import import_module

import click

import brainenc
from brainenc.cli.stopping import StopRequested, stoppable
from brainenc.errors import BrainencError
from brainenc.guard.messages import EXIT_STOPPED_SAFELY
from brainenc.redact import redact

COMMANDS = {
    "demo": "the whole path on a small subject made on the spot",
    "data": "make, check and inspect subject folders",
    "show-model": "layers, facets, token grid and bytes of a backbone",
    "plan": "rows, bytes, disk, RAM and time, before anything runs",
    "extract": "features of images into a store",
    "store": "list, verify, repair, copy, export and import stores",
    "train": "train a brain encoder from a store",
    "import-checkpoint": "turn a published checkpoint into one of ours",
    "evaluate": "score a run",
    "predict": "predict responses to the test images",
    "attention": "where each ROI looks, as arrays and on the images",
    "ensemble": "combine runs by their validation correlation",
    "submit": "write and check the challenge's zip",
    "report": "one page about a run",
    "guard": "memory as the guard sees it, and drills",
    "doctor": "this machine, its limits, and what will not work",
    "watch": "memory, guard state and progress of a run, live",
}
"""Command -> one line of help. ``show-model`` lives in ``brainenc/cli/show_model.py`` as ``command``."""


class _Lazy(click.Group):
    """A group that imports a command's module when it is called, so that ``--help`` is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"brainenc.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
@click.version_option(brainenc.__version__, prog_name="brainenc")
def cli(debug: bool) -> None:
    """Brain-encoding models from an out-of-core feature store.

    Begin with `brainenc demo`.
    """


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code. What it says of errors holds no credentials."""
    if logging.lastResort is not None:  # what prints warnings, also those of clients
        logging.lastResort.setFormatter(_Redacting())
    try:
        with stoppable(argv):
            result = cli.main(args=argv, prog_name="brainenc", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        click.echo(redact(shown.getvalue()), err=True, nl=False)
        return error.exit_code
    except StopRequested as stop:
        click.echo(f"brainenc: stopped by {stop}; nothing was lost, and the same command goes on.", err=True)
        return EXIT_STOPPED_SAFELY
    except (KeyboardInterrupt, click.Abort):
        click.echo("brainenc: interrupted; the same command goes on from what was sealed.", err=True)
        return 130
    except BrainencError as error:
        _tell(str(error), whole="--debug" in argv)
        return error.exit_code
    except OSError as error:  # a disk's or the system's, told as such: what it hit is named in it
        _tell(f"the system refused: {error}. `brainenc --debug ...` shows where.", whole="--debug" in argv)
        return 1
    except Exception as error:  # nobody's plan: its traceback, as Python would print it but for what is secret
        _tell(f"this is a mistake in brainenc or in a library: {type(error).__name__}: {error}", whole=True)
        return 1
    return result if isinstance(result, int) else 0


def _tell(text: str, *, whole: bool) -> None:
    """An error in one paragraph; below its traceback, if that is asked for."""
    if whole:
        click.echo(redact(traceback.format_exc()), err=True, nl=False)
    click.echo(redact(f"brainenc: {text}"), err=True)


class _Redacting(logging.Formatter):
    """Log lines as they would be printed, without credentials."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
