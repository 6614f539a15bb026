"""The training loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import effdense

from ..estimation import AMP_DTYPES
from . import plots
from .config import ResolvedConfig, TrainConfig
from .data import Batch, ImageData, Split, global_batches, load, random_key, share
from .distributed import (
    World,
    all_or_none,
    average_running_statistics,
    data_parallel,
    joined_world,
    launched_processes,
    summed,
)
from .errors import TrainingError, UserError
from .records import WorkDir
from .rehearsal import replan_if_needed
from .telemetry import SYSTEM_COLUMNS, Telemetry

# How often the processes add up their losses, which makes them wait for each other and the GPU.
_STEPS_BETWEEN_CHECKS = 20

# Where memory runs out with an error; on a processor the system ends the process instead.
REHEARSED = ("cuda",)


@dataclass(frozen=True)
class Score:
    """Mean loss (nats per sample) and error (per cent) over ``samples`` samples."""

    loss: float
    error: float
    samples: int


class Tally:
    """Adds up loss, mistakes and samples on the device, so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """``loss`` is the mean over the samples of ``logits`` (N, classes), ``labels`` (N,)."""
        wrong = (logits.argmax(1) != labels).sum()
        count = torch.full_like(wrong, len(labels))
        self._sums += torch.stack([loss.detach().double() * len(labels), wrong, count])

    def score(self) -> Score:
        """The result over all processes; a collective."""
        loss, wrong, samples = summed(self._sums).tolist()
        return Score(loss / max(samples, 1), 100 * wrong / max(samples, 1), round(samples))


class Trainer:
    """A network, its optimiser, and the steps that train and test it.

    Args:
        network: on ``world.device`` already, the same on every process.
        config: the run's options.
        world: this process's place; its process group must have been joined.
    """

    def __init__(self, network: nn.Module, config: ResolvedConfig, world: World) -> None:
        self.network = network
        self.config = config
        self.world = world
        self.model = data_parallel(network, world)
        self.optimizer = make_optimizer(network, config)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16")

    def autocast(self) -> AbstractContextManager[object]:
        """The context of ``--amp`` for forward passes."""
        dtype = AMP_DTYPES[self.config.amp]
        return torch.autocast(self.world.device.type, dtype, enabled=dtype is not None)

    def step(
        self, images: Tensor, labels: Tensor, batch_size: int, lr: float
    ) -> tuple[Tensor, Tensor]:
        """Train on this process's share of a batch of ``batch_size`` samples over all processes.

        Returns:
            The mean loss over the share, and its logits.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        with self.autocast():
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        # Gradients are averaged over processes; with this weight that is the mean over the batch
        # however unevenly it is shared.
        weight = len(labels) * self.world.world_size / batch_size
        self.scaler.scale(loss * weight).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), logits.detach()

    def train_epoch(
        self, split: Split, epoch: int, progress: Progress, telemetry: Telemetry | None = None
    ) -> Score:
        """One pass over ``split``; epochs count from 1.

        Raises:
            TrainingError: on every process, if the loss of any is not finite.
        """
        config, world = self.config, self.world
        batches = global_batches(len(split), config.batch_size, config.seed, epoch)
        shares = [share(batch, world.rank, world.world_size) for batch in batches]
        # what dropout draws must differ between processes
        torch.manual_seed(random_key("dropout", config.seed, epoch, world.rank))
        self.model.train()
        tally = Tally(world.device)
        checked = 0
        for i, (images, labels) in enumerate(
            progress.steps(split.batches(shares, epoch, world.device), len(batches))
        ):
            position = (epoch - 1 + i / len(batches)) / config.epochs
            tally.add(*self._losses(images, labels, position), labels)
            if (i + 1) % _STEPS_BETWEEN_CHECKS == 0 or i + 1 == len(batches):
                score = tally.score()
                if not torch.isfinite(torch.tensor(score.loss)):
                    raise TrainingError(
                        f"the loss is {score.loss} in epoch {epoch}, between steps {checked + 1} "
                        f"and {i + 1} of {len(batches)}: try a lower --lr"
                        + ("" if config.amp == "none" else ", or --amp none")
                    )
                checked = i + 1
                progress.show(score)
            if telemetry is not None:
                done = i + 1
                telemetry.after_step(epoch, (epoch - 1) * len(batches) + done, done == len(batches))
        return score

    def _losses(self, images: Tensor, labels: Tensor, position: float) -> tuple[Tensor, Tensor]:
        return self.step(images, labels, self.config.batch_size, self.config.lr_at(position))

    @torch.no_grad()
    def evaluate(self, split: Split) -> Score:
        """Score the network in eval mode on every sample of ``split``, each exactly once."""
        average_running_statistics(self.network)
        world = self.world
        mine = share(torch.arange(len(split)), world.rank, world.world_size)
        per_process = max(1, self.config.batch_size // world.world_size)
        self.model.eval()
        tally = Tally(world.device)
        chunks = mine.split(per_process) if len(mine) else ()
        for images, labels in split.batches(chunks, None, world.device):
            with self.autocast():
                # not through DDP: shares may differ in their number of batches
                logits = self.network(images)
                loss = F.cross_entropy(logits, labels)
            tally.add(loss, logits, labels)
        score = tally.score()
        assert score.samples == len(split)
        return score


def make_optimizer(network: nn.Module, config: ResolvedConfig) -> torch.optim.Optimizer:
    """The optimiser over every parameter, the norms' included, as in the paper's code."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    lr, weight_decay = config.lr, config.weight_decay
    if config.opt == "sgd":
        momentum = config.momentum
        return torch.optim.SGD(
            parameters, lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0
        )
    if config.opt == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=weight_decay)
    return torch.optim.RMSprop(parameters, lr, weight_decay=weight_decay)


def make_network(config: ResolvedConfig, data: ImageData) -> nn.Module:
    """The network ``config`` names, initialised by ``config.seed``.

    Raises:
        UserError: for sizes that no such network has.
    """
    torch.manual_seed(random_key("weights", config.seed))
    options: dict[str, Any] = {
        "num_classes": data.num_classes,
        "in_channels": data.in_channels,
        "drop_rate": config.drop_rate,
        "save": config.save,
        "backend": config.backend,
    }
    try:
        if config.arch == "densenet_bc":
            network = effdense.densenet_bc(config.depth, config.growth_rate, **options)
        else:
            network = getattr(effdense, config.arch)(**options)
    except ValueError as error:
        raise UserError(str(error)) from None
    network.offload = config.offload
    return network


def fit_to_budget(
    network: nn.Module, config: ResolvedConfig, world: World, channels: int, budget: str
) -> str:
    """Set each block's save mode by a budget; returns the plan to be shown.

    Raises:
        UserError: where no choice fits.
    """
    assert isinstance(network, effdense.DenseNet)
    momentum = config.opt == "sgd" and config.momentum > 0
    if budget == "auto" and world.device.type == "cpu":
        # the machine's processes share its memory
        budget = str(effdense.budget_bytes("auto", "cpu") // world.local_world_size)
    try:
        plan = effdense.plan(
            network,
            largest_share(config, world, channels),
            budget,
            optimizer="sgd-momentum" if momentum else config.opt,
            amp=AMP_DTYPES[config.amp],
            ddp=world.world_size > 1,
            device=world.device.type,
        )
    except ValueError as error:
        raise UserError(f"--memory-budget: {error}") from None
    plan.apply(network)
    return str(plan)


def largest_share(config: ResolvedConfig, world: World, channels: int) -> tuple[int, ...]:
    """The shape of the most images that a process gets in a step."""
    images = -(-config.batch_size // world.world_size)
    return images, channels, config.image_size, config.image_size


class Progress:
    """What rank 0 shows: a bar on a terminal, else one line per epoch; other ranks nothing."""

    def __init__(self, config: ResolvedConfig, world: World) -> None:
        self._shown = world.is_main
        self._bars = world.is_main and sys.stderr.isatty()
        self._epochs = config.epochs
        self._bar: tqdm[Batch] | None = None
        self._began = time.monotonic()
        self._epoch = 0

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._shown:
            tqdm.write(line)
            sys.stdout.flush()

    def epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        self._epoch, self._began = epoch, time.monotonic()

    def steps(self, batches: Iterable[Batch], total: int) -> Iterator[Batch]:
        """Pass ``batches`` on, counting them."""
        self._bar = tqdm(
            batches,
            desc=f"epoch {self._epoch}/{self._epochs}",
            total=total,
            disable=not self._bars,
            leave=False,
            unit="step",
        )
        with self._bar:
            yield from self._bar

    def show(self, score: Score) -> None:
        """Put the training loss so far beside the bar."""
        if self._bar is not None and self._bars:
            self._bar.set_postfix(loss=f"{score.loss:.4f}", error=f"{score.error:.2f} %")

    def end(self, train: Score, test: Score, seconds: float) -> None:
        """Print the line of an epoch whose training took ``seconds``."""
        # A small epoch can be shorter than a tick of the clock.
        speed = f"{train.samples / seconds:,.0f} images/s  " if seconds > 0 else ""
        width = len(str(self._epochs))
        self.say(
            f"epoch {self._epoch:{width}}/{self._epochs}  "
            f"train loss {train.loss:.4f} error {train.error:5.2f} %  "
            f"test loss {test.loss:.4f} error {test.error:5.2f} %  "
            f"{speed}{time.monotonic() - self._began:.1f} s"
        )


def run(options: TrainConfig) -> Score:
    """Train, and write the run's work directory; called on every process.

    Returns:
        The score on the test set after the last epoch.

    Raises:
        UserError: for what the user can mend, on every process.
        TrainingError: for a loss that is not finite, on every process.
    """
    world_size, local_world_size = launched_processes()
    config = options.resolved(world_size=world_size, local_world_size=local_world_size)
    with joined_world(config.device, config.threads) as world:
        return _run(config, world)


def _run(config: ResolvedConfig, world: World) -> Score:
    data = _load_together(config, world)
    network = make_network(config, data).to(world.device)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    work_dir = plan = None
    with all_or_none():
        if config.memory_budget is not None:
            plan = fit_to_budget(network, config, world, data.in_channels, config.memory_budget)
        if config.batch_size > len(data.train):
            raise UserError(
                f"--batch-size must be at most {len(data.train)}, the number of training images, "
                f"got {config.batch_size}"
            )
        if world.is_main:
            work_dir = WorkDir.claim(config)
    if work_dir is not None:
        facts = {
            "model": {"name": config.arch, "parameters": num_parameters},
            "images": {"train": len(data.train), "test": len(data.test)},
        }
        work_dir.write_config(config, world, facts)
        train_log, test_log = work_dir.train_log(), work_dir.test_log()

    progress = Progress(config, world)
    progress.say(_headline(config, world, data, num_parameters))
    if plan is not None:
        progress.say(plan)
        if world.device.type in REHEARSED:
            largest = largest_share(config, world, data.in_channels)

            def again(budget: str) -> str:
                return fit_to_budget(network, config, world, data.in_channels, budget)

            changed = replan_if_needed(network, largest, config, world, again)
            if changed is not None:
                progress.say(changed)
    trainer = Trainer(network, config, world)
    system_log = (
        work_dir.system_log(SYSTEM_COLUMNS) if work_dir and config.system_interval else None
    )
    telemetry = Telemetry(world, config.system_interval, system_log)
    if telemetry.warning:
        progress.say(telemetry.warning)
    steps_per_epoch = len(data.train) // config.batch_size
    for epoch in range(1, config.epochs + 1):
        progress.epoch(epoch)
        began = time.monotonic()
        train = trainer.train_epoch(data.train, epoch, progress, telemetry)
        seconds = time.monotonic() - began
        test = trainer.evaluate(data.test)
        if work_dir is not None:
            step = epoch * steps_per_epoch
            lr = trainer.optimizer.param_groups[0]["lr"]
            train_log.add(epoch=epoch, step=step, lr=lr, loss=train.loss, error=train.error)
            test_log.add(
                epoch=epoch, step=step, loss=test.loss, error=test.error, samples=test.samples
            )
            plots.draw([work_dir.path], work_dir.path)
        progress.end(train, test, seconds)
    if work_dir is not None:
        path = work_dir.save_model(network)
        progress.say(f"test error {test.error:.2f} % on {test.samples} images; weights in {path}")
    return test


def _load_together(config: ResolvedConfig, world: World) -> ImageData:
    """Load on every process; fetch first on rank 0, then on one process of each other machine."""
    loaded: list[ImageData] = []
    if config.download:
        for turn in (world.rank == 0, world.rank != 0 and world.local_rank == 0):
            with all_or_none():
                if turn:
                    loaded.append(load(config, download=True))
    with all_or_none():
        if not loaded:
            loaded.append(load(config, download=False))
    return loaded[0]


def _headline(config: ResolvedConfig, world: World, data: ImageData, num_parameters: int) -> str:
    size = f" {config.depth}/{config.growth_rate}" if config.arch == "densenet_bc" else ""
    through = f" through {world.backend}" if world.backend else ""
    return (
        f"{config.data}: {len(data.train):,} training and {len(data.test):,} test images; "
        f"{config.arch}{size}, {num_parameters:,} parameters; "
        f"{world.world_size} process{'es' if world.world_size > 1 else ''} on "
        f"{world.device.type}{through}, {config.threads} "
        f"thread{'s' if config.threads > 1 else ''} each; batch {config.batch_size} in total"
    )
