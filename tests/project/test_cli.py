"""``python -m effdense``."""

from __future__ import annotations

import itertools
import re
import types
from pathlib import Path

import pytest
import torch

import effdense
from effdense import commands
from effdense.__main__ import main
from effdense.backends import select
from effdense.commands import COMMANDS, env


def write_run(path: Path) -> Path:
    path.mkdir()
    for name in ("train.csv", "test.csv"):
        (path / name).write_text("epoch,loss,error\n1,0.5,20.0\n2,0.25,10.0\n")
    return path


def status(*arguments: object) -> object:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code


def test_plot_draws_into_the_run_s_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    main(["plot", str(run)])
    written = [run / "loss.png", run / "error.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_plot_overlays_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    assert status("plot", *runs) == 2
    assert capsys.readouterr().err.startswith("error: several runs")
    main(["plot", *map(str, runs), "-o", str(tmp_path / "both")])
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"loss.png", "error.png"}
    for run in runs:
        assert not list(run.glob("*.png"))


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("plot", tmp_path / "nothing") == 2
    said = capsys.readouterr().err
    assert said == f"error: {tmp_path}/nothing holds no run: there is no train.csv\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["paint"], "COMMAND must be one of train, "),
        (["xyzzy"], "got 'xyzzy'; see effdense --help"),
        (["pedict"], "got 'pedict' (did you mean predict?); see effdense --help"),
        (["plot"], "WORKDIR must be the folder of a run"),
        (["plan", "--depht", "22"], "Unrecognized options: --depht, 22 (did you mean --depth?)"),
        (
            ["plan", "--depth", "deep"],
            "--depth must be a whole number, got 'deep'; see effdense plan",
        ),
        (["train", "--budget", "5"], '--budget must be a size such as "12GiB" or'),
        (["train", "--learning-rate", "1"], "(did you mean --lr?)"),
        (["train", "--memory-budget", "5"], "(did you mean --budget?)"),
        (["train", "--epochs"], "--epochs wants a value"),
        (["train", "--milestones", "a"], "--milestones must be numbers, got 'a'"),
        (["train", "--crop", "1", "2"], "--crop must be three whole numbers, got '1', '2'"),
        (["train", "--window", "1", "a"], "--window must be two numbers, got '1', 'a'"),
        (["train", "--spacing", "1"], "--spacing must be three numbers, got '1'"),
        (["train", "--batchsize", "8"], "(did you mean --batch-size?)"),
        (["verify", "--dtype", "int8"], "invalid choice 'int8'"),
        (["graph", "--nesting", "0"], "--nesting must be a positive integer, got 0"),
        (["env", "surplus"], "Unrecognized options: surplus"),
        (["train", "--lr", "high"], "--lr must be a number, got 'high'"),
    ],
)
def test_a_mistyped_command_line_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 2
    out, said = capsys.readouterr()
    assert says in said
    assert said.startswith("error: ")
    assert (out, said.count("\n")) == ("", 1)


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=str)
def test_effdense_alone_lists_the_commands(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not status(*arguments)
    said = capsys.readouterr().out
    parts = {"front_end", "measure", "network", "verification", "__init__"}
    files = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - parts
    assert {name.replace("-", "_") for name in COMMANDS} == files
    assert all(f"  {name} " in said for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_is_described(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not status(command, "--help")
    _, options = capsys.readouterr().out.split("show this help message and exit")
    for entry in re.split(r"\n[│ ] (?=-\w|--\w)", options)[1:]:
        words = entry.replace("│", " ").split("(default:")[0].split()
        assert len(words) > 2, entry


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_one_column_of_full_lines(
    command: str,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert not status(command, "--help")
    first = re.compile(r"\n(?=\W*options |\W*positional arguments )")
    about, panels = first.split(capsys.readouterr().out, maxsplit=1)
    assert all(len(line) <= 80 for line in about.splitlines()[1:])
    lines = panels.splitlines()
    widest = max(map(len, lines))
    assert widest <= min(columns, 100)
    assert not any(line.count("╭") > 1 or re.search(r" ---+ +---+", line) for line in lines)
    room = widest - (4 if "╭" in panels else 2)
    texts = [line[2:].rstrip("│ ") for line in lines]
    for text, following in itertools.pairwise(texts):
        is_option_alone = text[:1] != " " and "  " not in text
        if text and following.startswith("    ") and not is_option_alone:
            word = following.split()[0]
            assert len(text) + 1 + len(word) > room, f"{text} | {word}"


def test_plan_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--depth", 22, "--growth-rate", 12, "--batch-size", 16]
    main([*map(str, ["plan", "densenet_bc", *small, "--budget", "1GiB"])])
    said = capsys.readouterr().out
    assert "features.denseblock3" in said
    assert "of a budget of 1.00 GiB" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["densenet_bc", "--budget", "1KiB"], "needs at least"),
        (["densenet_bc", "--budget", "much"], "size such as"),
        (["densenet_bc", "--depth", "23"], "nearest valid depths"),
        (["densenet_bc", "--batch-size", "0"], "must be a positive integer"),
        (["densenet_bc", "--image-size", "2"], "halves every spatial size"),
        (["densenet_bc", "--optimizer", "magic"], "sgd"),
    ],
)
def test_plan_s_mistakes(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("plan", *arguments[:1], "--depth", 10, "--growth-rate", 4, *arguments[1:]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_plan_takes_other_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "planned.py").write_text(
        "import effdense\n"
        "from torchvision.models import DenseNet\n"
        "def own():\n"
        "    return effdense.densenet_bc(10, 4)\n"
        "def other():\n"
        "    return DenseNet(4, (2, 2), 6, num_classes=5)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    small = ["--batch-size", "4", "--image-size", "64"]
    main(["plan", "planned:own", *small, "--budget", "1GiB"])
    assert "features.denseblock3" in capsys.readouterr().out
    main(["plan", "planned:other", *small, "--budget", "1GiB"])
    said = capsys.readouterr().out
    assert "features.denseblock2  bottlenecks" in said
    assert "of a budget of 1.00 GiB" in said
    assert status("plan", "planned:other", *small, "--budget", "1KiB") == 2
    assert "no choice of save modes fits" in capsys.readouterr().err
    assert status("plan", "torchvision.models:resnet18", *small) == 2
    assert "no dense block to plan for" in capsys.readouterr().err


def test_env_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    env.environment.cache_clear()
    main(["env"])
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["torch"].startswith(torch.__version__)
    assert said["effdense"].startswith(effdense.__version__)
    assert {"python", "torchvision", "triton", "numpy", "nvidia-ml-py"} <= said.keys()
    assert {"system", "processor", "cores", "memory"} <= said.keys()


def test_env_says_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = {torch.float32: "statistics: differs from torch by 1", torch.float64: None}
    monkeypatch.setattr(select, "fault", lambda device, dtype: faults[dtype])
    monkeypatch.setenv("CC", "no-such-compiler")
    env.environment.cache_clear()
    found = dict(env.environment())
    env.environment.cache_clear()
    assert found["C compiler"] == "none (no-such-compiler not on PATH)"
    assert found["cpu loops, float32"] == "statistics: differs from torch by 1"
    assert found["cpu loops, float64"] == "self-check ok"


def test_env_lists_gpus_even_where_one_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = types.SimpleNamespace(name="NVIDIA X", major=9, minor=0, total_memory=80 << 30)

    def properties(index: int) -> object:
        if index:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(select, "fault", lambda device, dtype: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: properties(device.index) and (9, 0)
    )
    monkeypatch.setattr(env, "_kernels_of_networks", lambda device, dtype: "40 variants, all ok")
    select.why_not_triton.cache_clear()
    env.environment.cache_clear()
    found = dict(env.environment())
    env.environment.cache_clear()
    select.why_not_triton.cache_clear()
    said = "NVIDIA X, compute capability 9.0, 80.00 GiB, driver "
    assert found["cuda:0"].startswith(said)
    assert found["cuda:1"].startswith("failed: RuntimeError: CUDA error")
    assert found["triton cuda:0, bfloat16"] == "40 variants, all ok"
    lost = "torch operations instead: failed: RuntimeError: CUDA error"
    assert found["triton cuda:1, bfloat16"].startswith(lost)
