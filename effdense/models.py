"""DenseNets in linear memory, with torchvision's arguments, names and state-dict keys."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .autocast import autocast_dtype
from .backends.select import check_backend
from .block.dense_block import check_save
from .block.forwards import (
    DenseBlock,
    Features,
    Transition,
    dense_blocks,
    has_global_hooks,
    set_offload,
    set_save,
)
from .block.traced import sequence_call
from .choices import NetworkName, Save
from .errors import spelled_shape
from .recognition.objections import has_hooks, refuse_replica
from .reference import Init
from .tracing import graph_is_recorded, is_traced
from .weights import fitted, read_weights

TORCHVISION_VARIANTS: dict[str, dict[str, Any]] = {
    "densenet121": {"growth_rate": 32, "block_config": (6, 12, 24, 16), "num_init_features": 64},
    "densenet161": {"growth_rate": 48, "block_config": (6, 12, 36, 24), "num_init_features": 96},
    "densenet169": {"growth_rate": 32, "block_config": (6, 12, 32, 32), "num_init_features": 64},
    "densenet201": {"growth_rate": 32, "block_config": (6, 12, 48, 32), "num_init_features": 64},
}


class DenseNet(reference.DenseNet):
    """A DenseNet that trains in memory linear in its depth.

    Same function, gradients and buffers as :class:`effdense.reference.DenseNet` and, with
    the default arguments, as torchvision's DenseNet-121, whose state dict it shares.

    Args:
        growth_rate: new channels per layer, the paper's k.
        block_config: layers in each dense block.
        num_init_features: channels after the first convolution.
        bn_size: bottleneck width in units of the growth rate; None for layers without a
            bottleneck (the paper's plain DenseNet).
        drop_rate: dropout probability of each layer's new features.
        num_classes: width of the classifier.
        compression: a transition keeps ``int(compression * channels)``.
        small_inputs: the CIFAR stem (one 3x3 convolution) instead of ImageNet's.
        in_channels: channels of the input.
        spatial_dims: 1, 2 or 3; inputs are (N, in_channels, *spatial).
        init: "paper" (He normal over the fan-out) or "torchvision" (over the fan-in).
        save: what each layer keeps for backward: "features" (only its k features; least
            time for linear memory), "bottlenecks" (also its bottleneck: faster, about
            1 + bn_size times the memory), "slabs" (as "features", with smaller
            temporaries and more time), "input" (only each block's input: least memory),
            "all" (plain autograd: quadratic memory).
        backend: "auto", "torch", "cpu" or "triton".

    Raises:
        ValueError: for an argument outside its range; the message names the range.
    """

    block_type = DenseBlock
    transition_type = Transition
    features_type = Features
    # not for TorchScript
    __jit_unused_properties__: ClassVar[list[str]] = ["save", "offload"]

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        *,
        compression: float = 0.5,
        small_inputs: bool = False,
        in_channels: int = 3,
        spatial_dims: int = 2,
        init: Init = "paper",
        save: Save | Sequence[Save] = "features",
        backend: str = "auto",
    ) -> None:
        for mode in [save] if isinstance(save, str) else save:
            check_save(mode)
        check_backend(backend)
        super().__init__(
            growth_rate,
            block_config,
            num_init_features,
            bn_size,
            drop_rate,
            num_classes,
            compression=compression,
            small_inputs=small_inputs,
            in_channels=in_channels,
            spatial_dims=spatial_dims,
            init=init,
        )
        self.save = save
        for module in self.modules():
            if isinstance(module, (DenseBlock, Transition, Features)):
                module.backend = backend

    @property
    def save(self) -> tuple[Save, ...]:
        """What each dense block keeps for backward; set one mode for all, or one per block."""
        return tuple(block.save for block in dense_blocks(self).values())

    @save.setter
    def save(self, save: Save | Sequence[Save]) -> None:
        set_save(self, save)

    @property
    def offload(self) -> tuple[bool, ...]:
        """Whether each dense block keeps elsewhere what it keeps (:func:`effdense.offload`).

        Set one for all, or one per block.
        """
        return tuple(block.offload for block in dense_blocks(self).values())

    @offload.setter
    def offload(self, offload: bool | Sequence[bool]) -> None:
        set_offload(self, offload)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, *spatial) to (N, num_classes).

        Raises:
            ValueError: for an input of other dimensions, channels, dtype or device.
            RuntimeError: under nn.DataParallel.
        """
        # which TorchScript knows when it compiles: it does not look at the other path
        return self._by_modules(x) if torch.jit.is_scripting() else self._by_stages(x)

    # not by name: torch.fx writes it into the code that TorchScript then reads
    forward.__annotations__.update({"x": Tensor, "return": Tensor})

    def _by_modules(self, x: Tensor) -> Tensor:
        """For those who look at code: the dimensions aren't counted."""
        features = F.relu(self.features(x))
        return self.classifier(features.flatten(2).mean(2))

    def _by_stages(self, x: Tensor) -> Tensor:
        features = self.features
        if is_traced(x) and type(features) is Features:
            pooled = sequence_call(features, x, pool=True)
            if pooled is not None:
                return self.classifier(pooled)
        if is_traced(x):
            return self._by_modules(x)
        if not graph_is_recorded():
            self._check_input(x)
        if self._must_call_modules():
            return self._by_modules(x)
        assert isinstance(features, Features)
        return self.classifier(features.part(x, 0, len(features), pool=True))

    def _check_input(self, x: Tensor) -> None:
        refuse_replica(self)
        conv0 = getattr(self.features, "conv0", None)
        if not isinstance(conv0, nn.modules.conv._ConvNd):
            # A first layer of the user's own says itself what it can't take.
            return
        weight = conv0.weight
        if x.dim() != weight.dim() or x.shape[1] != conv0.in_channels:
            expected = spelled_shape(conv0.in_channels, weight.dim())
            hint = "; a single image needs a batch dimension: x[None]"
            missing = x.dim() == weight.dim() - 1 and x.shape[0] == conv0.in_channels
            raise ValueError(
                f"expected input of shape {expected}, got {tuple(x.shape)}{hint if missing else ''}"
            )
        if x.device != weight.device:
            raise ValueError(
                f"input is on {x.device}, the model on {weight.device}; move one of them"
            )
        autocast = autocast_dtype(x.device) is not None
        castable = autocast and x.is_floating_point() and x.dtype != torch.float64
        if x.dtype != weight.dtype and not castable:
            raise ValueError(
                f"input is {x.dtype}, the model's weights are {weight.dtype}; convert the input "
                f"with x.to({weight.dtype}), or the model"
            )

    def _must_call_modules(self) -> bool:
        """Whether someone watches the modules that the stage-by-stage path doesn't call."""
        features = self.features
        return (
            type(features) is not Features
            or features.save == "all"
            or graph_is_recorded()
            or has_global_hooks()
            or has_hooks(features)
            # the last norm and block would be one stage
            or any(has_hooks(child) for child in list(features.children())[-2:])
        )


def densenet_bc(
    depth: int,
    growth_rate: int,
    num_classes: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> DenseNet:
    """The paper's CIFAR family, DenseNet-BC: three blocks of (depth - 4) / 6 bottleneck layers.

    Args:
        depth: 6 n + 4; the paper's are 100, 190 and 250.
        growth_rate: the paper's k: 12 with depth 100, 24 with 250, 40 with 190.
        num_classes: width of the classifier; otherwise that of the weights, or 10.
        weights: a file of weights or a run's directory, as of :func:`densenet121`.
        kwargs: any other argument of :class:`DenseNet`.

    Raises:
        ValueError: for another depth; the message names the nearest valid ones.
    """
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    _torchvisions_arguments(kwargs, 'densenet_bc has none that are published: weights="FILE"')
    config = reference.densenet_bc_config(depth, growth_rate, **kwargs)
    if weights is None:
        return DenseNet(**config)
    if not isinstance(weights, (str, os.PathLike)):
        raise ValueError(f"weights must be None or a path, got {weights!r}")
    return _with_weights(config, read_weights(weights), "num_classes" in kwargs)


def configuration(name: str, depth: int, growth_rate: int, **kwargs: Any) -> dict[str, Any]:
    """Arguments of :class:`DenseNet`, and of its naive twin, for a network by its name.

    Args:
        name: "densenet_bc", "densenet121", "densenet161", "densenet169" or "densenet201".
        depth: of densenet_bc; the others have their own.
        growth_rate: likewise.
        kwargs: any other argument of :class:`DenseNet`.

    Raises:
        ValueError: for another name, or a depth that densenet_bc has not.
    """
    if name == "densenet_bc":
        return reference.densenet_bc_config(depth, growth_rate, **kwargs)
    if name not in TORCHVISION_VARIANTS:
        known = ", ".join(get_args(NetworkName))
        raise ValueError(f"the network must be one of {known}, got {name!r}")
    return TORCHVISION_VARIANTS[name] | kwargs


def densenet121(weights: Any = None, **kwargs: Any) -> DenseNet:
    """torchvision's DenseNet-121.

    Args:
        weights: None; a member of torchvision's weights enum or its name (which torchvision
            downloads); a safetensors file, a saved state dict, checkpoint or module; or the
            directory of a run.
        kwargs: any argument of :class:`DenseNet`. ``num_classes`` is otherwise that of the
            weights; where it is another, the classifier stays as initialised, with a warning.
            For another ``in_channels`` the first convolution is summed over its channels, or
            repeated and scaled. torchvision's ``progress`` and timm's ``pretrained`` too;
            torchvision's ``memory_efficient`` changes nothing here.

    Raises:
        ValueError: for ``weights`` that are none of these, or another architecture's.
    """
    return _torchvision_variant("densenet121", weights, **kwargs)


def densenet161(weights: Any = None, **kwargs: Any) -> DenseNet:
    """torchvision's DenseNet-161; arguments as of :func:`densenet121`."""
    return _torchvision_variant("densenet161", weights, **kwargs)


def densenet169(weights: Any = None, **kwargs: Any) -> DenseNet:
    """torchvision's DenseNet-169; arguments as of :func:`densenet121`."""
    return _torchvision_variant("densenet169", weights, **kwargs)


def densenet201(weights: Any = None, **kwargs: Any) -> DenseNet:
    """torchvision's DenseNet-201; arguments as of :func:`densenet121`."""
    return _torchvision_variant("densenet201", weights, **kwargs)


def _torchvision_variant(name: str, weights: Any, **kwargs: Any) -> DenseNet:
    """A torchvision architecture; arguments as of :func:`densenet121`."""
    progress = bool(kwargs.pop("progress", False))
    if _torchvisions_arguments(kwargs) and weights is None:
        weights = "DEFAULT"
    config = TORCHVISION_VARIANTS[name] | kwargs
    if weights is None:
        return DenseNet(**config)
    return _with_weights(config, load_weights(name, weights, progress), "num_classes" in kwargs)


def _torchvisions_arguments(kwargs: dict[str, Any], no_weights: str = "") -> bool:
    """Takes torchvision's and timm's arguments out; whether published weights are asked for.

    Raises:
        ValueError: where there are none, or ``pretrained`` is no truth value.
    """
    # saves memory there; the memory here is linear with or without
    kwargs.pop("memory_efficient", None)
    pretrained = kwargs.pop("pretrained", False)
    if not isinstance(pretrained, bool):
        raise ValueError(
            f"pretrained must be True or False, got {pretrained!r}; a file is given as weights"
        )
    if pretrained and no_weights:
        raise ValueError(f"pretrained=True asks for published weights; {no_weights}")
    return pretrained


def _with_weights(config: dict[str, Any], state: dict[str, Tensor], own_head: bool) -> DenseNet:
    """A network with the weights ``state``, of as many classes unless it has its ``own_head``."""
    bias = state.get("classifier.bias")
    if bias is not None and not own_head:
        config = config | {"num_classes": bias.numel()}
    model = DenseNet(**config)
    fitting, said = fitted(state, model.state_dict(), "classifier")
    for line in said:
        warnings.warn(f"effdense: {line}", stacklevel=4)
    model.load_state_dict(fitting)
    return model


def load_weights(name: str, weights: Any, progress: bool = False) -> dict[str, Tensor]:
    """A state dict: torchvision's published one by its name, or what a file or a run holds.

    Args:
        name: "densenet121", "densenet161", "densenet169" or "densenet201".
        weights, progress: as of :func:`densenet121`.

    Raises:
        ValueError, FileNotFoundError: where there is none.
    """
    from torchvision import models as torchvision_models

    enum: Any = torchvision_models.get_model_weights(name)
    if isinstance(weights, str):
        spelled = weights.rpartition(".")[2] if weights.startswith(enum.__name__) else weights
        members = {member.upper(): enum[member] for member in enum.__members__}
        weights = members.get(spelled.upper(), weights)
    if isinstance(weights, enum):
        return dict(weights.get_state_dict(progress=progress, check_hash=True))
    if not isinstance(weights, (str, os.PathLike)):
        raise ValueError(
            f"weights must be None, a {enum.__name__}, one of {list(enum.__members__)} or "
            f"a path, got {weights!r:.80}"
        )
    if not os.path.exists(weights):
        raise FileNotFoundError(
            f"no weights named {os.fspath(weights)!r}: neither one of "
            f"{list(enum.__members__)} nor an existing file"
        )
    return read_weights(weights)
