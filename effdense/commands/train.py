"""``train``: what ``train_ddp.py`` does."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..engine.options import (
    DataOptions,
    MachineOptions,
    MemoryOptions,
    NetworkOptions,
    OptimisationOptions,
    OutputOptions,
    StartOptions,
    TrainConfig,
)
from ..errors import Interrupted
from . import front_end


@dataclass(frozen=True)
class Options:
    """Train a DenseNet; in N processes: torchrun --nproc_per_node N -m effdense train.

    Each data set brings its own defaults: effdense recipes lists them.
    """

    data: DataOptions = field(default_factory=DataOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    start: StartOptions = field(default_factory=StartOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    machine: MachineOptions = field(default_factory=MachineOptions)

    def config(self) -> TrainConfig:
        """The same without the groups."""
        groups = [getattr(self, group.name) for group in fields(self)]
        return TrainConfig(
            **{
                option.name: getattr(each, option.name)
                for each in groups
                for option in fields(each)
            }
        )


def parse(arguments: Sequence[str] | None, program: str) -> TrainConfig:
    """What a command line asks for; as of :func:`effdense.commands.front_end.parse`."""
    return front_end.parse(Options, arguments, program=program).config()


def main(program: str) -> None:
    """What a script called ``program`` does."""
    front_end.main(Options, run, program=program)


def run(options: Options) -> None:
    # after the options: a mistyped one is answered at once
    from ..engine import training

    try:
        training.train(options.config())
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}; this goes on from there: {_again(stopped)}") from None


def _again(stopped: Interrupted) -> str:
    """The command that goes on with a run that was stopped."""
    script = Path(sys.argv[0])
    is_module = script.name in ("effdense", "__main__.py")
    words = [word for word in sys.argv[1:] if word != "--overwrite"]
    if not any(word.split("=")[0] == "--work-dir" for word in words):
        words = [*words, "--work-dir", stopped.work_dir]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if processes != "1":
        own = ["-m", "effdense"] if is_module else [str(script)]
        return shlex.join(["torchrun", "--nproc_per_node", processes, *own, *words])
    return shlex.join(["effdense", *words] if is_module else ["python", str(script), *words])
