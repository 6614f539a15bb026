"""The MODEL argument of several commands: a network by name, or whatever a callable returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from torch import nn
from tyro.conf import Positional, arg

import effdense

from .. import reference
from ..adaptation import called, converted
from ..choices import NetworkName
from ..errors import UserError, first_line
from ..models import configuration
from . import front_end

NAMES = get_args(NetworkName)
_CONVOLUTION = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class Batch:
    """The images that go in at once."""

    batch_size: int = 64
    """Images."""
    image_size: Annotated[
        int | None,
        arg(metavar="PIXELS", help_behavior_hint="(default: 32 for densenet_bc, else 224)"),
    ] = None
    """Along each dimension."""

    def __post_init__(self) -> None:
        front_end.check_positive(batch_size=self.batch_size, image_size=self.image_size)


@dataclass(frozen=True)
class Network:
    """One of this package's by name, or whatever a callable returns."""

    name: Annotated[Positional[str], arg(metavar="MODEL")] = "densenet_bc"
    """densenet_bc, densenet121, 161, 169, 201, or MODULE:CALLABLE, which returns a model."""
    depth: int = 100
    """Of densenet_bc, layers: 6 n + 4."""
    growth_rate: int = 12
    """Of densenet_bc, channels per layer."""

    def __post_init__(self) -> None:
        if self.name not in NAMES and ":" not in self.name:
            raise UserError(
                f"MODEL must be {', '.join(NAMES)} or MODULE:CALLABLE, got {self.name!r}; "
                "expected MODULE:CALLABLE such as torchvision.models:densenet121 for any other "
                "model"
            )

    @property
    def is_own(self) -> bool:
        """Whether it is one of this package's, of which there is a naive twin."""
        return self.name in NAMES

    def describe(self) -> str:
        if self.name == "densenet_bc":
            return f"DenseNet-BC (depth {self.depth}, growth rate {self.growth_rate})"
        return self.name

    def naive(self) -> nn.Module:
        """The naive network, or what the callable returns, on the present default device.

        Raises:
            UserError: where there is no such network.
        """
        if not self.is_own:
            return called(self.name)
        return reference.DenseNet(**self._arguments())

    def ours(self, save: str | Sequence[str] = "features") -> nn.Module:
        """This package's network, or what the callable returns, converted.

        Raises:
            UserError: as of :meth:`naive`.
        """
        if self.is_own:
            return effdense.DenseNet(**self._arguments(), save=save)  # type: ignore[arg-type]
        return converted(called(self.name), save)  # type: ignore[arg-type]

    def input_shape(self, model: nn.Module, batch: Batch) -> tuple[int, ...]:
        """(N, channels, *spatial) as the model's first convolution takes it."""
        size = batch.image_size or (32 if self.name == "densenet_bc" else 224)
        first = next((m for m in model.modules() if isinstance(m, _CONVOLUTION)), None)
        if first is None:
            raise UserError(f"{self.name} has no convolution to tell the shape of its input by")
        return (batch.batch_size, first.in_channels, *[size] * (first.weight.dim() - 2))

    @contextmanager
    def refusing(self, shape: tuple[int, ...]) -> Iterator[None]:
        """Within it, what the model says about an input of this shape is a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.name} refuses input of shape {shape}: {first_line(error)}"
            ) from None

    def _arguments(self) -> dict[str, Any]:
        try:
            return configuration(self.name, self.depth, self.growth_rate)
        except ValueError as error:
            raise UserError(str(error)) from None
