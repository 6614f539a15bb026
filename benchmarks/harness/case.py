"""What is benchmarked: one network at one input, and the options that choose it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import arg

from effdense.choices import DtypeName, NetworkName
from effdense.errors import UserError
from effdense.machine.environment import usable_cores
from effdense.models import configuration

CIFAR_FAMILY = "densenet_bc"

# bytes per element of what autocast computes in
ELEMENT_SIZE: dict[DtypeName, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Case:
    """One network, one input, one device.

    ``depth`` and ``growth_rate`` are those of the CIFAR family and 0 where ``arch`` names
    another network. ``image_size`` in pixels along each of ``spatial_dims``. bfloat16
    and float16 mean autocast over float32 parameters, the way people train; float64 and
    float32 mean everything.
    """

    arch: str
    depth: int
    growth_rate: int
    batch_size: int
    image_size: int
    dtype: DtypeName = "float32"
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
        more = {} if self.is_cifar else {"bn_size": 4, "num_classes": 1000}
        more["spatial_dims"] = self.spatial_dims
        return configuration(self.arch, self.depth, self.growth_rate, **more)

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
        name = f"DenseNet-BC ({self.depth}, k {self.growth_rate})" if self.is_cifar else self.arch
        return f"{name}, batch {self.batch_size}, {self.size}, {self.dtype}, {self.device}"

    def columns(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every benchmark can be told."""

    threads: int = usable_cores()
    """CPU threads; by default as many as there are cores that this process may use."""
    output: Annotated[
        Path | None, arg(metavar="CSV", help_behavior_hint="(default: a name in results/)")
    ] = None
    """Where the rows go; a picture, where there is one, beside them."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            for each in value if isinstance(value, tuple) else (value,):
                if type(each) is int and each < 1:
                    option = f"--{name.replace('_', '-')}"
                    raise UserError(f"{option} must be a positive integer, got {each}")


@dataclass(frozen=True, kw_only=True)
class CaseOptions(Options):
    """The options that choose a case; :attr:`case` is the one they choose."""

    CIFAR_BATCH: ClassVar[int] = 64

    arch: NetworkName = "densenet_bc"
    """The network: densenet_bc is the paper's CIFAR family, the others are its ImageNet family."""
    depth: int = 100
    """Layers of densenet_bc, 6 n + 4."""
    growth_rate: int = 12
    """Channels per layer of densenet_bc, the paper's k."""
    batch_size: Annotated[
        int | None,
        arg(
            metavar="IMAGES",
            help_behavior_hint="(default: the benchmark's own; densenet121 ...: 8, volumes 1)",
        ),
    ] = None
    """At once."""
    image_size: Annotated[
        int | None,
        arg(
            metavar="PIXELS",
            help_behavior_hint="(default: 32 for densenet_bc, else 224, of volumes 128)",
        ),
    ] = None
    """Along each dimension."""
    spatial_dims: Literal[1, 2, 3] = 2
    """Of the network and its images."""
    dtype: DtypeName = "float32"
    """bfloat16 and float16 mean autocast over float32 parameters."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", self.device):
            raise UserError(f"--device must be cpu, cuda or cuda:N, got {self.device!r}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("depth", "growth_rate"):
            if self.arch != CIFAR_FAMILY and getattr(self, name) != defaults[name]:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} belongs to densenet_bc; {self.arch} has a fixed one")
        # what isn't run needs no device
        case = dataclasses.replace(self.case, device="cpu") if self.runs_nothing else self.case
        problem = objection(case)
        if problem:
            raise UserError(problem)

    @property
    def runs_nothing(self) -> bool:
        return False

    @property
    def case(self) -> Case:
        is_cifar = self.arch == CIFAR_FAMILY
        images = 8 if self.spatial_dims < 3 else 1
        return Case(
            arch=self.arch,
            depth=self.depth if is_cifar else 0,
            growth_rate=self.growth_rate if is_cifar else 0,
            batch_size=self.batch_size or (self.CIFAR_BATCH if is_cifar else images),
            image_size=self.image_size or (32 if is_cifar else 224 if images > 1 else 128),
            dtype=self.dtype,
            device=self.device,
            spatial_dims=self.spatial_dims,
        )


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
