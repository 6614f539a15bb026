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
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import draw
import torch
from harness.case import CIFAR_FAMILY, Case, Parser, positive_int
from harness.report import Recorder, table
from torch import Tensor, nn
from tqdm import tqdm

from effdense import reference
from effdense.engine.checkpoint import Position
from effdense.engine.config import ResolvedConfig, TrainConfig
from effdense.engine.data.datasets import load
from effdense.engine.data.order import ImageData
from effdense.engine.distributed import World, joined_world
from effdense.engine.networks import make_network
from effdense.engine.progress import Progress
from effdense.engine.trainer import Trainer
from effdense.machine.environment import headline

PROVIDERS = ("naive", "naive-channels-last", "effdense-features")
DTYPES = ("float32", "float64")


class Epoch(NamedTuple):
    """A network after an epoch: its training loss, its test error (%) and all its parameters."""

    loss: float
    error: float
    weights: Tensor


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    path = args.output or Path("results") / "convergence-digits.csv"
    with (
        joined_world("cpu", args.threads) as world,
        Recorder(path, "convergence", "cpu", args.threads) as recorder,
    ):
        print(headline(recorder.environment))
        runs = [(dtype, seed) for dtype in DTYPES for seed in range(args.seeds)]
        found: dict[str, list[dict[str, Epoch]]] = {dtype: [] for dtype in DTYPES}
        for dtype, seed in tqdm(runs, desc="runs", file=sys.stderr, disable=None):
            options = TrainConfig(
                data="digits", epochs=args.epochs, seed=seed, device="cpu", threads=args.threads
            )
            found[dtype].append(compare(options.resolved(), dtype, world, recorder))
    print_errors(found["float32"])
    agree = print_differences(found["float64"], args.tolerance)
    draw.draw([path], path.with_suffix(".png"))
    print(f"\n{path}")
    return 0 if agree else 1


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=positive_int, default=5, help="runs each (default 5)")
    parser.add_argument("--epochs", type=positive_int, default=12, help="of a run (default 12)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-9,
        help="relative difference of float64 weights at the end (default 1e-9)",
    )
    parser.add_argument("--threads", type=positive_int, default=1, help="CPU threads (default 1)")
    parser.add_argument(
        "--output", type=Path, metavar="CSV", help="default: results/convergence-digits.csv"
    )
    return parser


def compare(
    config: ResolvedConfig, dtype: str, world: World, recorder: Recorder
) -> dict[str, Epoch]:
    """Train every provider, record each epoch, and return the last ones."""
    data = load(config, download=False)
    found: dict[str, list[Epoch]] = {}
    steps_per_epoch = len(data.train) // config.batch_size
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
    trainer, progress = Trainer(network, config, world), Progress(config, world)
    while trainer.position.epoch <= config.epochs:
        score = trainer.train_epoch(data.train, progress, lambda left: None)
        error = trainer.evaluate(data.test).error
        weights = torch.cat([p.detach().flatten() for p in network.parameters()])
        yield Epoch(score.loss, error, weights.double())
        trainer.position = Position(trainer.position.epoch + 1, 0)


def naive_twin(network: nn.Module, config: ResolvedConfig, data: ImageData) -> nn.Module:
    """The naive network with the parameters and buffers of effdense's."""
    options: dict[str, Any] = {"drop_rate": config.drop_rate, "in_channels": data.in_channels}
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


if __name__ == "__main__":
    sys.exit(main())
