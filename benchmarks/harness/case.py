"""What is benchmarked: one network at one input, and the options that choose it."""

from __future__ import annotations

import argparse
import dataclasses
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from effdense.machine.environment import usable_cores
from effdense.machine.memory import parse_size
from effdense.models import TORCHVISION_VARIANTS as IMAGENET_FAMILY
from effdense.reference import densenet_bc_config

CIFAR_FAMILY = "densenet-bc"

# bytes per element of what autocast computes in
ELEMENT_SIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Case:
    """One network, one input, one device.

    ``depth`` and ``growth_rate`` are those of the CIFAR family and 0 where ``arch`` names
    an ImageNet network. ``image_size`` in pixels along each of ``spatial_dims``. bfloat16
    and float16 mean autocast over float32 parameters, the way people train; float64 and
    float32 mean everything.
    """

    arch: str
    depth: int
    growth_rate: int
    batch_size: int
    image_size: int
    dtype: str = "float32"
    device: str = "cpu"
    spatial_dims: int = 2

    @property
    def is_cifar(self) -> bool:
        return self.arch == CIFAR_FAMILY

    @property
    def autocast(self) -> bool:
        return self.dtype in ("bfloat16", "float16")

    @property
    def element_size(self) -> int:
        """Bytes per element of a feature."""
        return ELEMENT_SIZE[self.dtype]

    @property
    def parameter_size(self) -> int:
        """Bytes per parameter."""
        return 8 if self.dtype == "float64" else 4

    def network(self) -> dict[str, Any]:
        """Arguments of ``effdense.reference.DenseNet`` and ``effdense.DenseNet``."""
        dims = {"spatial_dims": self.spatial_dims}
        if self.is_cifar:
            return densenet_bc_config(self.depth, self.growth_rate, **dims)
        return dict(IMAGENET_FAMILY[self.arch], bn_size=4, num_classes=1000, **dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """The input's: (N, 3, *spatial)."""
        return (self.batch_size, 3, *[self.image_size] * self.spatial_dims)

    @property
    def size(self) -> str:
        """Such as "32x32"."""
        return "x".join(map(str, self.shape[2:]))

    def label(self) -> str:
        """For file names: unique per case."""
        name = f"bc{self.depth}-k{self.growth_rate}" if self.is_cifar else self.arch
        device = self.device.replace(":", "")
        dims = "" if self.spatial_dims == 2 else f"-{self.spatial_dims}d"
        return f"{name}-b{self.batch_size}-{self.image_size}px{dims}-{self.dtype}-{device}"

    def describe(self) -> str:
        name = f"DenseNet-BC ({self.depth}, k={self.growth_rate})" if self.is_cifar else self.arch
        return f"{name}, batch {self.batch_size}, {self.size}, {self.dtype}, {self.device}"

    def columns(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Parser(argparse.ArgumentParser):
    """Prints the module's docstring as help, and one line for a bad argument."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows every option)\n")


def add_case_arguments(
    parser: argparse.ArgumentParser, *, depth: int, growth_rate: int, batch_size: int
) -> None:
    """The options that choose a case, with this benchmark's defaults for the CIFAR family."""
    group = parser.add_argument_group("network and input")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--depth", type=int, help=f"layers of a DenseNet-BC, 6 n + 4 (default {depth})"
    )
    which.add_argument("--arch", choices=sorted(IMAGENET_FAMILY), help="an ImageNet network")
    group.add_argument(
        "--growth-rate",
        type=positive_int,
        help=f"the DenseNet-BC's k, channels per layer (default {growth_rate})",
    )
    group.add_argument(
        "--batch-size", type=positive_int, help=f"images (default {batch_size}; with --arch, 8)"
    )
    group.add_argument(
        "--image-size", type=positive_int, help="pixels (default 32; with --arch, 224)"
    )
    group.add_argument(
        "--spatial-dims",
        type=int,
        choices=(1, 2, 3),
        default=2,
        help="of the network and its inputs, --image-size along each (default 2)",
    )
    group.add_argument(
        "--dtype",
        choices=sorted(ELEMENT_SIZE),
        default="float32",
        help="bfloat16 and float16 mean autocast over float32 parameters (default float32)",
    )
    group.add_argument(
        "--device", type=_device, default="cpu", help="cpu, cuda or cuda:N (default cpu)"
    )
    group.add_argument(
        "--threads",
        type=positive_int,
        default=usable_cores(),
        help="CPU threads (default: the cores this process may use, here %(default)s)",
    )
    parser.set_defaults(_case_defaults=(depth, growth_rate, batch_size))


def case_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Case:
    """The case the arguments name; ends the program with one line where they name none."""
    depth, growth_rate, batch_size = args._case_defaults
    if args.arch and args.growth_rate:
        parser.error(f"--growth-rate belongs to DenseNet-BC; {args.arch} has a fixed one")
    case = Case(
        arch=args.arch or CIFAR_FAMILY,
        depth=0 if args.arch else depth if args.depth is None else args.depth,
        growth_rate=0 if args.arch else args.growth_rate or growth_rate,
        batch_size=args.batch_size or (8 if args.arch else batch_size),
        image_size=args.image_size or (224 if args.arch else 32),
        dtype=args.dtype,
        device=args.device,
        spatial_dims=args.spatial_dims,
    )
    problem = objection(case)
    if problem:
        parser.error(problem)
    return case


def objection(case: Case) -> str | None:
    """Why a case can't be run anywhere, or here; None where it can."""
    try:
        network = case.network()
    except ValueError as error:
        return str(error)
    # Every transition halves the image, the ImageNet stem divides it by four before.
    smallest = 2 ** (len(network["block_config"]) - 1) * (1 if case.is_cifar else 4)
    if case.image_size < smallest:
        return f"--image-size must be at least {smallest} pixels, got {case.image_size}"
    if case.batch_size * (case.image_size // smallest) ** case.spatial_dims < 2:
        return "batch norm needs more than one value per channel; use a larger batch or image"
    if not case.device.startswith("cuda"):
        return None
    import torch

    index = int(case.device.partition(":")[2] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        return f"--device {case.device}: torch sees {count} CUDA devices here"
    return None


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return text


def positive_int(text: str) -> int:
    """An argparse type."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return value


def byte_size(text: str) -> int:
    """An argparse type: "12GiB", "500MB" or plain bytes."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
