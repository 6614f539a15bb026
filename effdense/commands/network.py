"""The MODEL argument of several commands: a network by name, or whatever a callable returns."""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import effdense

from .. import reference
from ..errors import UserError
from ..models import TORCHVISION_VARIANTS

NAMES = ("densenet_bc", *TORCHVISION_VARIANTS)
_CONVOLUTION = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class Network:
    """What MODEL names: one of ``NAMES``, or ``module:callable``."""

    name: str
    depth: int
    growth_rate: int

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
            return _called(self.name)
        return reference.DenseNet(**self._arguments())

    def ours(self, save: str | Sequence[str] = "features") -> nn.Module:
        """This package's network, or what the callable returns, converted.

        Raises:
            UserError: as of :meth:`naive`.
        """
        if self.is_own:
            return effdense.DenseNet(**self._arguments(), save=save)  # type: ignore[arg-type]
        return converted(_called(self.name), save)

    def input_shape(
        self, model: nn.Module, batch_size: int, image_size: int | None
    ) -> tuple[int, ...]:
        """(N, channels, *spatial) as the model's first convolution takes it."""
        size = image_size or (32 if self.name == "densenet_bc" else 224)
        first = next((m for m in model.modules() if isinstance(m, _CONVOLUTION)), None)
        if first is None:
            raise UserError(f"{self.name} has no convolution to tell the shape of its input by")
        return (batch_size, first.in_channels, *[size] * (first.weight.dim() - 2))

    def _arguments(self) -> dict[str, Any]:
        if self.name != "densenet_bc":
            return dict(TORCHVISION_VARIANTS[self.name])
        try:
            return reference.densenet_bc_config(self.depth, self.growth_rate)
        except ValueError as error:
            raise UserError(str(error)) from None


def converted(model: nn.Module, save: str | Sequence[str] = "features") -> nn.Module:
    """The model, converted; what was left of it is in convert-report, not in warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="effdense: ")
        return effdense.convert(model, save)  # type: ignore[arg-type]


def add_model_argument(
    parser: argparse.ArgumentParser, *, default: str | None = None, depth: int = 100
) -> None:
    """MODEL, ``--depth`` and ``--growth-rate``."""
    also = f" (default {default})" if default else ""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if default else None,
        default=default,
        help=f"{', '.join(NAMES)}, or MODULE:CALLABLE, which returns a model{also}",
    )
    parser.add_argument(
        "--depth", type=int, default=depth, help=f"of densenet_bc (default {depth})"
    )
    parser.add_argument("--growth-rate", type=int, default=12, help="of densenet_bc (default 12)")


def add_input_arguments(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """``--batch-size`` and ``--image-size``."""
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, help=f"images (default {batch_size})"
    )
    parser.add_argument(
        "--image-size", type=int, help="pixels (default 32 for densenet_bc, else 224)"
    )


def network_of(options: argparse.Namespace) -> Network:
    """The network that the arguments name.

    Raises:
        UserError: where they name none.
    """
    if options.model not in NAMES and ":" not in options.model:
        raise UserError(
            f"MODEL must be {', '.join(NAMES)} or MODULE:CALLABLE, got {options.model!r}; "
            "expected MODULE:CALLABLE such as torchvision.models:densenet121 for any other model"
        )
    found = Network(options.model, options.depth, options.growth_rate)
    for name in ("batch_size", "image_size"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} must be one of the positive integers, got {value}")
    return found


def _called(target: str) -> nn.Module:
    """A model from ``module:callable``; a copy where it is a model already."""
    name, _, path = target.partition(":")
    if not name or not path:
        raise UserError(f"expected MODULE:CALLABLE, got {target!r}")
    # as python -m of one's own module finds it
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UserError(f"can't find {target}: {error}") from None
    if not callable(found):
        raise UserError(f"{target} is a {type(found).__name__}, which can't be called")
    if isinstance(found, nn.Module):
        return copy.deepcopy(found)
    try:
        model: object = found()
    except Exception as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"calling {target} without arguments failed: {line}") from None
    if not isinstance(model, nn.Module):
        raise UserError(f"{target} returned a {type(model).__name__}, not a torch.nn.Module")
    return model
