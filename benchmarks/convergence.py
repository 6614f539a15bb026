"""Training to the end on real images: effdense beside the naive net, step by step the same.

    python benchmarks/convergence.py
    python benchmarks/convergence.py --seeds 1 --epochs 3

Each seed trains train_ddp.py's digits run (DenseNet-BC 22, k 12, with its recipe, through the
same engine) once per provider, in one process, from the same initial weights on the same
batches. After every epoch the test error is taken, and how far the weights are from the naive
net's: |w - w_naive| / |w_naive| over all parameters. naive-channels-last is the naive net with
its sums in another order: what rounding alone does.

In float64 the weights at the end are to agree to --tolerance; the exit status is 1 where they
do not. In float32 they can't: among the millions of activations of a step some lie within
rounding of zero, where another order of summation opens or closes a ReLU. There the errors are
compared.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import torch
from harness.case import CIFAR_FAMILY, Case
from harness.case import Options as CommonOptions
from harness.pictures import colour, picture, plain_numbers
from harness.results import Recorder, Row
from torch import Tensor, nn
from tqdm import tqdm

from effdense import reference
from effdense.choices import DtypeName
from effdense.commands import front_end
from effdense.engine.checkpoint import Position
from effdense.engine.data.datasets import load
from effdense.engine.data.images import ImageData
from effdense.engine.distributed import World, joined_world
from effdense.engine.networks import make_network
from effdense.engine.options import ResolvedConfig, TrainConfig
from effdense.engine.progress import Progress
from effdense.engine.tasks import make_task
from effdense.engine.trainer import Trainer
from effdense.machine.environment import headline
from effdense.machine.tables import table

PROVIDERS = ("naive", "naive-channels-last", "effdense-features")
DTYPES: tuple[DtypeName, ...] = ("float32", "float64")


class Epoch(NamedTuple):
    """A network after an epoch: its training loss, its test error (%) and all its parameters."""

    loss: float
    error: float
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    threads: int = 1
    """CPU threads."""
    seeds: int = 5
    """Runs of each."""
    epochs: int = 12
    """Of a run."""
    tolerance: float = 1e-9
    """Relative difference of float64 weights at the end."""


def main(arguments: Sequence[str] | None = None) -> None:
    front_end.main(
        Options, run, program="benchmarks/convergence.py", arguments=arguments, description=__doc__
    )


def run(options: Options) -> int:
    path = options.output or Path("results") / "convergence-digits.csv"
    with (
        joined_world("cpu", options.threads) as world,
        Recorder(path, "convergence", "cpu", options.threads) as recorder,
    ):
        print(headline(recorder.environment))
        runs = [(dtype, seed) for dtype in DTYPES for seed in range(options.seeds)]
        found: dict[str, list[dict[str, Epoch]]] = {dtype: [] for dtype in DTYPES}
        for dtype, seed in tqdm(runs, desc="runs", file=sys.stderr, disable=None):
            config = TrainConfig(
                data="digits",
                epochs=options.epochs,
                seed=seed,
                device="cpu",
                threads=options.threads,
            )
            found[dtype].append(compare(config.resolved(), dtype, world, recorder))
    print_errors(found["float32"])
    agree = print_differences(found["float64"], options.tolerance)
    picture(draw, [path], path.with_suffix(".png"))
    print(f"\n{path}")
    return 0 if agree else 1


def compare(
    config: ResolvedConfig, dtype: DtypeName, world: World, recorder: Recorder
) -> dict[str, Epoch]:
    """Train every provider, record each epoch, and return the last ones."""
    data = load(config, download=False)
    found: dict[str, list[Epoch]] = {}
    steps_per_epoch = len(data.train) // config.batch_size
    assert config.depth is not None
    assert config.growth_rate is not None
    case = Case(
        CIFAR_FAMILY, config.depth, config.growth_rate, config.batch_size, config.image_size, dtype
    )
    for provider in PROVIDERS:
        own = found[provider] = []
        for number, epoch in enumerate(trained(provider, config, dtype, data, world)):
            own.append(epoch)
            values = {"training loss": (epoch.loss, "nat"), "test error": (epoch.error, "%")}
            values["weight difference"] = difference(epoch, found["naive"][number]), "1"
            for metric, (value, unit) in values.items():
                steps = (number + 1) * steps_per_epoch
                recorder.add(provider, case, metric, value, unit, sample=config.seed, steps=steps)
    return {provider: epochs[-1] for provider, epochs in found.items()}


def trained(
    provider: str, config: ResolvedConfig, dtype: str, data: ImageData, world: World
) -> Iterator[Epoch]:
    """A provider's network after each epoch of the run that ``config`` describes."""
    config = dataclasses.replace(config, channels_last=provider == "naive-channels-last")
    network = make_network(config, data)
    if provider.startswith("naive"):
        network = naive_twin(network, config, data)
    network.to(getattr(torch, dtype))
    if dtype == "float64":
        # the engine's images are float32
        network.register_forward_pre_hook(lambda _, given: (given[0].double(),))
    trainer = Trainer(network, config, world, make_task(config, data))
    progress = Progress(config, world)
    while trainer.position.epoch <= config.epochs:
        score = trainer.train_epoch(data.train, progress, lambda left: None)
        error = trainer.evaluate(data.test).error
        weights = torch.cat([p.detach().flatten() for p in network.parameters()])
        yield Epoch(score.loss, error, weights.double())
        trainer.position = Position(trainer.position.epoch + 1, 0)


def naive_twin(network: nn.Module, config: ResolvedConfig, data: ImageData) -> nn.Module:
    """The naive network with the parameters and buffers of effdense's."""
    options: dict[str, Any] = {"drop_rate": config.drop_rate, "in_channels": data.in_channels}
    assert config.depth is not None
    assert config.growth_rate is not None
    naive = reference.densenet_bc(config.depth, config.growth_rate, data.num_classes, **options)
    naive.load_state_dict(network.state_dict())
    return naive


def difference(epoch: Epoch, naive: Epoch) -> float:
    """Relative distance of all parameters together."""
    return float((epoch.weights - naive.weights).norm() / naive.weights.norm())


def print_errors(runs: Sequence[dict[str, Epoch]]) -> None:
    """The test errors at the end, and how far each seed's is from the naive network's."""
    rows = []
    for provider in PROVIDERS:
        own = [run[provider].error for run in runs]
        gaps = [run[provider].error - run["naive"].error for run in runs]
        cells = [" ".join(f"{error:.2f}" for error in own), spread(own)]
        rows.append([provider, *cells, "" if provider == "naive" else spread(gaps)])
    print("\nfloat32: test error at the end, per cent; mean ± standard deviation over the seeds\n")
    print(table(["provider", "by seed", "error", "minus naive, by seed"], rows))


def spread(values: Sequence[float]) -> str:
    deviation = stdev(values) if len(values) > 1 else math.nan
    return f"{mean(values):.2f} ± {deviation:.2f}"


def print_differences(runs: Sequence[dict[str, Epoch]], tolerance: float) -> bool:
    """The weights' differences at the end; whether all are within the tolerance."""
    rows, agree = [], True
    for provider in PROVIDERS[1:]:
        gaps = [difference(run[provider], run["naive"]) for run in runs]
        rows.append([provider, *(f"{gap:.1e}" for gap in gaps)])
        agree = agree and all(gap <= tolerance for gap in gaps)
    print(
        "\nfloat64: relative difference of all weights to naive's at the end, at most "
        f"{tolerance:g}: {'agree' if agree else 'DISAGREE'}\n"
    )
    print(table(["provider", *(f"seed {i}" for i in range(len(runs)))], rows))
    return agree


def draw(figure: Any, rows: list[Row]) -> None:
    """Test errors, and beside them the distances of the weights."""
    axes, beside = figure.subplots(1, 2)
    styles = {"float32": "-", "float64": "--"}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        own_colour = colour(provider)
        own = [row for row in rows if row["provider"] == provider]
        for dtype, style in styles.items():
            mine = [row for row in own if row["dtype"] == dtype]
            if dtype == "float32":
                _band(axes, mine, "test error", mean, color=own_colour, label=provider)
            if provider != "naive":
                label = f"{provider}, {dtype}"
                _band(
                    beside,
                    mine,
                    "weight difference",
                    median,
                    color=own_colour,
                    label=label,
                    linestyle=style,
                )
    seeds = len({row["sample"] for row in rows})
    axes.set_title(f"float32: mean and range of {seeds} seeds", fontsize=10)
    axes.set_ylabel("test error, %")
    beside.set_title("distance to the naive net's weights", fontsize=10)
    beside.set_ylabel("|w - w naive| / |w naive|")
    for each in (axes, beside):
        each.set_yscale("log")
        each.set_xlabel("training step")
        each.grid(alpha=0.3)
        each.legend(fontsize=8)
    plain_numbers(axes.yaxis)


def _band(axes: Any, rows: list[Row], metric: str, middle: Any, **style: Any) -> None:
    """The middle of all samples over the steps, and their range as a band."""
    samples: dict[int, list[float]] = {}
    for row in rows:
        if row["metric"] == metric:
            samples.setdefault(int(row["steps"]), []).append(float(row["value"]))
    steps = sorted(samples)
    axes.plot(steps, [middle(samples[step]) for step in steps], **style)
    low, high = ([of(samples[step]) for step in steps] for of in (min, max))
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)


if __name__ == "__main__":
    main()
