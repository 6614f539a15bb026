"""A run from its options to its weights."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.cpu_library import is_compiled
from ..backends.precision import float32_products, tf32_convolutions
from ..errors import TrainingError, UserError, first_line
from ..weights import safetensors_bytes
from .checkpoint import Checkpoint, CheckpointStore, Position
from .data.datasets import load, needs_preparation
from .data.images import ImageData, Split
from .data.own import own_data
from .distributed import (
    World,
    all_or_none,
    from_main,
    gathered,
    in_turns,
    joined_world,
    largest,
    launched_processes,
    lost_processes,
)
from .export import described
from .freezing import freeze
from .mistakes import pictures
from .networks import (
    check_size,
    fit_to_budget,
    largest_share,
    make_network,
    network_name,
    require_backend,
)
from .normalization import settle_normalization
from .options import GIVEN, ResolvedConfig, TrainConfig, of_given_data
from .progress import Progress, Speed, held_memory
from .records import CHECKPOINTS, LOG_COLUMNS, CsvLog, WorkDir, saved
from .rehearsal import replan_if_needed
from .report import html_report
from .resumption import Keeper, go_on, weights_in
from .scores import Score, metric_names
from .signals import StopSignals
from .standings import Standings
from .start import load_start, read_start, with_network_of_run
from .tasks import make_task
from .telemetry import Telemetry
from .tensorboard import add_scores, require_tensorboard
from .trainer import Trainer, wants_graphs
from .watchdog import Watchdog

# Drawing takes half a second, which of short epochs would be much.
_SECONDS_BETWEEN_CURVES = 10.0
# Where memory runs out with an error; on a processor the system ends the process instead.
REHEARSED = ("cuda",)


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch's test."""

    number: int
    """Counted from 1."""
    train: Score
    test: Score
    learning_rate: float
    speed: Speed
    work_dir: Path


OnEpoch = Callable[[Epoch], object]


@dataclass(frozen=True)
class TrainResult:
    """What a run has come to."""

    work_dir: Path
    """Of its files; ``effdense.load(result.work_dir)`` gives the best epoch's network."""
    best_epoch: int
    """Counted from 1."""
    tests: Mapping[int, Score]
    """By epoch: loss, error in per cent, samples."""


def train(
    config: TrainConfig | None = None,
    *,
    model: nn.Module | None = None,
    data: tuple[Any, Any] | None = None,
    on_epoch: OnEpoch | None = None,
) -> TrainResult:
    """Train as the command line does: with checkpoints, exact resumption and a report.

    Under torchrun, or in processes that have RANK, WORLD_SIZE and the like, every process calls it.

    Args:
        config: the options, named as on the command line; :class:`TrainConfig()` where None.
        model: what learns, instead of ``arch``: any module that maps (N, channels, *spatial) to
            (N, classes). Its dense blocks are made linear, in place, and it is trained in place.
        data: a training and a test set, instead of ``config.data``: each of torch's protocol, with
            a length and items of (image, label). Images are float tensors (channels, *spatial) of
            one shape, used as they are; labels numbers of classes, or, of labels that don't exclude
            each other, float tensors (classes,) of 1, 0 and NaN for what is not known.
        on_epoch: called on rank 0 after each epoch's test: the place for other loggers.

    Returns:
        Where it all is, and how good it became.

    Raises:
        ValueError: for what can be mended; says how. As all that is raised here, on every process.
        RuntimeError: for a loss that is not finite, where memory runs out, and for a run that was
            told to stop, which the same call with the same ``work_dir`` goes on with.
    """
    world_size, local_world_size = launched_processes()
    options = config or TrainConfig()
    if model is None:
        options = with_network_of_run(options)
    else:
        options = replace(options, model=f"{GIVEN}{type(model).__name__}")
    if data is not None:
        options = of_given_data(options, data)
    resolved = options.resolved(world_size=world_size, local_world_size=local_world_size)
    with (
        _exhaustion_in_words(),
        StopSignals() as signals,
        joined_world(resolved.device, resolved.threads) as world,
        _arithmetic(resolved),
    ):
        return _run(resolved, world, signals, model, data, on_epoch)


@contextmanager
def _exhaustion_in_words() -> Iterator[None]:
    """Within it a device or allocator that has no more memory is a TrainingError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        raise TrainingError(
            f"out of memory ({first_line(error)}): reduce --batch-size or --image-size, let "
            f"--budget choose what is kept, or take steps in parts with --accumulate"
        ) from error


@contextmanager
def _arithmetic(config: ResolvedConfig) -> Iterator[None]:
    """Within it, --deterministic and --tf32 hold, and cuDNN tries its algorithms else: shapes are
    the same in each step.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        # what cuBLAS asks for; read when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        with nullcontext() if config.tf32 is None else float32_products(config.tf32 == "on"):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _run(
    config: ResolvedConfig,
    world: World,
    signals: StopSignals,
    model: nn.Module | None = None,
    given: tuple[Any, Any] | None = None,
    on_epoch: OnEpoch | None = None,
) -> TrainResult:
    held = held_memory(world.device)
    with all_or_none():
        require_backend(config, world.device)
    if given is None:
        data = _load_together(config, world)
    else:
        with all_or_none():
            data = own_data(*given, config.seed, config.num_workers, _answers(model, given))
    settle_normalization(config, data, world)
    with all_or_none():
        task = make_task(config, data)
        metrics = ["loss", "error", *metric_names(task)]
        if config.best_by is not None and config.best_by not in metrics:
            raise UserError(f"--best-by must be one of {', '.join(metrics)}, got {config.best_by}")
    # on rank 0 first: somebody's model may fetch its weights
    network = in_turns(0 if world.is_main else 1, lambda: make_network(config, data, model))
    network.to(world.device)
    facts: dict[str, Any] = {
        "model": {
            "name": network_name(config),
            "parameters": sum(p.numel() for p in network.parameters()),
        },
        "images": {"train": len(data.train), "test": len(data.test)},
        "channels": data.in_channels,
        "classes": list(data.classes),
        "task": task.kind,
        "normalization": data.train.normalization.fact(),
    }
    if data.digest:
        facts["table"] = data.digest
    plan = None
    with ExitStack() as stack:
        work_dir = store = found = None
        with all_or_none():
            check_size(network, config, data.in_channels)
            learning = freeze(network, config)
            if config.tensorboard:
                require_tensorboard()
            wants_graphs(config, world)
            if config.budget is not None:
                plan = fit_to_budget(network, config, world, data.in_channels, config.budget)
            if config.batch_size > len(data.train):
                raise UserError(
                    f"--batch-size must be at most {len(data.train)}, the number of training "
                    f"images, got {config.batch_size}"
                )
            if world.is_main:
                work_dir = stack.enter_context(closing(WorkDir.claim(config, facts, world.launch)))
                store = CheckpointStore(work_dir.path / CHECKPOINTS, config.keep_checkpoints)
        # what the run may be gone on with without; see ROUNDING
        facts["tf32"] = world.device.type == "cuda" and tf32_convolutions()
        progress = Progress(config, world, held)
        progress.say(_headline(config, world, data, facts["model"]["parameters"]))
        with all_or_none():
            if store is not None:
                found = store.newest(progress.say)
        said = [] if from_main(found is not None) else _begin(network, config, world)
        for line in filter(None, [*said, learning]):
            progress.say(line)
        if (
            world.device.type == "cpu"
            and config.backend in ("auto", "cpu")
            and not is_compiled(torch.float32)
        ):
            progress.say("compiling the CPU loops, once: some seconds")
        if plan is not None:
            facts["memory_plan"] = plan
            progress.say(plan)
            if world.device.type in REHEARSED:
                share = largest_share(config, world, data.in_channels)

                def again(budget: str) -> str:
                    return fit_to_budget(network, config, world, data.in_channels, budget)

                changed = replan_if_needed(network, share, config, world, again)
                if changed is not None:
                    facts["memory_plan"] = changed
                    progress.say(changed)
        for note in data.notes:
            progress.say(note)
        trainer = Trainer(network, config, world, task)
        watchdog = stack.enter_context(Watchdog(world, config.hang_timeout))
        trainer.mark = watchdog.mark
        stack.enter_context(lost_processes(world, watchdog.doing))
        image_shape = data.in_channels, *config.image_shape
        captured = trainer.capture(image_shape)
        trainer.settle_buckets(image_shape)
        if captured is not None:
            facts["cuda_graphs"] = captured
            progress.say(captured)
        records = _Records(trainer, work_dir, store, found, facts, progress, data.test, on_epoch)
        standings = _train(trainer, data, records, progress, signals)
        path = from_main(work_dir.path if work_dir else Path())
        return TrainResult(path, standings.best, standings.tests)


def _begin(network: nn.Module, config: ResolvedConfig, world: World) -> list[str]:
    """Give a network that starts its weights, which rank 0 reads; what is to be said; a
    collective.
    """
    if config.weights is None:
        return []
    state: dict[str, Tensor] = {}
    with all_or_none():
        if world.is_main:
            state = read_start(config)
    return [f"starting from {config.weights}", *load_start(network, from_main(state))]


def _train(
    trainer: Trainer,
    data: ImageData,
    records: _Records,
    progress: Progress,
    signals: StopSignals,
) -> Standings:
    """The run from where its newest checkpoint is, or else from the beginning, to its end."""
    config, world = trainer.config, trainer.world
    keeper = Keeper(trainer, config, world, records.store, records.logs, signals)
    telemetry = Telemetry(world, config.system_interval, records.logs.get("system.csv"))
    if telemetry.warning:
        progress.say(telemetry.warning)
    steps_per_epoch = len(data.train) // config.batch_size

    def after_step(steps_left: int) -> None:
        # the row first: a checkpoint of this step holds it
        step = trainer.position.epoch * steps_per_epoch - steps_left
        telemetry.after_step(trainer.position.epoch, step, steps_left == 0)
        keeper.after_step(steps_left)

    standings = records.standings
    while trainer.position.epoch <= config.epochs and not standings.is_over(config.patience):
        epoch, done = trainer.position.epoch, trainer.position.step
        progress.epoch(epoch)
        began = time.monotonic()
        try:
            train = trainer.train_epoch(data.train, progress, after_step)
        except TrainingError as error:
            raise TrainingError(f"{error}{records.left()}") from None
        images = (steps_per_epoch - done) * config.batch_size
        # of the slowest and the largest process
        own = [time.monotonic() - began, trainer.waited, progress.peak_memory()]
        slowest, waited, memory = largest(own)
        speed = Speed(images, slowest, waited, round(memory))
        test = trainer.evaluate(data.test, progress)
        badness = standings.add(epoch, test)
        with all_or_none():
            records.add(epoch, epoch * steps_per_epoch, train, test, speed)
        _say_left_out(trainer, data, progress)
        progress.end(train, test, speed)
        trainer.position = Position(epoch + 1, 0)
        keeper.after_epoch(badness)
    if standings.is_over(config.patience):
        progress.say(
            f"stopped after epoch {max(standings.tests)}: {config.patience} epochs have brought no "
            f"better {standings.metric} than epoch {standings.best}'s"
        )
    with all_or_none():
        records.finish()
    return standings


class _Records:
    """What rank 0 keeps of a run in its work directory; other processes keep nothing.

    Goes on with the checkpoint that was found, or begins: making one is a collective.
    """

    def __init__(
        self,
        trainer: Trainer,
        work_dir: WorkDir | None,
        store: CheckpointStore | None,
        found: Checkpoint | None,
        facts: Mapping[str, Any],
        progress: Progress,
        tested: Split,
        on_epoch: OnEpoch | None,
    ) -> None:
        self._trainer, self._work_dir, self._progress = trainer, work_dir, progress
        self._tested, self._drawn_at, self._on_epoch = tested, time.monotonic(), on_epoch
        self.store = store
        config = trainer.config
        texts, said = go_on(trainer, found, config, trainer.world)
        self.logs: dict[str, CsvLog] = {}
        with all_or_none():
            if work_dir is not None:
                if found is None:
                    work_dir.write_config(config, trainer.world, facts)
                else:
                    work_dir.write_continuation(config, trainer.position)
                wanted = set(LOG_COLUMNS) - (set() if config.system_interval else {"system.csv"})
                self.logs = work_dir.logs(texts, wanted, metric_names(trainer.task))
        for line in said:
            progress.say(line)
        self.standings = Standings(config.best_by or trainer.task.best_by, texts)

    def left(self) -> str:
        """What a run that has to stop can go on from, to be put after why it stops."""
        return "" if self.store is None else f"; {self.store.left()}"

    def add(self, epoch: int, step: int, train: Score, test: Score, speed: Speed) -> None:
        """The rows and curves of an epoch."""
        if self._work_dir is None:
            return
        place = {"epoch": epoch, "step": step}
        lr = self._trainer.optimizer.param_groups[0]["lr"]
        self.logs["train.csv"].add(**place, lr=lr, loss=train.loss, error=train.error)
        self.logs["test.csv"].add(**place, loss=test.loss, error=test.error, samples=test.samples)
        self.logs["scores.csv"].add(**place, **test.metrics)
        if epoch == self.standings.best:
            name = getattr(self._tested, "name", str)
            self._work_dir.write_classes(test, self._trainer.task.classes, name)
        self.logs["speed.csv"].add(
            **place,
            seconds=round(speed.seconds, 3),
            images_per_second=round(speed.images_per_second, 1),
            wait_percent=round(speed.wait_percent, 1),
            memory_mib=round(speed.memory / 2**20, 1),
        )
        if time.monotonic() - self._drawn_at > _SECONDS_BETWEEN_CURVES:
            from . import plots

            path = self._work_dir.path
            plots.draw([path], path, plots.SCORES, self.standings.best)
            self._drawn_at = time.monotonic()
        if self._trainer.config.tensorboard:
            add_scores(self._work_dir.path / "tensorboard", epoch, train, test, speed)
        if self._on_epoch is not None:
            self._on_epoch(Epoch(epoch, train, test, lr, speed, self._work_dir.path))

    def finish(self) -> None:
        """The best epoch's weights, the last one's, and the run's page."""
        if self._work_dir is None or self.store is None:
            return
        # matplotlib takes a fifth of a start, and one process draws
        from . import plots

        folder, standings = self._work_dir.path, self.standings
        curves = plots.figures([folder], plots.ALL, standings.best)
        plots.save(curves, folder)
        last = self._trainer.tested.state_dict()
        epoch, best = standings.best, last
        if epoch != max(standings.tests):
            found = self.store.best()
            if found is not None and Position.of(found.path.name) == Position(epoch + 1, 0):
                held = weights_in(found)
                best = {name: held[name] for name in last}
            else:
                self._progress.say(f"the checkpoint of epoch {epoch}, the best, is gone or damaged")
                epoch = max(standings.tests)
        for name, weights, of in (("last", last, max(standings.tests)), ("model", best, epoch)):
            about = described(folder, of, max(standings.tests))
            path = self._work_dir.write_file(
                f"{name}.safetensors", safetensors_bytes(weights, about)
            )
        self._work_dir.write_file("model.pt", saved(best))
        show = partial(pictures, self._tested, device=self._trainer.world.device)
        page = html_report(folder, epoch, curves.values(), show)
        self._work_dir.write_file("report.html", page.encode())
        test = standings.tests[epoch]
        self._progress.say(
            f"best epoch {epoch} of {max(standings.tests)}: test error {test.error:.2f} % on "
            f"{test.samples} images; weights in {path}, the last epoch's in last.safetensors"
        )


def _say_left_out(trainer: Trainer, data: ImageData, progress: Progress) -> None:
    """Say what the run has left out so far, if anything; a collective."""
    if trainer.skipped:
        progress.say(f"steps left out so far, as something was not finite: {trainer.skipped}")
    if trainer.config.corrupt_images == "skip":
        found = gathered(sorted(data.train.unreadable | data.test.unreadable))
        if paths := sorted({path for some in found for path in some}):
            progress.say(f"images that could not be read so far: {len(paths)}, first {paths[0]}")


def _load_together(config: ResolvedConfig, world: World) -> ImageData:
    """Load on every process; first, where that fetches or indexes, on rank 0, then on one process
    of each other machine.
    """
    turn = 2
    if needs_preparation(config):
        turn = 0 if world.is_main else 1 if world.local_rank == 0 else 2
    return in_turns(turn, lambda: load(config, download=config.download and turn < 2))


def _answers(model: nn.Module | None, given: tuple[Any, Any]) -> int | None:
    """How many classes a given model tells apart."""
    if model is None:
        return None
    was_training, image = model.training, torch.as_tensor(given[0][0][0]).float()
    try:
        with torch.no_grad():
            answer = model.eval()(image[None].to(next(model.parameters()).device))
    # somebody's model raises what it likes
    except Exception as error:
        raise UserError(
            f"the model refuses an image of shape {tuple(image.shape)}: {first_line(error)}"
        ) from None
    model.train(was_training)
    if not isinstance(answer, Tensor) or answer.dim() != 2:
        raise UserError("the model must answer a tensor (N, classes) for images (N, ...)")
    return answer.shape[1]


def _headline(config: ResolvedConfig, world: World, data: ImageData, num_parameters: int) -> str:
    size = f" {config.depth}/{config.growth_rate}" if config.arch == "densenet_bc" else ""
    through = f" through {world.backend}" if world.backend else ""
    if world.sharing > 1:
        through += f", {world.sharing} to a GPU"
    return (
        f"{config.data}: {len(data.train):,} training and {len(data.test):,} test images; "
        f"{network_name(config)}{size}, {num_parameters:,} parameters; "
        f"{world.world_size} process{'es' if world.world_size > 1 else ''} on "
        f"{world.device.type}{through}, {config.threads} "
        f"thread{'s' if config.threads > 1 else ''} each; batch {config.batch_size} in total"
    )
