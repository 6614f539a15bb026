"""Command lines from dataclasses: of ``python -m effdense``, ``train_ddp.py`` and the benchmarks.

A field is an option, the string below it its help, the class's docstring what ``--help`` begins
with. Each is one line, or one a paragraph: tyro keeps the breaks of indented lines. What no type
says is checked in ``__post_init__``, by a :class:`UserError`.

Importing this imports no torch: ``--help`` and a mistyped option are answered at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import tyro

from ..errors import UserError, one_line_errors, speaks_for_all

Options = TypeVar("Options")


def main(
    options: type[Options],
    run: Callable[[Options], int | None],
    *,
    program: str,
    arguments: Sequence[str] | None = None,
    description: str | None = None,
) -> None:
    """Read the command line and run; a mistake is one line and exit status 2.

    Args:
        options: as of :func:`parse`.
        run: returns the exit status, None for 0.
        program, arguments, description: likewise.
    """
    with one_line_errors():
        status = run(parse(options, arguments, program=program, description=description))
    if status:
        sys.exit(status)


def parse(
    options: type[Options],
    arguments: Sequence[str] | None = None,
    *,
    program: str,
    description: str | None = None,
) -> Options:
    """Read the options; prints the help text and exits where that is asked for.

    Args:
        options: a dataclass.
        arguments: those of this process, where None.
        program: what the help text and messages call it.
        description: instead of the class's docstring.

    Raises:
        UserError: for an option or value that does not exist.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), _one_column():
            return tyro.cli(
                options,
                prog=program,
                args=list(sys.argv[1:] if arguments is None else arguments),
                description=description,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
                console_outputs=speaks_for_all(),
            )
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        raise UserError(f"{_said(complaint.getvalue())}; see {program} --help") from None


@contextlib.contextmanager
def _one_column() -> Iterator[None]:
    """Within it help is at most 100 columns wide: in 130 tyro sets two narrow panels abreast."""
    said = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, 100))
    try:
        yield
    finally:
        if said is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = said


def check_positive(**values: int | None) -> None:
    """A UserError that names the option of the first of ``values`` below 1; None is none.

    For ``__post_init__``.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be a positive integer, got {value}")


def _said(text: str) -> str:
    """What tyro says in its error box, before its first rule, without the title."""
    lines = [line.strip("│ ") for line in text.splitlines()]
    if not text.lstrip().startswith("╭"):
        # a terminal without UTF-8: the title has a line of its own
        lines = lines[1:]
    said: list[str] = []
    for line in lines:
        is_rule = line.startswith("╭") or not any(map(str.isalnum, line))
        if is_rule and said:
            break
        if not is_rule:
            said.append(line)
    if said[:1] and said[0].startswith("Missing from"):
        return f"missing: {said[1]}"
    meant = re.search(r"Perhaps you meant:\W+(--[\w-]+)", text)
    given = re.search(r"--([\w-]+)", " ".join(said))
    elsewhere = _ELSEWHERE.get(given[1]) if given else None
    if meant or elsewhere:
        said.append(f"(did you mean {meant[1] if meant else elsewhere}?)")
    message = " ".join(said).rstrip(".")
    for pattern, plain in _PLAIN:
        message = re.sub(pattern, plain, message)
    return message


# What other trainers call an option, too far from ours for a guess by its letters.
_ELSEWHERE = {
    "learning-rate": "--lr",
    "wd": "--weight-decay",
    "opt": "--optimizer",
    "amp": "--dtype",
    "precision": "--dtype",
    "max-epochs": "--epochs",
    "pretrained": "--weights",
    "checkpoint": "--weights",
    "memory-budget": "--budget",
    "workers": "--num-workers",
    "output-dir": "--work-dir",
    "sync-bn": "--sync-batch-norm",
    "grad-accum": "--accumulate",
}
_KINDS = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "{[FLOAT [FLOAT ...]]}": "numbers",
    "{FLOAT FLOAT}": "two numbers",
    "{FLOAT FLOAT FLOAT}": "three numbers",
    "{INT INT INT}": "three whole numbers",
}


def _kind(found: re.Match[str]) -> str:
    return f"{found[1]} must be {_KINDS.get(found[2], found[2])}, got {found[3]}"


# What tyro and Python say of a value, in a user's words.
_PLAIN: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (
        r"^Error parsing (\S+): no type matching (?:\{None\}\|)?(.+) could be instantiated "
        r"from \[(.*)\]",
        _kind,
    ),
    (
        r"^Error parsing (\S+): invalid literal for int\(\) with base 10: ",
        r"\1 must be a whole number, got ",
    ),
    (r"^Error parsing (\S+): could not convert string to float: ", r"\1 must be a number, got "),
    (r"^Error parsing (-\S+): ", r"\1 "),
    # the oldest tyro gives a tuple of names
    (r"^Missing value for argument '(?:\(')?([^\s',()]+).*", r"\1 wants a value"),
    # a __post_init__ names what it is about itself
    (r"^Error parsing \S+: ", ""),
)
