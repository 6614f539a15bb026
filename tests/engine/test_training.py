"""Training with real processes, started as a user starts them."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import pty
import resource
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from PIL import Image

import effdense
from effdense.choices import OptimizerName
from effdense.engine.data.images import InMemory, Normalization
from effdense.engine.data.order import global_batches
from effdense.engine.distributed import World
from effdense.engine.options import TrainConfig
from effdense.engine.plots import read
from effdense.engine.progress import Progress
from effdense.engine.tasks import Classification
from effdense.engine.trainer import Step, Trainer
from effdense.engine.training import train
from effdense.errors import TrainingError, UserError
from tests.helpers import workers
from tests.helpers.launch import REPOSITORY, Launch, error_lines, flags
from tests.helpers.ranks import Ranks, by_ranks

SCRIPT = REPOSITORY / "train_ddp.py"
WORKERS = Path(workers.__file__)
SMALL: dict[str, Any] = {"data": "fake", "depth": 10, "growth_rate": 4, "image_size": 8}


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    a, b = (torch.load(path / "model.pt", weights_only=True) for path in (one, other))
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_four_processes_learn_the_digits(launch: Launch, tmp_path: Path) -> None:
    """The README's command without any option: under 3 minutes on two cores, under 3 % error.

    Held by processor time, start-up included, which others' work on the machine changes least.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = launch(4, SCRIPT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, process.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 180
    assert "Warning" not in process.stderr
    run_dir = tmp_path / "runs" / "digits-1"
    train, test = read(run_dir / "train.csv"), read(run_dir / "test.csv")
    assert test["error"][-1] < 3
    assert set(test["samples"]) == {360}
    epochs = [float(epoch) for epoch in range(1, len(test["epoch"]) + 1)]
    assert train["epoch"] == test["epoch"] == epochs
    assert train["step"] == [1437 // 64 * epoch for epoch in epochs]
    # a line per epoch, printed by one process
    assert [line.split()[0] for line in process.stdout.splitlines()].count("epoch") == len(epochs)
    for name in ("loss.png", "error.png"):
        with Image.open(run_dir / name) as image:
            image.verify()
    recorded = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert recorded["processes"] == {
        "world_size": 4,
        "local_world_size": 4,
        "backend": "gloo",
        "device": recorded["processes"]["device"],
    }
    # the weights are those that were tested
    options = recorded["options"]
    network = effdense.densenet_bc(options["depth"], options["growth_rate"], 10, in_channels=1)
    network.load_state_dict(torch.load(run_dir / "model.pt", weights_only=True))
    assert sum(p.numel() for p in network.parameters()) == recorded["model"]["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_take_the_step_of_one(processes: int, tmp_path: Path, alone: World) -> None:
    together = by_ranks("equal_steps", processes, tmp_path)
    expected = workers.equal_steps(alone)
    assert together.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(together[name], expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_evaluation_counts_every_sample_once(tmp_path: Path, alone: World) -> None:
    together = by_ranks("evaluations", 3, tmp_path)
    expected = workers.evaluations(alone)
    for size in workers.TEST_SIZES:
        assert together[f"{size} asked"].tolist() == [1] * size
        score, reference = together[f"{size} score"], expected[f"{size} score"]
        torch.testing.assert_close(score, reference, rtol=1e-5, atol=1e-5)
        assert score[2] == size


@pytest.mark.slow
def test_two_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    for name in ("a", "b"):
        options = flags(**SMALL, epochs=2, augment="paper", drop_rate=0.2, work_dir=name)
        with Ranks(tmp_path, options, 2) as ranks:
            assert ranks.wait() == [0, 0], ranks.said()
    a, b = tmp_path / "a", tmp_path / "b"
    assert same_weights(a, b)
    for name in ("train.csv", "test.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def small_run(work_dir: Path, **options: Any) -> Path:
    train(TrainConfig(**{**SMALL, "epochs": 1, "threads": 1, "work_dir": work_dir, **options}))
    return work_dir


def test_seeds_and_only_seeds_make_a_difference(tmp_path: Path) -> None:
    first = small_run(tmp_path / "a", drop_rate=0.1, augment="paper")
    torch.manual_seed(123)
    assert same_weights(first, small_run(tmp_path / "b", drop_rate=0.1, augment="paper"))
    assert not same_weights(
        first, small_run(tmp_path / "c", drop_rate=0.1, augment="paper", seed=1)
    )


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_optimizers_get_their_options_and_every_parameter(name: OptimizerName) -> None:
    network = effdense.densenet_bc(depth=10, growth_rate=4)
    config = TrainConfig(optimizer=name, weight_decay=0.25).resolved()
    world = World(0, 1, 0, 1, torch.device("cpu"), None)
    optimizer = Trainer(network, config, world, Classification(())).optimizer
    assert type(optimizer).__name__.lower() == name
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (config.lr, 0.25)
    if name == "sgd":
        assert (group["momentum"], group["nesterov"]) == (0.9, True)
    assert len(group["params"]) == len(list(network.parameters()))


def test_norms_and_biases_are_left_out_of_the_weight_decay() -> None:
    network = effdense.densenet_bc(depth=10, growth_rate=4)
    config = TrainConfig(optimizer="adamw", exempt_norms=True, head_lr_factor=2.0).resolved()
    world = World(0, 1, 0, 1, torch.device("cpu"), None)
    optimizer = Trainer(network, config, world, Classification(())).optimizer
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in network.named_parameters():
        is_map = name.endswith(".weight") and ("conv" in name or name == "classifier.weight")
        assert decays[id(parameter)] == (config.weight_decay if is_map else 0), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decays)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_images_are_mixed_alike_by_any_number_of_processes(processes: int) -> None:
    config = TrainConfig(data="fake", augment="mixup").resolved()
    world = World(0, 1, 0, 1, torch.device("cpu"), None)
    network = effdense.densenet_bc(depth=10, growth_rate=4)
    batch, labels = torch.randn(10, 3, 8, 8), torch.arange(10)
    found: list[list[torch.Tensor]] = []

    class Watched(Trainer):
        def step(
            self, images: torch.Tensor, labels: torch.Tensor, batch_size: int, lr: float
        ) -> Step:
            found[-1] += [images, labels]
            return Step(torch.zeros(()), torch.zeros(len(images), 10), None)

    for rank in range(processes):
        found.append([])
        trainer = Watched(network, config, world, Classification(tuple("abcdefghij")))
        # made in a world of one process: there is no other to meet
        assert trainer.model is network
        trainer.world = World(rank, processes, rank, processes, torch.device("cpu"), None)
        split = InMemory(batch, labels, Normalization((0.0,) * 3, (1.0,) * 3))
        trainer.config = dataclasses.replace(config, batch_size=10)
        trainer.train_epoch(split, Progress(config, world), lambda left: None)
    images, mixed = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = torch.cat(global_batches(10, 10, 0, 1))
    share = float(mixed[0, order[0]])
    assert 0.5 < share < 1 or 0 < share < 0.5
    assert torch.equal(images, batch[order].roll(1, 0) * (1 - share) + batch[order] * share)
    one_hot = torch.eye(10)[order]
    assert torch.equal(mixed, one_hot.roll(1, 0) * (1 - share) + one_hot * share)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam", "lr": 0.01},
        {"optimizer": "rmsprop"},
        {"optimizer": "sgd", "momentum": 0.0},
        {"schedule": "cosine", "label_smoothing": 0.1},
        {"augment": "mixup"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"save": "all", "backend": "torch", "batch_size": 63},
    ],
    ids=str,
)
def test_options_train(options: dict[str, Any], tmp_path: Path) -> None:
    """A few steps of each reach an error that no constant answer has."""
    path = small_run(tmp_path / "run", epochs=3, **options)
    assert read(path / "test.csv")["error"][-1] < 80
    rates = read(path / "train.csv")["lr"]
    assert rates[0] > rates[1]


@pytest.mark.slow
def test_imagenet_architecture_on_a_folder_of_images(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40 + i, 40), colour).save(folder / f"{i}.png")
    path = small_run(
        tmp_path / "run",
        data="imagefolder",
        data_dir=tmp_path,
        arch="densenet121",
        depth=None,
        growth_rate=None,
        image_size=32,
        batch_size=4,
        num_workers=1,
    )
    recorded = yaml.safe_load((path / "config.yaml").read_text())
    assert recorded["model"]["name"] == "densenet121"
    assert recorded["images"] == {"train": 8, "test": 8}
    assert read(path / "test.csv")["samples"] == [8]
    assert read(path / "train.csv")["step"] == [2]


@pytest.mark.slow
def test_config_yaml_reproduces_the_run(tmp_path: Path, launch: Launch) -> None:
    options = flags(**SMALL, epochs=1, work_dir="run", lr=0.05, milestones=0.25)
    process = launch(0, SCRIPT, *options)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert shlex.split(recorded["command"])[1:] == [str(option) for option in options]
    assert recorded["processes"]["world_size"] == 1
    assert recorded["versions"]["torch"] == torch.__version__.split("+")[0]
    assert recorded["versions"]["effdense"] == effdense.__version__
    head = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    if head.returncode == 0:
        assert recorded["source"].split("+")[0] == head.stdout.strip()
    again = {**recorded["options"], "work_dir": tmp_path / "again"}
    again["data_dir"], again["milestones"] = Path(again["data_dir"]), tuple(again["milestones"])
    train(TrainConfig(**again))
    assert same_weights(tmp_path / "run", tmp_path / "again")
    changed = {**again, "work_dir": tmp_path / "changed", "milestones": (0.5,)}
    train(TrainConfig(**changed))
    assert not same_weights(tmp_path / "run", tmp_path / "changed")


@pytest.mark.slow
def test_a_missing_data_set_is_said_once(launch: Launch, tmp_path: Path) -> None:
    process = launch(2, SCRIPT, *flags(data="cifar10", data_dir="nowhere"))
    assert process.returncode != 0
    (line,) = error_lines(process)
    assert "CIFAR10 is not in nowhere" in line
    assert "--download" in line
    assert 'train_ddp.py", line' not in process.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--epoch", "3"], "Unrecognized options: --epoch, 3"),
        (["--depth", "23"], "the nearest valid depths: 22 and 28"),
        (["--batch-size", "2000"], "--batch-size must be at most 1437"),
        (["--device", "cuda"], "no GPU that torch can use"),
    ],
)
def test_a_user_s_mistake_is_one_line(
    options: list[str], said: str, launch: Launch, tmp_path: Path
) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    process = launch(0, SCRIPT, *options)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert process.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_mistake_that_one_process_sees_stops_all(launch: Launch, tmp_path: Path) -> None:
    process = launch(3, WORKERS, "mistake_on_rank_1", tmp_path / "result.pt")
    assert process.returncode != 0
    assert error_lines(process) == ["error: the disk of rank 1 is full"]
    assert "every process must have raised" not in process.stderr


@pytest.mark.slow
def test_a_process_that_fails_does_not_hang_the_others(launch: Launch, tmp_path: Path) -> None:
    process = launch(3, WORKERS, "defect_on_rank_1", tmp_path / "result.pt", timeout=300)
    assert process.returncode != 0
    assert "RuntimeError: a defect on rank 1" in process.stderr
    assert not (tmp_path / "result.pt").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the (loss is (nan|inf),|weights are) not finite in"):
        small_run(tmp_path / "run", lr=1e30)
    assert not (tmp_path / "run" / "model.pt").exists()


@pytest.mark.slow
def test_a_second_run_in_one_work_dir_is_refused(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run")

    def content() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in path.rglob("[!.]*") if file.is_file()}

    before = content()
    with pytest.raises(UserError, match=r"--seed is 1, was 0.*--overwrite"):
        small_run(path, seed=1)
    assert content() == before
    small_run(path, seed=1, overwrite=True)
    assert (path / "model.pt").read_bytes() != before[path / "model.pt"]


@pytest.mark.slow
def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *map(str, flags(**SMALL, epochs=1, threads=1))]
    terminal, end = pty.openpty()
    # a new terminal has no width, and a bar needs one
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=end, cwd=tmp_path, close_fds=True
    )
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    assert b"epoch 1/1" in shown
    assert b"step/s" in shown


def test_a_memory_budget_chooses_what_the_blocks_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_run(tmp_path / "run", depth=22, budget="2GiB", batch_size=32)
    assert "predicted peak" in capsys.readouterr().out
    assert (path / "model.pt").exists()
    with pytest.raises(UserError, match="--budget: no choice of save modes fits"):
        small_run(tmp_path / "none", budget="100KiB", batch_size=32)
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="--budget must be a size"):
        small_run(tmp_path / "none", budget="much")


@pytest.mark.slow
def test_a_budget_makes_a_run_fit_where_the_naive_network_dies(tmp_path: Path) -> None:
    """Under a limit on the process's memory that plain autograd exceeds."""
    options = {**SMALL, "depth": 40, "growth_rate": 12, "image_size": 32, "batch_size": 64}
    common = flags(**options, epochs=1, threads=1)
    limited = "import resource, runpy, sys; import torch, effdense.engine; "
    limited += "used = int(open('/proc/self/statm').read().split()[5]) * 4096; "
    limited += "resource.setrlimit(resource.RLIMIT_DATA, (used + (400 << 20),) * 2); "
    limited += f"sys.argv[0] = {str(SCRIPT)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    outcomes = {}
    for name, choice in {"naive": flags(save="all"), "fits": flags(budget="200MiB")}.items():
        arguments = [*common, *choice, "--work-dir", tmp_path / name]
        outcomes[name] = subprocess.run(
            [sys.executable, "-c", limited, *map(str, arguments)], capture_output=True, text=True
        )
    assert outcomes["naive"].returncode != 0
    said = outcomes["naive"].stderr.lower()
    # the last is what oneDNN calls it
    assert any(word in said for word in ("allocate", "memory", "could not create a primitive"))
    assert outcomes["fits"].returncode == 0, outcomes["fits"].stderr
    assert (tmp_path / "fits" / "model.pt").exists()
