"""A network in training: steps, epochs and evaluations over all processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..autocast import AUTOCAST_DTYPES, autocast
from ..block.cuda_graphs import cuda_graphs
from ..block.stepping import step_in_backward
from ..errors import TrainingError, UserError
from ..memory.optimizers import exempt_vectors, make_optimizer
from ..norms.synchronization import known_images
from .average import MovingAverage
from .checkpoint import Position
from .data.images import Batch, Split
from .data.order import drawing, global_batches, random_key, share
from .distributed import (
    World,
    all_finite,
    average_running_statistics,
    data_parallel,
    everywhere,
    largest,
)
from .freezing import set_head_rate, set_training
from .options import ResolvedConfig
from .progress import Progress
from .scores import Score, Tally, full_score
from .tasks import Task, balanced
from .undoing import Undo

# Devices whose optimisers take a step in one launch, which GradScaler's doubts need not wait for.
FUSED = ("cuda",)
# Devices with graphs.
CAPTURED = ("cuda",)

# Of mixup on ImageNet, section 3.1 of its paper.
MIXUP_ALPHA = 0.2

# How often the processes add up their losses, which makes them wait for each other and the GPU.
_STEPS_BETWEEN_CHECKS = 20


class Step(NamedTuple):
    """What a step of training leaves behind, besides its weights."""

    loss: Tensor
    """(): the mean over this process's share."""
    logits: Tensor
    """(N, classes) of the share."""
    held: Tensor | None
    """(): false where the step was left out; None where no step is."""


def wants_graphs(config: ResolvedConfig, world: World) -> bool:
    """Whether --cuda-graphs stands for CUDA graphs in this run.

    Raises:
        UserError: where they are asked for and cannot be.
    """
    if config.cuda_graphs == "on":
        if world.device.type not in CAPTURED:
            raise UserError(
                f"--cuda-graphs on needs a GPU, this run is on {world.device.type}; leave it out"
            )
        if config.compile:
            raise UserError("--cuda-graphs on does not go with --compile; leave out one of them")
    against = [config.compile, config.offload, config.sync_batch_norm, config.budget]
    against.append(config.step_in_backward)
    wanted = config.cuda_graphs == "on" or (config.cuda_graphs == "auto" and not any(against))
    return wanted and world.device.type in CAPTURED


class Trainer:
    """A network, its optimiser, and the steps that train and test it.

    Args:
        network: on ``world.device`` already, the same on every process.
        config: the run's options.
        world: this process's place; its process group must have been joined.
        task: what the network is taught.
    """

    def __init__(
        self, network: nn.Module, config: ResolvedConfig, world: World, task: Task
    ) -> None:
        self.network = network
        self.config = config
        self.world = world
        self.task = task.on(world.device)
        self._channels_last = (
            torch.channels_last if config.spatial_dims == 2 else torch.channels_last_3d
        )
        if config.channels_last:
            network.to(memory_format=self._channels_last)
        # every shape has a program of its own: one for all would depend on which came first
        self._compiled = torch.compile(network, dynamic=False) if config.compile else network
        self.optimizer = make_optimizer(
            config.optimizer,
            network.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=world.device.type in FUSED,
        )
        if config.exempt_norms:
            exempt_vectors(self.optimizer)
        if config.head_lr_factor != 1:
            set_head_rate(network, self.optimizer, config.head_lr_factor)
        if config.step_in_backward:
            step_in_backward(network, self.optimizer)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
        # its scale is made by the first number that it scales
        self.scaler.scale(torch.zeros((), device=world.device))
        self._begin_momenta()
        self.average = MovingAverage(network, config.ema) if config.ema else None
        self.position = Position(epoch=1, step=0)
        """What comes next."""
        self._tally = Tally(task, world.device)
        self._left_out = torch.zeros(2, dtype=torch.int64, device=world.device)
        """How many steps, and the last one's number in its epoch."""
        self.waited = 0.0
        """Seconds for which steps of this epoch have waited for their images."""
        self.mark: Callable[[str], None] = lambda doing: None
        """Told what the trainer is doing, whenever that changes."""

    @property
    def tested(self) -> nn.Module:
        """The network that is tested and kept: the average of the weights, where there is one."""
        return self.network if self.average is None else self.average.module

    @cached_property
    def model(self) -> nn.Module:
        """The network as it is trained, over all processes; its first use is a collective."""
        return data_parallel(cast(nn.Module, self._compiled), self.world)

    def autocast(self) -> AbstractContextManager[object]:
        """The context of ``--dtype`` for forward passes."""
        dtype = AUTOCAST_DTYPES.get(self.config.dtype)
        return autocast(self.world.device.type, dtype)

    @property
    def skipped(self) -> int:
        """Steps left out so far because something was not finite; waits for the device."""
        return int(self._left_out[0])

    def step(self, images: Tensor, labels: Tensor, batch_size: int, lr: float) -> Step:
        """Train on this process's share of a batch of ``batch_size`` samples over all processes.

        With ``--non-finite skip`` the device decides whether the step holds, and nobody waits
        for it: all is computed, and put back where it does not.
        """
        skips = self.config.non_finite == "skip"
        undo = Undo(self._moved()) if skips else None
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        self.optimizer.zero_grad()
        loss, logits = self._backward(images, labels, batch_size)
        held = self._is_finite(loss) if skips else None
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_grad)
        self._step_scaled()
        if self.average is not None:
            self.average.update_parameters(self.network)
        if undo is not None and held is not None:
            undo.unless(held, self._moved())
            self._left_out[:1] += ~held
            self._left_out[1:].masked_fill_(~held, self.position.step + 1)
        return Step(loss, logits, held)

    def _moved(self) -> list[Tensor]:
        """All that a step changes, where the network is."""
        found = [*self.network.parameters(), *self.network.buffers(), *self._moments()]
        if self.scaler.is_enabled():
            found += [self.scaler._scale, self.scaler._growth_tracker]  # type: ignore[list-item]
        if self.average is not None:
            found += [*self.average.module.parameters(), *self.average.module.buffers()]
        # a count of steps in main memory is left as it is: only rmsprop has it, and reads it never
        return [tensor for tensor in found if tensor.device == self._left_out.device]

    def _moments(self) -> Iterator[Tensor]:
        """What the optimiser keeps."""
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def _begin_momenta(self) -> None:
        """Zeros, where a fused step may be left out by its scaler.

        torch's fused SGD makes them of what lies in memory, for its first step to write; where
        that one is left out, the second would go on with whatever they hold.
        """
        fused = self.world.device.type in FUSED and self.scaler.is_enabled()
        if fused and self.config.optimizer == "sgd" and self.config.momentum:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    self.optimizer.state[parameter]["momentum_buffer"] = zeros

    def _step_scaled(self) -> None:
        """The optimiser's step, unless a scaled gradient overflowed."""
        waits = self.scaler.is_enabled() and self.config.optimizer == "rmsprop"
        if not waits or self.world.device.type not in FUSED:
            self.scaler.step(self.optimizer)
        else:
            # torch has no fused one, for which the scaler need not read its doubts
            if not self.config.clip_grad:
                self.scaler.unscale_(self.optimizer)
            undo = Undo(self._moved())
            held = all_finite(self._gradients())
            self.optimizer.step()
            undo.unless(held, self._moments())
        self.scaler.update()

    def _backward(self, images: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """Add up the gradient of the share, part by part; its mean loss and its logits.

        Only after the last part are the processes' gradients averaged.
        """
        # norms that synchronise need as many parts in every process, even if one is empty
        most = self._most_images(batch_size, len(labels))
        part_size = self._part_size(most)
        last = (most - 1) // part_size * part_size
        losses, logits = [], []
        for first in range(0, last + 1, part_size):
            part, part_labels = (tensor[first : first + part_size] for tensor in (images, labels))
            alone = isinstance(self.model, DistributedDataParallel) and first < last
            with self.model.no_sync() if alone else nullcontext():  # type: ignore[operator]
                with self.autocast(), self._known_images(batch_size, first, part_size):
                    said = self.model(part)
                    # without samples 0, where a mean would be NaN
                    loss = self.task.loss(said, part_labels) if len(part_labels) else said.sum()
                # Gradients are averaged over processes; with this weight that is the mean over
                # the batch however unevenly it is shared.
                weight = len(part_labels) * self.world.world_size / batch_size
                self.scaler.scale(loss * weight).backward()
            losses.append(loss.detach() * (len(part_labels) / len(labels)))
            logits.append(said.detach())
        return torch.stack(losses).sum(), torch.cat(logits)

    def _known_images(
        self, batch_size: int, first: int, part_size: int
    ) -> AbstractContextManager[None]:
        """Norms that synchronise need not ask how many images each process has in a part."""
        world_size = self.world.world_size
        if world_size == 1 or not self.config.sync_batch_norm:
            return nullcontext()
        shares = [
            batch_size // world_size + (r < batch_size % world_size) for r in range(world_size)
        ]
        return known_images([min(part_size, max(0, own - first)) for own in shares])

    def _most_images(self, batch_size: int, own: int) -> int:
        """By which processes divide their shares into parts: as many, where norms synchronise."""
        return -(-batch_size // self.world.world_size) if self.config.sync_batch_norm else own

    def _part_size(self, images: int) -> int:
        """Of the parts in which --accumulate takes this process's share of a batch."""
        return -(-images // self.config.accumulate)

    def capture(self, image_shape: Sequence[int]) -> str | None:
        """Have the network's stages run by CUDA graphs where --cuda-graphs wants it.

        Before :attr:`model` is used: what DistributedDataParallel holds of each parameter belongs
        to the stream on which it was made, which no other stream's capture may touch.

        Args:
            image_shape: (channels, height, width).

        Returns:
            What came of it, None where it was not wanted.
        """
        assert "model" not in vars(self)
        if not wants_graphs(self.config, self.world):
            return None
        own = share(torch.arange(self.config.batch_size), self.world.rank, self.world.world_size)
        device = self.world.device
        generator = torch.Generator(device).manual_seed(0)
        batch_size = self.config.batch_size
        part_size = self._part_size(self._most_images(batch_size, len(own)))
        shape = min(part_size, len(own)), *image_shape
        images = torch.randn(shape, generator=generator, device=device)
        if self.config.channels_last:
            images = images.contiguous(memory_format=self._channels_last)
        set_training(self.network, self.config)
        with self.autocast(), self._known_images(batch_size, 0, part_size):
            return str(cuda_graphs(self.network, images))

    def _is_finite(self, loss: Tensor) -> Tensor:
        """Whether the loss of every process, and the gradient, is finite, (); a collective."""
        tensors = [loss.detach()]
        if not self.scaler.is_enabled():  # which leaves out steps itself until its scale fits
            tensors += self._gradients()
        return everywhere(all_finite(tensors))

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.network.parameters() if p.grad is not None]

    def settle_buckets(self, image_shape: Sequence[int]) -> None:
        """Have DDP group its buckets before the first step.

        It groups them anew after its first backward, by the order in which gradients came, and
        the order in which processes' gradients are summed follows the groups. Without this a
        run that goes on from a checkpoint would take its first step with the first grouping,
        and with three processes or more end with other bits.

        Args:
            image_shape: (channels, height, width), or of volumes.
        """
        if self.world.world_size == 1:
            return
        before = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        set_training(self.network, self.config)
        images = torch.zeros((2, *image_shape), device=self.world.device)
        with self.autocast():
            self.model(images).sum().backward()
        self.optimizer.zero_grad()
        self._set_buffers(before)

    def train_epoch(
        self, split: Split, progress: Progress, after_step: Callable[[int], None]
    ) -> Score:
        """The rest of the epoch that :attr:`position` is in.

        Args:
            split: the training images.
            progress: shows it.
            after_step: called after each step with the number of steps left.

        Raises:
            TrainingError: on every process, if the loss of any is not finite.
        """
        config, world = self.config, self.world
        epoch, done = self.position.epoch, self.position.step
        weights = None
        if config.balance == "sampling":
            weights = balanced(split.labels.cpu(), len(self.task.classes))
        batches = global_batches(len(split), config.batch_size, config.seed, epoch, weights)
        shares = [share(batch, world.rank, world.world_size) for batch in batches[done:]]
        mixes = config.augment == "mixup"
        if mixes:
            # each is mixed with the one before it in the whole batch
            before = [share(b.roll(1), world.rank, world.world_size)[:1] for b in batches[done:]]
            shares = [torch.cat(pair) for pair in zip(before, shares, strict=True)]
        if not done:
            self._tally = Tally(self.task, world.device)
            # what dropout draws must differ between processes
            torch.manual_seed(random_key("dropout", config.seed, epoch, world.rank))
        self.model.train()
        set_training(self.network, self.config)
        self.waited = 0.0
        fetched = self._fetched(split.batches(shares, epoch, world.device))
        for step, (images, labels) in enumerate(progress.steps(fetched, len(batches), done), done):
            if mixes:
                images, labels = self._mixed(images, labels)
            lr = config.lr_at((epoch - 1 + step / len(batches)) / config.epochs)
            loss, logits, held = self.step(images, labels, config.batch_size, lr)
            self._tally.add(loss, logits, labels, held)
            self.position = Position(epoch, step + 1)
            if (step + 1) % _STEPS_BETWEEN_CHECKS == 0:
                self.check()
            if progress.is_due():
                progress.show(self._tally.score(own=True), self.waited)
            after_step(len(batches) - step - 1)
        return self.check()

    def _fetched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass ``batches`` on, timing how long they are waited for."""
        while True:
            place = f"step {self.position.step + 1} of epoch {self.position.epoch}"
            self.mark(f"reading the images of {place}")
            began = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            self.mark(f"in {place}")
            images, labels = batch
            if self.config.channels_last:
                images = images.contiguous(memory_format=self._channels_last)
            yield images, labels

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each but the first, mixed with the one before it: the same for any number of processes.

        Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; by torchvision.
        """
        from torchvision.transforms import v2

        mix = v2.MixUp(alpha=MIXUP_ALPHA, num_classes=len(self.task.classes))
        with drawing("mixup", self.config.seed, self.position.epoch, self.position.step):
            images, labels = mix(images, labels)
        return images[1:], labels[1:]

    def check(self) -> Score:
        """The training score of the epoch so far; a collective.

        Raises:
            TrainingError: on every process, if it, the weights or the running statistics of any
                process are not finite, or when too many steps have been left out.
        """
        if self.config.non_finite == "skip":
            skipped, last = self._left_out.tolist()
            if skipped > self.config.max_skipped:
                raise TrainingError(
                    f"{skipped} steps had a loss or gradient that is not finite, the last of "
                    f"them step {last} of epoch {self.position.epoch}: try a lower --lr, or let "
                    f"--max-skipped be larger"
                )
        score = self._tally.score()
        finite = all_finite([*self.network.parameters(), *self.network.buffers()])
        (broken,) = largest([not finite])
        if broken or not math.isfinite(score.loss):
            what = "weights are not" if math.isfinite(score.loss) else f"loss is {score.loss}, not"
            raise TrainingError(
                f"the {what} finite in epoch {self.position.epoch}, by step {self.position.step}: "
                f"try a lower --lr"
                + ("" if self.config.dtype == "float32" else ", or --dtype float32")
            )
        return score

    def shared_state(self) -> dict[str, Any]:
        """What is the same on every process; a tensor by each of its names, as in a state dict."""
        return {
            "parameters": _detached(self.network.named_parameters(remove_duplicate=False)),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "average": {}
            if self.average is None
            else _detached(self.average.named_parameters(remove_duplicate=False)),
        }

    def own_state(self) -> dict[str, Any]:
        """What is this process's own."""
        random = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.world.device)
        return {
            "buffers": dict(self.network.named_buffers(remove_duplicate=False)),
            "average": {}
            if self.average is None
            else dict(self.average.named_buffers(remove_duplicate=False)),
            "random": random,
            "tally": self._tally.state(),
        }

    @torch.no_grad()
    def restore(self, position: Position, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`shared_state` gave at ``position``."""
        self.position = position
        for name, parameter in self.network.named_parameters():
            parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._left_out[0] = state["skipped"]
        if self.average is not None:
            for name, parameter in self.average.named_parameters():
                parameter.copy_(state["average"][name])

    def restore_own(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`own_state` gave."""
        self._set_buffers(state["buffers"])
        if self.average is not None:
            for name, buffer in self.average.named_buffers():
                buffer.copy_(state["average"][name])
        self._tally.restore(state["tally"])
        random, device = state["random"], self.world.device
        torch.set_rng_state(random["cpu"])
        if device.type == "cuda":
            if "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], device)
            else:
                # of a run on processors, or on another number of processes
                torch.cuda.manual_seed(torch.initial_seed())

    @torch.no_grad()
    def _set_buffers(self, values: Mapping[str, Tensor]) -> None:
        for name, buffer in self.network.named_buffers():
            buffer.copy_(values[name])

    @torch.no_grad()
    def evaluate(self, split: Split, progress: Progress | None = None) -> Score:
        """Score the network in eval mode on every sample of ``split``, each exactly once.

        The score's number of samples is less than the split's where images could not be read.
        """
        if not self.config.sync_batch_norm:  # with it they are the same everywhere
            average_running_statistics(self.tested)
        world = self.world
        mine = share(torch.arange(len(split)), world.rank, world.world_size)
        per_process = max(1, self.config.batch_size // world.world_size)
        self.tested.eval()
        task = self.task.plain()
        tally, answers = Tally(task, world.device), []
        chunks = mine.split(per_process) if len(mine) else ()
        batches = split.batches(chunks, None, world.device)
        if progress is not None:
            batches = progress.tests(batches, len(chunks))
        for number, (images, labels) in enumerate(batches, 1):
            self.mark(f"testing, at batch {number} of {len(chunks)}")
            with self.autocast():
                # not through DDP: shares may differ in their number of batches
                logits = self.tested(images)
                loss = task.loss(logits, labels)
            tally.add(loss, logits, labels)
            answers.append((logits, labels))
        self.mark("waiting for the others' test scores")
        if not answers:
            answers = [(torch.empty(0), torch.empty(0))]
        outputs, truth = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return full_score(tally.score(), task, outputs, truth, len(split))


def _detached(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in named}
