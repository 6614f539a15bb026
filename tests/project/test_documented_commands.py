"""What README and docs/ tell people to type is run, or named in ``COMMANDS`` as not run, and why.

What is not run is read by the program's own parser all the same, so an option that does not exist
fails here. Python is run, block after block, as a reader of the page would.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torchvision
import tyro
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

RUN = "run here"
NOT_A_COMMAND = "not run: stands for others"
# What becomes of a command: the first pattern that it begins with says so.
COMMANDS = {
    r"python -m effdense COMMAND$": NOT_A_COMMAND,
    r"python -m effdense$": RUN,
    r"python -m effdense (env|plan|graph|recipes)\b": RUN,
    r"python -m effdense\.kernels\.traffic$": RUN,
    r"python -m effdense convert-report torchvision": RUN,
    r"python -m effdense convert-report": "not run: a placeholder",
    r"python -m effdense verify": "not run: minutes; small in tests/exactness/test_verification.py",
    r"python -m effdense (plot|evaluate|predict|export)": "not run: wants a run's folder; with one "
    "in tests/project/test_cli.py, tests/engine/test_export.py and tests/engine/test_best.py",
    r"python train_ddp.py --help": RUN,
    r"(python|torchrun .*) (train_ddp.py|-m effdense train)": "not run: trains; every option in "
    "tests/engine/test_training.py, and README's first command in full",
    r"python -m benchmarks\.gpu": "not run: minutes on a GPU; tiny ones without in "
    "tests/benchmarks/test_gpu_report.py",
    r"python benchmarks/": "not run: minutes; the parts in tests/benchmarks/test_results.py",
    r"make ": "not run: minutes, or an index of packages; the rule is looked up",
    r"pip install effdense": "not run: an index of packages",
    r"pip install '?\.": "not run: in fresh environments by tests/project/release.py",
    r"pre-commit install": "not run: changes the clone's hooks",
    r"srun bash -c": "not run: wants SLURM; the command inside is read",
    r"(scontrol|'\[') ": "not run: wants SLURM",
    r"sleep ": "not run: waits",
}


def code_blocks(page: Path, language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def code_in_prose(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    # below a table stand the commands of the revisions that its figures are of
    prose = re.sub(r"<!-- table: .*?<!-- end -->", "", prose, flags=re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands_of(page: Path) -> list[str]:
    """Every simple command that the page shows, each once."""
    found = [command for block in code_blocks(page, "sh") for command in simple_commands(block)]
    for code in code_in_prose(page):
        if re.match(r"(python|torchrun|make|pip|effdense) \S", code):
            found += simple_commands(code)
        elif code.startswith("train_ddp.py "):
            found += simple_commands(f"python {code}")
    return list(dict.fromkeys(found))


def simple_commands(shell: str) -> Iterator[str]:
    """Without comments, assignments and the shell's own words."""
    shell = re.sub(r"\$\([^)]*\)", "VALUE", shell.replace("\\\n", " "))
    for line in shell.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set(";&|"):
                words.append(word)
                continue
            own = ("until", "do", "done", "exec", "export")
            while words and (words[0] in own or re.match(r"\w+=", words[0])):
                del words[0]
            if words[:3] == ["srun", "bash", "-c"]:
                yield from simple_commands(words[3])
            if words[:1] == ["effdense"]:
                # what pip install makes of it; tests/project/release.py has it
                words[:1] = ["python", "-m", "effdense"]
            if words:
                yield shlex.join(words)
            words = []


EVERY_COMMAND = [(page, command) for page in PAGES for command in commands_of(page)]


def becomes(command: str) -> str | None:
    return next((said for begin, said in COMMANDS.items() if re.match(begin, command)), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_run_or_named(page: Path) -> None:
    unnamed = [command for command in commands_of(page) if becomes(command) is None]
    assert not unnamed, "say in COMMANDS what becomes of these"


def test_what_is_run_elsewhere_is_there() -> None:
    for said in COMMANDS.values():
        assert all((ROOT / path).is_file() for path in re.findall(r"tests/[\w/]+\.py", said)), said


@pytest.mark.parametrize(
    ("page", "command"),
    [(p.stem, c) for p, c in EVERY_COMMAND if becomes(c) not in (RUN, NOT_A_COMMAND)],
)
def test_a_command_s_options_exist(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *arguments = shlex.split(command)
    if program == "torchrun":
        options = get_args_parser().parse_args(arguments)
        script = ["-m"] * options.module + [options.training_script]
        program, arguments = "python", [*script, *options.training_script_args]
    if program == "make":
        rule = [word for word in arguments if "=" not in word]
        make = shutil.which("make") or pytest.skip("make is not installed")
        done = subprocess.run([make, "-n", *rule], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        named = re.findall(r"tests/[\w/]+\.py", command)
        assert all((ROOT / path).is_file() for path in named)
    elif program == "python":
        assert reads(arguments, monkeypatch), capsys.readouterr().err


def test_every_target_of_the_makefile_has_a_rule() -> None:
    """make takes a phony one without for done, and says so with status 0."""
    text = (ROOT / "Makefile").read_text()
    phony = {word for line in re.findall(r"^\.PHONY:(.*)", text, re.M) for word in line.split()}
    told = set(re.findall(r"^# make (\w+)", text, re.M))
    rules = set(re.findall(r"^(\w+):(?!=)", text, re.M))
    assert phony == rules
    assert told <= rules


def reads(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether ``python ARGUMENTS`` comes past its parser; nothing is done after that."""

    class Read(BaseException):
        pass

    def then_stops(parser: Any) -> Any:
        def parse(*args: Any, **kwargs: Any) -> Any:
            parser(*args, **kwargs)
            raise Read

        return parse

    is_module = arguments[0] == "-m"
    name = arguments[is_module]
    own = argparse.ArgumentParser.parse_args
    try:
        with monkeypatch.context() as patch, warnings.catch_warnings():
            patch.setattr(tyro, "cli", then_stops(tyro.cli))
            patch.setattr(argparse.ArgumentParser, "parse_args", then_stops(own))
            patch.setattr(sys, "argv", [name, *arguments[is_module + 1 :]])
            # that the module has been imported already
            warnings.simplefilter("ignore", RuntimeWarning)
            if is_module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
    except Read:
        return True
    except SystemExit as exit_:
        # --help
        return exit_.code in (0, None)
    raise AssertionError(f"{name} has no parser that this test knows")


@pytest.mark.slow
@pytest.mark.parametrize("command", dict.fromkeys(c for _, c in EVERY_COMMAND if becomes(c) == RUN))
def test_a_command_runs(command: str, tmp_path: Path) -> None:
    _, *arguments = shlex.split(command)
    if arguments[0] != "-m":
        arguments[0] = str(ROOT / arguments[0])
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.models.densenet.WeightsEnum, "get_state_dict", untrained)
    names: dict[str, Any] = {}
    for block in code_blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    for block in code_blocks(page, "diff"):
        after = re.sub(r"^[+ ] ", "", re.sub(r"^-.*\n", "", block, flags=re.MULTILINE), flags=re.M)
        for package in re.findall(r"\b(\w+)\.", after):
            names[package] = pytest.importorskip(package)
        exec(compile(after, str(page), "exec"), names)


def untrained(weights: Any, *_: object, **__: object) -> Any:
    """In the place of a download."""
    name = type(weights).__name__.removesuffix("_Weights").lower()
    return torchvision.models.get_model(name).state_dict()


def test_options_in_the_text_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = set(re.findall(r"--[a-z][\w-]*", get_args_parser().format_help()))
    programs = [["train_ddp.py"], ["tests/project/release.py"]]
    programs += [["-m", "effdense.kernels.audit"], ["-m", "tests.helpers.chaos"]]
    programs += [["-m", "tests.helpers.soak"], ["-m", "tests.helpers.mutants"]]
    programs += [["-m", "benchmarks.gpu"]]
    programs += [[str(path.relative_to(ROOT))] for path in sorted(ROOT.glob("benchmarks/*.py"))]
    # not each file there is a command
    files = sorted(ROOT.glob("effdense/commands/*.py"))
    programs += [["-m", "effdense", path.stem.replace("_", "-")] for path in files]
    # pytest's own are its affair
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    known |= set(re.findall(r'addoption\(\s*"(--[\w-]+)"', conftest))
    understood = 0
    for program in programs:
        understood += reads([*program, "--help"], monkeypatch)
        known |= set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    assert understood > len(programs) - 6
    for page in PAGES:
        for code in code_in_prose(page):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
                assert option in known, f"{page.name}: {code}"
