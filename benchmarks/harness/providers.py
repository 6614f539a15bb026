"""The implementations that are compared, behind one ``setup``.

What a provider is trained with is the same for all: cross-entropy, SGD with momentum,
the same parameters and the same input. Speed and memory are measured on the same
:class:`effdense.memory.timeline.Training`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, get_args

import torch
import tyro
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

import effdense
from effdense import reference
from effdense.autocast import autocast_dtype
from effdense.choices import BackendName
from effdense.errors import UserError
from effdense.memory.meta import autocast
from effdense.memory.timeline import Training

from .case import Case

BACKENDS = get_args(BackendName)
DEFAULT = (
    "naive",
    "naive-channels-last",
    "torchvision",
    "torchvision-memory-efficient",
    "checkpoint",
    "effdense-bottlenecks",
    "effdense-features",
    "effdense-input",
    "effdense-step-in-backward",
)


class Provider(NamedTuple):
    """What a name on the command line stands for."""

    summary: str
    build: Callable[[Case, str], nn.Module]
    variant: str | None = None
    """The meaning of NAME:VARIANT, or None where there are no variants."""
    channels_last: bool = False
    dims: tuple[int, ...] = (1, 2, 3)
    """The spatial_dims that it has networks of."""
    compiled: bool = False
    """torch.compile runs under no dispatch mode, so neither live bytes nor meta runs."""
    step_in_backward: bool = False
    """Parameters are stepped in backward, and no gradients are left to compare."""


def _naive(case: Case, variant: str) -> nn.Module:
    return reference.DenseNet(**case.network())


def _torchvision(memory_efficient: bool) -> Callable[[Case, str], nn.Module]:
    def build(case: Case, variant: str) -> nn.Module:
        from torchvision.models import DenseNet

        network = case.network()
        del network["spatial_dims"]
        small_inputs = network.pop("small_inputs", False)
        model = DenseNet(**network, memory_efficient=memory_efficient)
        if small_inputs:
            width = network["num_init_features"]
            model.features.conv0 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
            del model.features.norm0, model.features.relu0, model.features.pool0
        return model

    return build


class _CheckpointedBlock(reference.DenseBlock):
    """What efficient DenseNets do today: the concatenation's first half runs again in backward.

    Pleiss et al. 2017. Its norms move their running statistics twice per step.
    """

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        layer: Any
        for layer in self.values():

            def bottleneck(*features: Tensor, layer: Any = layer) -> Tensor:
                return layer.conv1(layer.relu1(layer.norm1(torch.cat(features, 1))))

            y = checkpoint(
                bottleneck,
                *features,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing below draws random numbers
                context_fn=_recomputation_on_meta if x.is_meta else noop_context_fn,
            )
            features.append(layer.conv2(layer.relu2(layer.norm2(y))))
        return torch.cat(features, 1)


def _recomputation_on_meta() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    # checkpoint restores torch.autocast's state itself, but not what stands for it on meta
    meta = torch.device("meta")
    return nullcontext(), autocast(meta, autocast_dtype(meta))


class _Checkpointed(reference.DenseNet):
    block_type = _CheckpointedBlock


def _checkpointed(case: Case, variant: str) -> nn.Module:
    return _Checkpointed(**case.network())


def _effdense(save: Any) -> Callable[[Case, str], nn.Module]:
    def build(case: Case, variant: str) -> nn.Module:
        return effdense.DenseNet(**case.network(), save=save, backend=variant or "auto")

    return build


def _compiled(case: Case, variant: str) -> nn.Module:
    return torch.compile(_naive(case, ""), mode=variant or None)  # type: ignore[return-value]


def _compiled_within_budget(case: Case, variant: str) -> nn.Module:
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = float(variant or 0.5)
    return _compiled(case, "")


PROVIDERS: dict[str, Provider] = (
    {
        "naive": Provider("effdense.reference, NCHW", _naive),
        # torch has no such layout in 1-D
        "naive-channels-last": Provider(
            "effdense.reference, channels last", _naive, channels_last=True, dims=(2, 3)
        ),
        "torchvision": Provider("torchvision.models.DenseNet", _torchvision(False), dims=(2,)),
        "torchvision-memory-efficient": Provider(
            "torchvision.models.DenseNet(memory_efficient=True)", _torchvision(True), dims=(2,)
        ),
        "checkpoint": Provider("torch.utils.checkpoint over cat-BN-ReLU-Conv1x1", _checkpointed),
        "compile": Provider(
            "torch.compile of naive", _compiled, variant="a mode of torch.compile", compiled=True
        ),
        "compile-channels-last": Provider(
            "torch.compile of naive, channels last",
            _compiled,
            variant="a mode of torch.compile",
            channels_last=True,
            dims=(2, 3),
            compiled=True,
        ),
        "compile-budget": Provider(
            "torch.compile of naive within an activation memory budget",
            _compiled_within_budget,
            variant="the budget as a fraction (default 0.5)",
            compiled=True,
        ),
    }
    | {
        f"effdense-{save}": Provider(
            f'effdense, save="{save}"',
            _effdense(save),
            variant=f"the backend, one of {', '.join(BACKENDS)} (default auto)",
        )
        for save in effdense.SAVE_MODES
    }
    | {
        "effdense-step-in-backward": Provider(
            'effdense, save="features" and steps in backward',
            _effdense("features"),
            variant=f"the backend, one of {', '.join(BACKENDS)} (default auto)",
            step_in_backward=True,
        )
    }
)


def find(name: str) -> tuple[Provider, str]:
    """The provider that ``NAME`` or ``NAME:VARIANT`` stands for, and its variant.

    ``MODULE:CALLABLE`` is anybody's: see :func:`_anybody`.

    Raises:
        UserError: where there is none; names those there are.
    """
    base, _, variant = name.partition(":")
    provider = PROVIDERS.get(base)
    if provider is None and variant:
        return Provider(f"{variant} of {base}", _anybody(base, variant)), ""
    if provider is None:
        raise UserError(
            f"no provider {base!r}; there are {', '.join(PROVIDERS)}, and MODULE:CALLABLE for one "
            "of your own"
        )
    if variant and provider.variant is None:
        raise UserError(f"provider {base} has no variants, got {name!r}")
    if variant and base in ("compile", "compile-channels-last") and variant not in _modes():
        raise UserError(f"the mode is one of {', '.join(_modes())}, got {name!r}")
    if variant and base == "compile-budget":
        try:
            in_range = 0 <= float(variant) <= 1
        except ValueError:
            in_range = False
        if not in_range:
            raise UserError(f"the budget is a fraction between 0 and 1, got {name!r}")
    if variant and base.startswith("effdense") and variant not in BACKENDS:
        raise UserError(f"the backend is one of {', '.join(BACKENDS)}, got {name!r}")
    return provider, variant


def _modes() -> list[str]:
    return list(torch._inductor.list_mode_options())


def _anybody(module: str, name: str) -> Callable[[Case, str], nn.Module]:
    """A network by somebody's function or class, with the arguments of effdense.DenseNet.

    growth_rate, block_config, num_init_features, bn_size, num_classes, small_inputs,
    compression; spatial_dims only where it is not 2. Its parameters are compared with the naive
    network's by name or, where the names differ, in their names' order.

    Raises:
        UserError: where there is no such callable.
    """
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"no module {error.name!r} for provider {module}:{name}; set PYTHONPATH, or name one "
            f"of {', '.join(PROVIDERS)}"
        ) from None
    except AttributeError:
        raise UserError(f"module {module} has no {name!r}") from None

    def build(case: Case, variant: str) -> nn.Module:
        network = case.network()
        if network["spatial_dims"] == 2:
            del network["spatial_dims"]
        model: nn.Module = found(**network)
        return model

    return build


def argument(default: Sequence[str]) -> Any:
    """Of the command lines' ``--providers``: the help text names those there are."""
    other = " ".join(name for name in PROVIDERS if name not in default)
    hint = f"(default: {' '.join(default)}; there are also {other} MODULE:CALLABLE)"
    return tyro.conf.arg(metavar="NAME", help_behavior_hint=hint)


def selected(named: Sequence[str], default: Sequence[str], case: Case) -> list[str]:
    """The providers ``named``, else those of ``default`` that have the case's network.

    Raises:
        UserError: where one that is named is none, or hasn't.
    """
    able = [name for name in named or default if case.spatial_dims in find(name)[0].dims]
    for name in named:
        if name not in able:
            dims = " and ".join(f"{n}-D" for n in find(name)[0].dims)
            raise UserError(
                f"{name} has networks in {dims} only, not for --spatial-dims "
                f"{case.spatial_dims}; leave it out of --providers"
            )
    return able


def setup(name: str, case: Case) -> Training:
    """Build a provider for a case.

    All providers get the same parameters and input, whatever the order in which their
    constructors draw.
    """
    provider, variant = find(name)
    dtype = getattr(torch, "float32" if case.autocast else case.dtype)
    with torch.device(case.device):
        model = provider.build(case, variant).to(dtype)
    set_parameters(model)
    generator = torch.Generator().manual_seed(1)
    classes = case.network().get("num_classes", 1000)
    x = torch.randn(case.shape, generator=generator, dtype=dtype).to(case.device)
    target = torch.randint(classes, case.shape[:1], generator=generator).to(case.device)
    if provider.channels_last:
        layout = torch.channels_last_3d if case.spatial_dims == 3 else torch.channels_last
        model = model.to(memory_format=layout)
        x = x.to(memory_format=layout)
    # Small enough that no number of timed steps leads anywhere.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    if provider.step_in_backward:
        effdense.step_in_backward(model, optimizer)
    amp = getattr(torch, case.dtype) if case.autocast else None
    return Training(model, optimizer, x, target, amp)


@torch.no_grad()
def set_parameters(model: nn.Module) -> None:
    """Fixed He-normal weights and norm parameters that differ from channel to channel.

    Norms at their initial 1 and 0 would hide errors from the correctness gate.
    """
    generator = torch.Generator().manual_seed(0)
    for name, p in sorted(model.named_parameters()):
        if p.device.type == "meta":
            continue
        values = torch.randn(p.shape, generator=generator)
        if p.dim() > 1:
            values *= (2 / p[0].numel()) ** 0.5
        elif name.endswith("weight"):
            # about one norm weight in fifteen is negative
            values = torch.where(values > -1.5, 1.0, -1.0) + 0.1 * values
        else:
            values *= 0.1
        p.copy_(values)
