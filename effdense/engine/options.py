"""What a run is: its options, of which the data set's recipe fills in the open ones.

Importing this imports no torch: ``--help`` and a mistyped option are answered at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from ..choices import BackendName, NetworkName, OptimizerName, Save
from ..errors import UserError
from ..machine.environment import usable_cores
from ..machine.sizes import parse_size
from .recipes import ADAPTIVE_LR, RECIPES, UNAUGMENTED_DROP_RATE, Recipe

DataName = Literal["digits", "cifar10", "cifar100", "svhn", "imagefolder", "webdataset", "fake"]


def _recipe_default(metavar: str, note: str = "see above") -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {note})")


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run; None stands for the data set's own default."""

    data: DataName = "digits"
    """Data set; see above."""
    data_dir: Path = Path("data")
    """Folder that holds the data set."""
    download: bool = False
    """Fetch the data set (cifar10, cifar100, svhn) into --data-dir if it is not there."""
    svhn_train_only: bool = False
    """Leave out SVHN's 531,131 extra images, which the paper trains on besides the 73,257."""
    augment: Annotated[Literal["standard", "none"] | None, _recipe_default("{standard,none}")] = (
        None
    )
    """Augmentation of the training images; see above."""
    image_size: Annotated[int | None, _recipe_default("PIXELS")] = None
    """Height and width of the images, pixels; for imagefolder, webdataset and fake only."""

    arch: Annotated[
        NetworkName | None, _recipe_default(f"{{{','.join(get_args(NetworkName))}}}")
    ] = None
    """Network. densenet_bc: the paper's CIFAR family; the others: its ImageNet family."""
    depth: Annotated[int | None, _recipe_default("LAYERS")] = None
    """Depth of densenet_bc, layers: 6 n + 4."""
    growth_rate: Annotated[int | None, _recipe_default("CHANNELS")] = None
    """Growth rate of densenet_bc, channels per layer: the paper's k."""
    drop_rate: Annotated[
        float | None, _recipe_default("P", "see above; cifar with --augment none: 0.2")
    ] = None
    """Dropout probability of each layer's new features, in [0, 1)."""
    save: Save = "features"
    """What a dense block keeps for backward, from most memory to least."""
    budget: Annotated[str | None, _recipe_default("SIZE", "none")] = None
    """Choose each block's --save so that a step fits, such as 8GiB; auto: what is free."""
    offload: bool = False
    """Keep what dense blocks keep in main memory (of a GPU) or in files (of a processor); with
    --budget, where nothing else fits."""
    backend: BackendName = "auto"
    """What computes the dense blocks."""

    epochs: Annotated[int | None, _recipe_default("EPOCHS")] = None
    """Length of the training, passes over the training set."""
    batch_size: Annotated[int | None, _recipe_default("IMAGES")] = None
    """Images per step over all processes, which share them as evenly as possible."""
    optimizer: OptimizerName = "sgd"
    """Optimiser. sgd has Nesterov momentum."""
    lr: Annotated[
        float | None, _recipe_default("RATE", f"see above; other than sgd: {ADAPTIVE_LR}")
    ] = None
    """Learning rate at the start."""
    momentum: float = 0.9
    """Momentum of sgd, in [0, 1)."""
    weight_decay: Annotated[float | None, _recipe_default("DECAY")] = None
    """L2 penalty on every parameter."""
    schedule: Annotated[
        Literal["multistep", "cosine"] | None, _recipe_default("{multistep,cosine}")
    ] = None
    """Learning rate over time. multistep: divided by 10 at each milestone; cosine: down to 0."""
    milestones: Annotated[tuple[float, ...] | None, _recipe_default("FRACTION [FRACTION ...]")] = (
        None
    )
    """Where multistep divides, fractions of --epochs."""
    label_smoothing: float = 0.0
    """Share of the training target that is spread over all classes, in [0, 1)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What is computed in; 16 bits by autocast over float32 parameters, float16 with scaled
    loss."""
    channels_last: bool = False
    """Hold images and weights in channels-last order. The dense blocks do so in any case."""
    compile: bool = False
    """Compile the network with torch.compile; each dense block breaks its graph."""
    deterministic: bool = False
    """Allow only algorithms that give the same bits every time. On processors all of them do."""
    accumulate: int = 1
    """Take each step in so many parts, one after the other, for less memory; batch norm then
    sees a part at a time."""
    sync_batch_norm: bool = False
    """Take batch norm's statistics over the shares of all processes, as one process would."""
    clip_grad: float = 0.0
    """Largest norm of the gradient of all parameters together; 0: any."""
    ema: float = 0.0
    """Decay per step, in [0, 1), of a moving average of the weights, which is then what is
    tested and kept; 0: none."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do about a loss or gradient that is not finite. skip: leave out its step."""
    max_skipped: int = 10
    """Stop after leaving out more steps than that."""
    corrupt_images: Literal["stop", "skip"] = "stop"
    """What to do about image files that cannot be read. skip: in training, take the data set's
    next image instead; in testing, leave it out."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, the augmentation and dropout."""

    work_dir: Annotated[
        Path | None, _recipe_default("PATH", "the first free one of runs/DATA-1, runs/DATA-2, ...")
    ] = None
    """Folder for the run's files: its options, scores, curves, checkpoints and weights."""
    resume: Literal["auto", "never"] = "auto"
    """What to do with the run that --work-dir holds. auto: go on with it if it has the same
    options, else it is an error; never: it is an error."""
    overwrite: bool = False
    """Replace the run that --work-dir holds."""
    checkpoint_steps: int = 0
    """Write a checkpoint after so many steps, besides those at each epoch's end; 0: none."""
    checkpoint_minutes: float = 15.0
    """Write a checkpoint when the last one is so many minutes old; 0: none."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay; the one with the least test error stays too."""
    tensorboard: bool = False
    """Write the scores for TensorBoard too, which must be installed."""
    system_interval: int = 100
    """Steps between rows of system.csv, each process's memory and GPU; 0: none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: the GPUs if there are any."""
    hang_timeout: float = 600.0
    """End a run that has not moved for so many seconds and name the process that hangs; 0: never.
    Between several processes only."""
    num_workers: Annotated[
        int | None, _recipe_default("PROCESSES", "the cores per process, at most 8")
    ] = None
    """Loader processes per training process; for imagefolder and webdataset only, other data stay
    in memory."""
    threads: Annotated[int | None, _recipe_default("THREADS", "the cores per process")] = None
    """Processor threads per training process."""

    def resolved(self, *, world_size: int = 1, local_world_size: int = 1) -> ResolvedConfig:
        """Fill in the data set's recipe and check every value.

        Args:
            world_size: processes in all.
            local_world_size: processes on this machine.

        Raises:
            UserError: for a value that cannot be; names the option.
        """
        recipe = dataclasses.asdict(RECIPES[self.data])
        if self.optimizer != "sgd":
            recipe["lr"] = ADAPTIVE_LR
        if self.data.startswith("cifar") and self.augment == "none":
            recipe["drop_rate"] = UNAUGMENTED_DROP_RATE
        cores = max(1, usable_cores() // local_world_size)
        defaults = {**recipe, "threads": cores, "num_workers": min(8, cores)}
        values: dict[str, Any] = {
            field.name: defaults.get(field.name) if value is None else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }
        config = ResolvedConfig(**values)
        _check(config, world_size)
        return config


# What may differ between a run and its resumption: it changes nothing that is learnt, or, for
# device and threads, no more than the last bits.
MAY_CHANGE = frozenset(
    {
        "data_dir",
        "download",
        "work_dir",
        "resume",
        "overwrite",
        "checkpoint_steps",
        "checkpoint_minutes",
        "keep_checkpoints",
        "max_skipped",
        "hang_timeout",
        "tensorboard",
        "system_interval",
        "offload",
        "device",
        "num_workers",
        "threads",
    }
)


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(Recipe, TrainConfig):
    """A run's options with nothing left open but the work directory and the budget."""

    num_workers: int
    threads: int

    def options(self) -> dict[str, Any]:
        """Every option in JSON's types."""
        return {
            key: str(value)
            if isinstance(value, Path)
            else list(value)
            if isinstance(value, tuple)
            else value
            for key, value in dataclasses.asdict(self).items()
        }

    def differences(self, held: Mapping[str, Any]) -> list[str]:
        """What keeps this run from going on with one of the options ``held``."""
        return [
            f"--{key.replace('_', '-')} is {value}, was {held[key]}"
            for key, value in self.options().items()
            if key in held and key not in MAY_CHANGE and held[key] != value
        ]

    def lr_at(self, progress: float) -> float:
        """Learning rate after ``progress`` in [0, 1] of the training.

        A function of the position only, so that nothing has to be remembered between steps.
        """
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * progress)) / 2
        return self.lr * 0.1 ** sum(progress >= milestone for milestone in self.milestones)


# What options were called in runs that are still to be gone on with, and their values.
_OLD_NAMES = {
    "opt": "optimizer",
    "amp": "dtype",
    "sync_bn": "sync_batch_norm",
    "memory_budget": "budget",
}
_OLD_VALUES = {"amp": {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}}


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """A run's recorded options by the names that they have now."""
    return {
        _OLD_NAMES.get(name, name): _OLD_VALUES.get(name, {}).get(value, value)
        if isinstance(value, str)
        else value
        for name, value in options.items()
    }


def _check(config: ResolvedConfig, world_size: int) -> None:
    def require(met: bool, option: str, what: str) -> None:
        if not met:
            value = getattr(config, option)
            raise UserError(f"--{option.replace('_', '-')} must be {what}, got {value}")

    for option in ("epochs", "batch_size", "image_size", "depth", "growth_rate", "threads"):
        require(getattr(config, option) >= 1, option, "at least 1")
    for option in ("keep_checkpoints", "accumulate"):
        require(getattr(config, option) >= 1, option, "at least 1")
    require(0 <= config.ema < 1, "ema", "in [0, 1)")
    require(0 <= config.clip_grad < math.inf, "clip_grad", "a number, at least 0")
    for option in (
        "num_workers",
        "system_interval",
        "checkpoint_steps",
        "checkpoint_minutes",
        "max_skipped",
        "hang_timeout",
    ):
        require(getattr(config, option) >= 0, option, "at least 0")
    if config.budget not in (None, "auto"):
        try:
            parse_size(config.budget)
        except ValueError as error:
            raise UserError(f"--budget {error}") from None
    require(config.seed >= 0, "seed", "at least 0")
    require(0 < config.lr < math.inf, "lr", "a positive number")
    require(0 <= config.momentum < 1, "momentum", "in [0, 1)")
    require(0 <= config.weight_decay < math.inf, "weight_decay", "a number, at least 0")
    require(0 <= config.label_smoothing < 1, "label_smoothing", "in [0, 1)")
    require(0 <= config.drop_rate < 1, "drop_rate", "in [0, 1)")
    require(all(0 < m < 1 for m in config.milestones), "milestones", "fractions between 0 and 1")
    require(
        config.batch_size >= world_size,
        "batch_size",
        f"at least {world_size}, one image for each of the {world_size} processes",
    )
    fixed_size = config.data not in ("imagefolder", "webdataset", "fake")
    require(
        not fixed_size or config.image_size == RECIPES[config.data].image_size,
        "image_size",
        f"left out for {config.data}, whose images have one size",
    )
    require(
        not config.download or config.data in ("cifar10", "cifar100", "svhn"),
        "download",
        f"left out: {config.data} is not something to download",
    )
