"""Every command explains itself alike."""

from importlib import import_module

import click
import pytest
from click.testing import CliRunner

from brainenc.cli.main import COMMANDS


def commands():
    """Every command and sub-command by name."""
    for name in COMMANDS:
        found = import_module(f"brainenc.cli.{name.replace('-', '_')}").command
        yield name, found
        if isinstance(found, click.Group):
            yield from ((f"{name} {inner}", each) for inner, each in found.commands.items())


@pytest.mark.parametrize(
    ("name", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_help_ends_with_an_example_whose_lines_are_whole(name, command):
    lines = CliRunner().invoke(command, ["--help"], terminal_width=80).output.rstrip().splitlines()
    if name in ("store",):
        return  # its commands have theirs
    start = next(i for i, line in enumerate(lines) if line.strip().startswith("Example:"))
    options = next(i for i, line in enumerate(lines) if line.startswith(("Options:", "Commands:")))
    assert start > options
    example = lines[start:]
    text = example[1:] if example[0].strip() == "Example:" else [example[0].replace("Example:", "")]
    for previous, line in zip(["", *text], text, strict=False):
        assert line.strip().startswith("brainenc ") or previous.endswith("\\")
