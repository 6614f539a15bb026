"""Runs of the engine in real processes that start fast, to be killed.

The processes are forks of a server that has imported torch and the engine once, which takes
longer than the runs themselves. Each joins the others as it would under torchrun; what torchrun
itself does is tested in test_faults.py.
"""

from __future__ import annotations

import csv
import faulthandler
import functools
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from effdense.engine.checkpoint import Position

RUN: list[object] = [
    *("--data", "fake", "--depth", 10, "--growth-rate", 4, "--image-size", 8, "--epochs", 2),
    *("--drop-rate", 0.2, "--augment", "paper", "--threads", 1),
    *("--checkpoint-steps", 3, "--work-dir", "run"),
]
"""A run of a second, of two epochs of 10 steps, with everything random that there is."""
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "effdense.engine.training",
        "effdense.engine.plots",
        "monai.transforms",
        "nibabel",
        "torchvision.transforms.v2",
        "sklearn.metrics",
    ]
)


def _free_port() -> int:
    """One that nobody listens at, below those that systems hand out by themselves.

    Of those another process may have been given one for a connection before the run listens.
    """
    while True:
        # not of Python's own generator, which a test may have seeded as another's has
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _main(
    rank: int,
    world_size: int,
    port: int,
    arguments: Sequence[str],
    folder: Path,
    meddle: Callable[[int], None] | None,
) -> None:
    from effdense.commands.front_end import parse
    from effdense.engine import plots
    from effdense.engine.options import TrainConfig
    from effdense.engine.training import train
    from effdense.errors import one_line_errors

    # the server's way of starting processes is not for the loaders
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    with open(f"rank-{rank}.txt", "ab", buffering=0) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if "cuda" not in arguments:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    # half of such a run's time; test_training.py and test_export.py see what is drawn
    plots.figures = lambda *given: {}
    # for one that stands still; its loader processes, which are forks, inherit it
    faulthandler.register(signal.SIGUSR2)
    if meddle is not None:
        meddle(rank)
    with one_line_errors():
        train(parse(TrainConfig, arguments, program="train_ddp.py"))


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for child in map(int, children) for one in (child, *_descendants(child))]


class Ranks:
    """The processes of one run, started.

    Args:
        folder: their working directory; what rank N says is added to ``rank-N.txt``.
        arguments: as for train_ddp.py.
        world_size: how many.
        meddle: called in each process with its rank before the run begins; picklable.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[object],
        world_size: int = 1,
        meddle: Callable[[int], None] | None = None,
    ) -> None:
        self.folder = folder
        port = _free_port()
        words = [str(argument) for argument in arguments]
        self.processes: list[ForkServerProcess] = [
            _context.Process(target=_main, args=(rank, world_size, port, words, folder, meddle))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def running(self) -> list[int]:
        """The ranks that have not ended."""
        return [rank for rank, process in enumerate(self.processes) if process.exitcode is None]

    def send(self, rank: int, number: int) -> None:
        """Send a signal to one process, if it is still there."""
        pid = self.processes[rank].pid
        assert pid is not None
        if self.processes[rank].exitcode is None:
            os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL for all that are left."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self, timeout: float = 240) -> list[int | None]:
        """Every process's exit status, in the order of ranks; None for one that goes on.

        Where one does, what all ranks have said is printed, and where each of their threads is.
        """
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        if self.running():
            self._print_stacks()
        return [process.exitcode for process in self.processes]

    def _print_stacks(self) -> None:
        for rank in self.running():
            pid = self.processes[rank].pid
            assert pid is not None
            for one in (pid, *_descendants(pid)):
                os.kill(one, signal.SIGUSR2)
        time.sleep(1)
        for rank in range(len(self.processes)):
            print(f"rank {rank}:", self.said(rank), sep="\n")

    def first_status(self, rank: int = 0, timeout: float = 120) -> int | None:
        """How one process ended; the others, which would wait for it to be heard, are killed."""
        self.processes[rank].join(timeout)
        status = self.processes[rank].exitcode
        self.kill()
        return status

    def said(self, rank: int = 0) -> str:
        """What a rank has printed, all runs in this folder together."""
        path = self.folder / f"rank-{rank}.txt"
        return path.read_text() if path.exists() else ""


def by_ranks(name: str, processes: int, folder: Path) -> dict[str, torch.Tensor]:
    """What a function of ``workers.py`` returns in several processes."""
    from . import workers

    output = folder / "result.pt"
    meddle = functools.partial(workers.instead_of_a_run, name, output)
    with Ranks(folder, [], processes, meddle=meddle) as ranks:
        assert ranks.wait() == [0] * processes, ranks.said()
    found: dict[str, torch.Tensor] = torch.load(output, weights_only=True)
    return found


def wait_for(what: Callable[[], object], timeout: float = 120) -> None:
    """Return when ``what()`` is true."""
    end = time.monotonic() + timeout
    while not what():
        if time.monotonic() > end:
            raise TimeoutError("it did not happen")
        time.sleep(0.005)


def killed_and_resumed(folder: Path, options: list[object]) -> dict[str, float]:
    """Run undisturbed, and killed and resumed, on 1, 2 and 3 processes; the scores of them all.

    The bits are the same with as many processes, and but for rounding they are with others.
    """
    import pytest

    found = []
    for processes in (1, 2, 3):
        whole, cut = folder / f"whole-{processes}", folder / f"cut-{processes}"
        run = [*options, "--sync-batch-norm"]
        with Ranks(folder, [*run, "--work-dir", whole], processes) as ranks:
            assert ranks.wait() == [0] * processes, ranks.said()
        with Ranks(folder, [*run, "--work-dir", cut], processes) as ranks:
            wait_for((cut / "checkpoints" / str(Position(1, 3))).exists)
            ranks.kill()
        with Ranks(folder, [*run, "--work-dir", cut], processes) as ranks:
            assert ranks.wait() == [0] * processes, ranks.said()
            assert "going on from epoch 1" in ranks.said()
        assert final_state(cut) == final_state(whole)
        found.append(last_row(whole / "test.csv") | last_row(whole / "scores.csv"))
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[2] == pytest.approx(found[0], rel=1e-3)
    return found[0]


def last_row(path: Path) -> dict[str, float]:
    with path.open(newline="") as file:
        *_, row = csv.DictReader(file)
    return {name: float(cell) for name, cell in row.items()}


def final_state(work_dir: Path) -> dict[str, object]:
    """All that a finished run leaves that must be the same bits: weights, state, CSV files.

    Of the newest checkpoint everything is compared: parameters, optimiser, scaler, position,
    and every rank's buffers, random state and scores.
    """
    newest = max((work_dir / "checkpoints").glob("epoch-*"))
    files = [*sorted(newest.glob("*.pt")), work_dir / "model.pt"]
    state: dict[str, object] = {
        str(file.relative_to(work_dir)): _plain(torch.load(file, weights_only=True))
        for file in files
    }
    for name in ("train.csv", "test.csv", "scores.csv"):
        state[name] = (work_dir / name).read_bytes()
    return state


def _plain(value: object) -> object:
    """Tensors as their dtype, shape and bytes, so that ``==`` compares bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


if __name__ == "__main__":
    sys.exit("this is for the tests to import")
