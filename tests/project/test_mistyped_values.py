"""Values that cannot be, made from the types of every command's options: one line each."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from effdense.__main__ import main
from effdense.commands import COMMANDS
from effdense.commands.train import parse
from effdense.errors import UserError

# What stands for the arguments that a command cannot do without.
POSITIONAL = {"plot": ["run"], "predict": ["run", "x.png"], "evaluate": ["run", "x"]}
POSITIONAL |= {"export": ["run"]}


def options_of(kind: type) -> Iterator[tuple[str, Any]]:
    """Each option's name and type, those of groups too."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from options_of(typing.cast(type, hint))
        else:
            yield f"--{field.name.replace('_', '-')}", hint


def kinds_in(hint: Any) -> set[Any]:
    """The plain types that an annotation is made of."""
    if typing.get_origin(hint) is typing.Literal:
        return {typing.Literal}
    inside = [kinds_in(each) for each in typing.get_args(hint) if each is not ...]
    return set().union(*inside) if inside else {hint}


def never(kind: set[Any]) -> list[str]:
    """What no option of such a type can be."""
    numbers, names = kind & {int, float}, typing.Literal in kind
    wrong = ["abc"] if numbers else []
    wrong += ["1.5"] if int in kind and float not in kind else []
    return wrong + (["nonsense"] if names else [])


WRONG = [
    (command, option, value)
    for command in COMMANDS
    for option, hint in options_of(
        importlib.import_module(f"effdense.commands.{command.replace('-', '_')}").Options
    )
    if str not in (kinds := kinds_in(hint)) and Path not in kinds
    for value in never(kinds)
]


def test_there_are_many() -> None:
    assert len(WRONG) > 80


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_one_line_and_no_traceback(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for own, option, value in WRONG:
        if own != command:
            continue
        with pytest.raises(SystemExit) as exit_:
            main([command, *POSITIONAL.get(command, []), option, value])
        out, said = capsys.readouterr()
        assert exit_.value.code == 2, (option, value)
        assert said.startswith("error: "), (option, value, said)
        assert (out, said.count("\n")) == ("", 1), (option, value, said)
        assert option in said or "nrecognized" in said, (option, value, said)


def refusal(option: str, value: str) -> str:
    """What is said of a value, by the parser or where a run's options are resolved."""
    try:
        parse([option, value], "effdense train").resolved()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_numbers_out_of_range_are_refused_or_taken() -> None:
    """What is resolved is what a run is: nothing else is raised on the way."""
    from effdense.commands.train import Options

    refused = []
    for option, hint in options_of(Options):
        if kinds_in(hint) & {int, float} and str not in kinds_in(hint):
            for value in ("-1", "nan", "1e308"):
                said = refusal(option, value)
                assert not said or option.lstrip("-").split("-")[0] in said, (option, value, said)
                refused += [said] * bool(said)
    assert len(refused) > 40
