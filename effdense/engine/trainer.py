"""A network in training: steps, epochs and evaluations over all processes."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..estimation import AMP_DTYPES
from .config import ResolvedConfig
from .data import Split, global_batches, random_key, share
from .distributed import World, average_running_statistics, data_parallel
from .errors import TrainingError
from .progress import Progress
from .scores import Score, Tally

# How often the processes add up their losses, which makes them wait for each other and the GPU.
_STEPS_BETWEEN_CHECKS = 20


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

    def train_epoch(self, split: Split, epoch: int, progress: Progress) -> Score:
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
