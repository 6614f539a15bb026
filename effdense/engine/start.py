"""What a run begins with."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from torch import Tensor, nn

from ..adaptation import head_of
from ..errors import UserError
from ..models import TORCHVISION_VARIANTS, load_weights
from ..weights import fitted, read_weights
from .export import held
from .options import ResolvedConfig, TrainConfig
from .records import read_config


def with_network_of_run(options: TrainConfig) -> TrainConfig:
    """Where --weights is a run's folder and no network is asked for, that run's network.

    Raises:
        UserError: where the folder holds no run.
    """
    if options.weights is None or not _is_run(options.weights):
        return options
    if any(getattr(options, name) is not None for name in _NETWORK):
        return options
    before = read_config(Path(options.weights))["options"]
    return dataclasses.replace(options, **{name: before.get(name) for name in _NETWORK})


_NETWORK = ("arch", "depth", "growth_rate", "model", "model_args")


def _is_run(name: str) -> bool:
    # not Path.exists, which raises for a name that no file can have
    return os.path.exists(os.path.join(name, "config.yaml"))


def read_start(config: ResolvedConfig) -> dict[str, Tensor]:
    """The weights that --weights names.

    Raises:
        UserError: where there are none, or they cannot be fetched.
    """
    assert config.weights is not None
    source = Path(config.weights)
    # published for these networks; others that have their layers can take them too
    name = config.arch if config.arch in TORCHVISION_VARIANTS else "densenet121"
    try:
        if _is_run(config.weights):
            # also of a run that is under way
            return held(source)[1]
        there = os.path.exists(source)
        return read_weights(source) if there else load_weights(name, config.weights)
    except (ValueError, OSError) as error:
        # OSError: there is no such file, or the network or the disk refuses
        raise UserError(f"--weights: {error}") from None


def load_start(network: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Give a network the weights it begins with; returns what is to be said about them.

    Raises:
        UserError: where they are another network's.
    """
    try:
        fitting, said = fitted(state, network.state_dict(), head_of(network))
    except ValueError as error:
        raise UserError(f"--weights: {error}") from None
    network.load_state_dict(fitting)
    return said
