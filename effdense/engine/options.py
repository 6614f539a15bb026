"""What a run is: its options, of which the data set's recipe fills in the open ones.

Importing this imports no torch: ``--help`` and a mistyped option are answered at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from ..choices import AugmentName, BackendName, NetworkName, OptimizerName, Save, ScheduleName
from ..errors import UserError
from ..machine.environment import usable_cores
from .checks import check, check_types
from .recipes import ADAPTIVE_LR, OWN, RECIPES, UNAUGMENTED_DROP_RATE, VOLUMES, Recipe

DataName = Literal[
    "digits", "cifar10", "cifar100", "svhn", "imagefolder", "webdataset", "csv", "fake"
]
NormalizationName = Literal["imagenet", "measured"]


def _recipe_default(metavar: Any, note: str = "the data set's") -> Any:
    """Of a value that is open; ``metavar`` names it, or is the type whose values it has."""
    if not isinstance(metavar, str):
        metavar = f"{{{','.join(get_args(metavar))}}}"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {note})")


GIVEN = "given:"
"""What the name of a model begins with that was given in Python."""


@dataclass(frozen=True)
class DataOptions:
    """What is read."""

    data: DataName = "digits"
    """Data set; see effdense recipes."""
    data_dir: Path = Path("data")
    """Folder that holds the data set."""
    download: bool = False
    """Fetch the data set (cifar10, cifar100, svhn) into --data-dir if it is not there."""
    augment: Annotated[AugmentName | None, _recipe_default(AugmentName)] = None
    """Augmentation of the training images; see effdense recipes."""
    spatial_dims: Literal[2, 3] = 2
    """2: images; 3: volumes, NIfTI or .npy, of imagefolder and csv."""
    spacing: Annotated[tuple[float, float, float] | None, _recipe_default("X Y Z", "as it is")] = (
        None
    )
    """What NIfTI volumes are resampled to along their axes, millimetres."""
    crop: Annotated[tuple[int, int, int] | None, _recipe_default("X Y Z", "--image-size each")] = (
        None
    )
    """What is cut out of volumes, voxels along their axes."""
    image_size: Annotated[int | None, _recipe_default("PIXELS")] = None
    """Height and width of the images, pixels; for imagefolder, webdataset, csv and fake only."""
    table: Annotated[Path | None, _recipe_default("FILE", "none")] = None
    """CSV file that lists the images of --data csv, one a row, with a header."""
    image_column: str = "image"
    """Its column of image files, relative to --data-dir."""
    label_columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN ...")] = ("label",)
    """Its column of class names; or several, a class each, of 1, 0, -1 (uncertain) or nothing."""
    split_column: str = "split"
    """Its column of train, val and test; without it the images are split at random."""
    group_column: str = ""
    """Its column of what must not be in two splits, such as the patient."""
    val_fraction: float = 0.2
    """Share of the groups, in (0, 1), that tests where there is no split column."""
    task: Literal["auto", "classification", "multilabel"] = "auto"
    """multilabel: an image has any number of classes. auto: where labels have several columns."""
    uncertain: Literal["zeros", "ones", "ignore"] = "zeros"
    """What labels of -1 are taken for. ignore: not known."""
    missing_classes: Literal["warn", "stop"] = "warn"
    """What to do about a class that a split has no image of."""
    channels: Annotated[int | None, _recipe_default("1|3", "3, of volumes 1")] = None
    """Channels that image files are read as; 1: grey."""
    window: Annotated[tuple[float, float] | None, _recipe_default("LOW HIGH", "all values")] = None
    """Values of image files that become black and white; needed for floats and 32-bit integers."""
    normalization: Annotated[
        NormalizationName | None,
        _recipe_default(NormalizationName, "imagenet, or measured for one channel"),
    ] = None
    """Mean and deviation of image files; measured: on the training images, once."""
    balance: Literal["none", "loss", "sampling"] = "none"
    """Rare classes. loss: weigh them up; sampling: draw them as often as others."""
    num_workers: Annotated[
        int | None, _recipe_default("PROCESSES", "the cores per process, at most 8")
    ] = None
    """Loader processes per training process; for image files only, other data stay in memory."""
    corrupt_images: Literal["stop", "skip"] = "stop"
    """Unreadable image files. skip: in training the next one is taken, in testing none."""


@dataclass(frozen=True)
class NetworkOptions:
    """What learns."""

    arch: Annotated[NetworkName | None, _recipe_default(NetworkName)] = None
    """Network. densenet_bc: the paper's CIFAR family; the others: its ImageNet family."""
    depth: Annotated[int | None, _recipe_default("LAYERS")] = None
    """Depth of densenet_bc, layers: 6 n + 4."""
    growth_rate: Annotated[int | None, _recipe_default("CHANNELS")] = None
    """Growth rate of densenet_bc, channels per layer: the paper's k."""
    drop_rate: Annotated[
        float | None, _recipe_default("P", "the data set's; cifar with --augment none: 0.2")
    ] = None
    """Dropout probability of each layer's new features, in [0, 1)."""
    model: Annotated[str | None, _recipe_default("MODULE:CALLABLE", "none")] = None
    """Instead of --arch: what returns a model, such as monai.networks.nets:DenseNet121."""
    model_args: Annotated[str | None, _recipe_default("JSON", "none")] = None
    """Arguments for --model, such as '{"spatial_dims": 3, "in_channels": 1, "out_channels": 2}'."""
    sync_batch_norm: bool = False
    """Take batch norm's statistics over the shares of all processes, as one process would."""


@dataclass(frozen=True)
class StartOptions:
    """What training starts from, and what of it learns."""

    weights: Annotated[
        str | None,
        tyro.conf.arg(
            aliases=["--init-from"], metavar="NAME|FILE|RUN", help_behavior_hint="(default: none)"
        ),
    ] = None
    """Published weights, such as IMAGENET1K_V1, a file's or a run's; head and stem are fitted."""
    freeze: Annotated[str | None, _recipe_default("N|PATTERN", "nothing")] = None
    """Freeze all up to the N-th dense block, or parameters by name, such as 'features.*'."""
    freeze_norms: bool = False
    """Keep every batch norm's weights and running statistics as they are."""
    head_lr_factor: float = 1.0
    """How many times the learning rate of the rest the classifier learns at."""


@dataclass(frozen=True)
class MemoryOptions:
    """What is kept for backward."""

    save: Save = "features"
    """What a dense block keeps for backward, from most memory to least."""
    budget: Annotated[str | None, _recipe_default("SIZE", "none")] = None
    """Choose each block's --save so that a step fits, such as 8GiB; auto: what is free."""
    offload: bool = False
    """Keep elsewhere what blocks keep: in main memory (of a GPU) or in files (of a processor)."""
    accumulate: int = 1
    """Take each step in so many parts, for less memory; batch norm sees a part at a time."""
    step_in_backward: bool = False
    """Step a layer's parameters when its backward is done: less memory, in one process only."""
    channels_last: bool = False
    """Hold images and weights in channels-last order. The dense blocks do so in any case."""


@dataclass(frozen=True)
class OptimisationOptions:
    """How it learns."""

    epochs: Annotated[int | None, _recipe_default("EPOCHS")] = None
    """Length of the training, passes over the training set."""
    batch_size: Annotated[int | None, _recipe_default("IMAGES")] = None
    """Images per step over all processes, which share them as evenly as possible."""
    optimizer: OptimizerName = "sgd"
    """Optimiser. sgd has Nesterov momentum."""
    lr: Annotated[
        float | None, _recipe_default("RATE", f"the data set's; other than sgd: {ADAPTIVE_LR}")
    ] = None
    """Learning rate at the start."""
    lr_batch_size: int = 0
    """Batch size that --lr is for: it is scaled to --batch-size. 0: not scaled."""
    warmup_epochs: float = 0.0
    """Epochs in which the rate rises to what it would be, from a tenth of it."""
    momentum: float = 0.9
    """Momentum of sgd, in [0, 1)."""
    weight_decay: Annotated[float | None, _recipe_default("DECAY")] = None
    """L2 penalty on every parameter."""
    exempt_norms: bool = False
    """Leave norms and biases out of --weight-decay."""
    schedule: Annotated[ScheduleName | None, _recipe_default(ScheduleName)] = None
    """Learning rate over time. multistep: divided by 10 at each milestone; cosine: down to 0."""
    milestones: Annotated[tuple[float, ...] | None, _recipe_default("FRACTION [FRACTION ...]")] = (
        None
    )
    """Where multistep divides, fractions of --epochs."""
    label_smoothing: float = 0.0
    """Share of the training target that is spread over all classes, in [0, 1)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What is computed in; 16 bits by autocast over float32 parameters."""
    clip_grad: float = 0.0
    """Largest norm of the gradient of all parameters together; 0: any."""
    ema: float = 0.0
    """Decay per step, in [0, 1), of averaged weights, which are tested and kept; 0: none."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do about a loss or gradient that is not finite. skip: leave out its step."""
    max_skipped: int = 10
    """Stop after leaving out more steps than that; looked at every 20 steps."""
    patience: int = 0
    """Stop after so many epochs without a better test; 0: never."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, the augmentation and dropout."""


@dataclass(frozen=True)
class OutputOptions:
    """What is written, and where."""

    work_dir: Annotated[
        Path | None, _recipe_default("PATH", "the first free one of runs/DATA-1, runs/DATA-2, ...")
    ] = None
    """Folder for the run's files: its options, scores, curves, checkpoints and weights."""
    overwrite: bool = False
    """Replace the run that --work-dir holds, which else is gone on with, by the same options."""
    checkpoint_steps: int = 0
    """Write a checkpoint after so many steps, besides those at each epoch's end; 0: none."""
    checkpoint_minutes: float = 15.0
    """Write a checkpoint when the last one is so many minutes old; 0: none."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay; the best epoch's stays too."""
    best_by: Annotated[str | None, _recipe_default("METRIC", "error; of labels, auroc")] = None
    """Which epoch's weights are exported: by loss, error or a column of scores.csv."""
    tensorboard: bool = False
    """Write the scores for TensorBoard too, which must be installed."""
    system_interval: int = 100
    """Steps between rows of system.csv, each process's memory and GPU; 0: none."""


@dataclass(frozen=True)
class MachineOptions:
    """What computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: the GPUs if there are any."""
    backend: BackendName = "auto"
    """What computes the dense blocks."""
    compile: bool = False
    """Compile the network with torch.compile; each dense block breaks its graph."""
    cuda_graphs: Annotated[
        Literal["auto", "on", "off"],
        tyro.conf.arg(
            help="Start each dense block as one CUDA graph. auto: on a GPU, but for --compile, "
            "--budget, --offload, --step-in-backward, and --sync-batch-norm, whose graphs no GPUs "
            "have replayed yet: one that hangs says nothing."
        ),
    ] = "auto"
    tf32: Annotated[
        Literal["on", "off"] | None, _recipe_default("{on,off}", "as torch's convolutions do: on")
    ] = None
    """Whether a GPU may round the operands of float32 products to TF32, 10 bits of mantissa."""
    deterministic: bool = False
    """Allow only algorithms that give the same bits every time. On processors all of them do."""
    hang_timeout: float = 600.0
    """Seconds after which a run of several processes that stands still is ended; 0: never."""
    threads: Annotated[
        int | None, _recipe_default("THREADS", "$OMP_NUM_THREADS, else the cores per process")
    ] = None
    """Processor threads per training process."""


# in reverse: the fields of the last base come first
@dataclass(frozen=True)
class TrainConfig(
    MachineOptions,
    OutputOptions,
    OptimisationOptions,
    MemoryOptions,
    StartOptions,
    NetworkOptions,
    DataOptions,
):
    """Every option of a run; None stands for the data set's own default."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, str) and name in ("data_dir", "table", "work_dir"):
                object.__setattr__(self, name, Path(value))
            elif isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    def resolved(self, *, world_size: int = 1, local_world_size: int = 1) -> ResolvedConfig:
        """Fill in the data set's recipe and check every value.

        Args:
            world_size: processes in all.
            local_world_size: processes on this machine.

        Raises:
            UserError: for a value that cannot be; names the option.
        """
        check_types(self)
        recipe = dataclasses.asdict(RECIPES["imagefolder" if self.data == OWN else self.data])
        if self.optimizer != "sgd":
            recipe["lr"] = ADAPTIVE_LR
        if self.data.startswith("cifar") and self.augment == "none":
            recipe["drop_rate"] = UNAUGMENTED_DROP_RATE
        arch = self.arch or recipe["arch"]
        unused: list[str] = []
        if self.model or arch != "densenet_bc":
            unused += ["depth", "growth_rate"]
        if self.model:
            unused += ["arch", "drop_rate"]
        given = (self.model or "").startswith(GIVEN)
        network = (self.model or arch).removeprefix(GIVEN)
        for name in unused:
            if getattr(self, name) is not None:
                more = ", or give such arguments in --model-args"
                raise UserError(
                    f"--{name.replace('_', '-')} means nothing for {network}: leave it out"
                    + (more if self.model and not given else "")
                )
            recipe[name] = None
        cores = max(1, usable_cores() // local_world_size)
        if self.spatial_dims == 3:
            recipe |= VOLUMES
        channels = self.channels or (3 if self.spatial_dims == 2 else 1)
        defaults = {
            **recipe,
            "threads": _threads(cores),
            "num_workers": min(8, cores),
            "channels": channels,
            "normalization": "imagenet" if channels == 3 else "measured",
        }
        values: dict[str, Any] = {
            field.name: defaults.get(field.name) if value is None else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }
        config = ResolvedConfig(**values)
        check(config, world_size)
        return config


# What may differ between a run and its continuation: what is written, where things lie and how
# long it takes;
_ASIDE = frozenset(
    {
        "data_dir",
        "table",
        "download",
        "work_dir",
        "overwrite",
        "checkpoint_steps",
        "checkpoint_minutes",
        "keep_checkpoints",
        "max_skipped",
        "hang_timeout",
        "tensorboard",
        "system_interval",
        "offload",
        "cuda_graphs",
        "num_workers",
    }
)
# where and how a step is computed, as a run may have to move to another machine: sums may round
# differently, and dropout may draw anew;
ROUNDING = frozenset({"device", "threads", "backend", "save", "budget", "tf32"})
# and the length, as a run that has ended may have been too short: the rest learns at the rates of
# a run of the new length. All else would be another experiment, which --weights RUN begins.
MAY_CHANGE = _ASIDE | ROUNDING | {"epochs", "patience"}


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(Recipe, TrainConfig):
    """A run's options; None is left only where there is nothing to be said."""

    channels: int
    normalization: NormalizationName
    num_workers: int
    threads: int

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of an image or volume, without its channels."""
        return self.crop or (self.image_size,) * self.spatial_dims

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
        lr = self.lr
        if self.lr_batch_size:
            lr *= self.batch_size / self.lr_batch_size
        if progress * self.epochs < self.warmup_epochs:
            lr *= 0.1 + 0.9 * progress * self.epochs / self.warmup_epochs
        if self.schedule == "cosine":
            return lr * (1 + math.cos(math.pi * progress)) / 2
        return lr * 0.1 ** sum(progress >= milestone for milestone in self.milestones)


# What options were called in runs that are still to be gone on with, and their values.
_OLD_NAMES = {
    "opt": "optimizer",
    "amp": "dtype",
    "sync_bn": "sync_batch_norm",
    "memory_budget": "budget",
}
_OLD_VALUES = {
    "amp": {"none": "float32", "bf16": "bfloat16", "fp16": "float16"},
    "augment": {"standard": "paper"},
}


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """A run's recorded options by the names that they have now."""
    found = {
        _OLD_NAMES.get(name, name): _OLD_VALUES.get(name, {}).get(value, value)
        if isinstance(value, str)
        else value
        for name, value in options.items()
    }
    if found.get("arch") != "densenet_bc":
        # what such runs recorded was without a meaning
        found |= {"depth": None, "growth_rate": None}
    return found


def of_given_data(options: TrainConfig, data: Sequence[Any]) -> TrainConfig:
    """The options for data that were given in Python, whose images' shape is the first one's."""
    try:
        shape = tuple(data[0][0][0].shape)[1:]
    except (TypeError, AttributeError, IndexError, KeyError) as error:
        raise UserError(
            f"data must be a training and a test set of (image, label), images as tensors "
            f"(channels, *spatial): {error}"
        ) from None
    return dataclasses.replace(
        options,
        data=OWN,  # type: ignore[arg-type]
        augment="none",
        image_size=shape[-1],
        crop=shape,
        spatial_dims=len(shape),  # type: ignore[arg-type]
    )


def _threads(cores: int) -> int:
    """What OMP_NUM_THREADS says, else the process's cores."""
    # torchrun sets 1 for everybody who says nothing
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if said.isdecimal() and int(said) > ("TORCHELASTIC_RUN_ID" in os.environ):
        return int(said)
    return cores
