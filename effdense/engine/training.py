"""A run from its options to its weights."""

from __future__ import annotations

import time

from . import plots
from .config import ResolvedConfig, TrainConfig
from .data import ImageData, load
from .distributed import World, all_or_none, joined_world, launched_processes
from .errors import UserError
from .networks import fit_to_budget, make_network
from .progress import Progress
from .records import WorkDir
from .scores import Score
from .trainer import Trainer


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
            plan = fit_to_budget(network, config, world, data.in_channels)
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
    trainer = Trainer(network, config, world)
    steps_per_epoch = len(data.train) // config.batch_size
    for epoch in range(1, config.epochs + 1):
        progress.epoch(epoch)
        began = time.monotonic()
        train = trainer.train_epoch(data.train, epoch, progress)
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
