"""Every ``brainenc`` command on a page is one that the command line accepts: names, options, arity, choices."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from brainenc.cli.main import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("brainenc", "deploy/slurm.sh")  # what stands after the script's name is a brainenc command
ENDS = {"&&", "||", "|", ";", "&", ">", ">>", "<", "2>"}


def code(text: str) -> Iterator[str]:
    """Lines of fenced and indented blocks, continuations joined (of Python what the shell gets), and inline code."""
    prose, language = [], None
    lines = iter(text.splitlines())
    for line in lines:
        if fence := re.match(r"\s*```(\w*)", line):
            language = fence[1] if language is None else None
        elif language is None and not line.startswith("    "):
            prose.append(line)
        else:
            while line.endswith("\\"):
                line = line[:-1] + next(lines)
            if language != "python" or line.startswith("!"):
                yield line
    yield from (" ".join(span.split()) for span in re.findall(r"`(brainenc\s[^`]+)`", "\n".join(prose)))


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of each brainenc command in a page's code; ``...`` stands for what is left out."""
    for line in code(text):
        if not any(program in line for program in PROGRAMS):
            continue
        words = shlex.split(line.lstrip(" $!"), comments=True)
        for at, word in enumerate(words):
            begins = word in PROGRAMS and (word != "brainenc" or at == 0 or words[at - 1] in {*ENDS, "--"})
            if begins:
                end = next((i for i in range(at, len(words)) if words[i] in ENDS), len(words))
                yield [w for w in words[at + 1 : end] if w != "..."]


def check(arguments: list[str]) -> None:
    """As ``brainenc`` would read them, without running anything and without minding what is missing.

    Raises:
        click.UsageError: there is no such command or option, a value is missing, or one too many, or no choice.
    """
    command: click.Command = cli
    context = click.Context(cli, info_name="brainenc")
    while True:
        values, rest, order = command.make_parser(context).parse_args(list(arguments))
        for parameter in order:
            for value in _each(values.get(parameter.name)):
                if isinstance(value, str) and not value.isupper():  # in capitals: a placeholder
                    parameter.type.convert(value, parameter, context)
        if not isinstance(command, click.Group):
            if rest:
                raise click.UsageError(f"{command.name}: unexpected {rest}")
            return
        if not rest:
            return
        found = command.get_command(context, rest[0])
        if found is None:
            raise click.UsageError(f"no command {rest[0]}")
        command, context, arguments = found, click.Context(found, info_name=rest[0], parent=context), rest[1:]


def _each(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_ones_that_exist(page):
    wrong = {}
    for arguments in commands(page.read_text()):
        try:
            check(arguments)
        except click.UsageError as error:
            wrong["brainenc " + shlex.join(arguments)] = error.format_message()

    assert not wrong


def test_the_pages_are_read():
    found = [arguments for page in PAGES for arguments in commands(page.read_text())]

    assert len(found) >= 60
    used = {arguments[0] for arguments in found if arguments}
    assert {"data", "extract", "store", "train", "evaluate", "report", "guard", "show-model", "ensemble"} <= used
    longest = max(found, key=len)
    assert len(longest) >= 12, "continuation lines are joined"


@pytest.mark.parametrize(
    "line",
    [
        "brainenc trian --resume runs/first",
        "brainenc train --resum runs/first",
        "brainenc store veriffy features",
        "brainenc data check subj01 subj02",
        "brainenc train --resume",
        "brainenc extract --dtype float17",
    ],
)
def test_a_mistake_is_noticed(line):
    (arguments,) = commands(f"```bash\n{line}\n```")

    with pytest.raises(click.UsageError):
        check(arguments)


def test_commands_are_found_wherever_they_stand():
    page = (
        "Try `brainenc show-model\nBACKBONE`.\n\n    brainenc store ls features   # it's there\n\n```python\n"
        "import brainenc\n!brainenc extract --store a && \\\n brainenc train --store a\n```\n"
        "```bash\nray job submit -- brainenc plan ... --json\nsbatch deploy/slurm.sh evaluate r\nls brainenc\n```\n"
    )

    assert sorted(commands(page)) == [
        ["evaluate", "r"],
        ["extract", "--store", "a"],
        ["plan", "--json"],
        ["show-model", "BACKBONE"],
        ["store", "ls", "features"],
        ["train", "--store", "a"],
    ]
