"""Synchronised batch norm: N processes are one process with the whole batch.

All processes are started once; each works through CASES and saves what it found. What one
process makes of the whole batch is computed here, by the naive network with ordinary norms.
"""

from __future__ import annotations

import contextlib
import datetime
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import effdense
from effdense import reference
from tests.helpers.compare import (
    Step,
    assert_close,
    assert_same_buffers,
    assert_same_step,
    images,
    loss_of,
    norms_of,
    randomize_norms,
    stages_in,
    step,
    twins,
)

pytestmark = pytest.mark.slow

TORCHS = nn.SyncBatchNorm.convert_sync_batchnorm
OURS = effdense.SyncBatchNorm.convert_sync_batchnorm
Networks = tuple[Any, Any]


class Case(NamedTuple):
    """A step in several processes; ``shares`` are their images."""

    shares: tuple[int, ...]
    networks: Callable[[], Networks]
    # ours, whose norms synchronise, and the naive one, whose norms don't
    image: tuple[int, ...] = (3, 6, 5)
    input_grad: bool = True
    stages: int = 2
    # fused stages in ours' graph


def _networks(
    convert: Callable[[Any], Any] = TORCHS, backend: str = "auto", **arguments: Any
) -> Networks:
    ours, naive = twins(**arguments)
    module: Any
    for module in ours.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    return convert(ours), naive


def _freeze_some_norms(network: Any) -> None:
    for name in ("denseblock1.denselayer2.norm1", "denseblock2.denselayer1.norm2", "norm5"):
        network.features.get_submodule(name).eval()


def _freeze_first_norms(network: Any) -> None:
    for norm in norms_of(network.features.denseblock1):
        norm.eval()


def _freeze_below(network: Any) -> None:
    """Parameters of the stem, the first block and half of the second."""
    features = network.features
    half = [features.denseblock2.denselayer1, features.denseblock2.denselayer2]
    for part in (features.conv0, features.denseblock1, features.transition1, *half):
        part.requires_grad_(False)


def _average_all(network: Any) -> None:
    """Running statistics that are plain means, or that are not tracked."""
    norms = norms_of(network)
    for norm in norms:
        norm.momentum = None
    norms[2].momentum = 0.3
    untracked = network.features.denseblock1.denselayer2.norm2
    untracked.track_running_stats = False
    untracked.running_mean = untracked.running_var = untracked.num_batches_tracked = None


def _torchvisions(when: str) -> Networks:
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        made = torchvision.models.DenseNet(
            growth_rate=4, block_config=(2, 3), num_init_features=6, bn_size=2, num_classes=5
        ).double()
        randomize_norms(made)
        networks.append(made)
    ours, naive = networks
    if when == "before":
        ours = TORCHS(ours)
    with warnings.catch_warnings():
        # nothing is left as it is
        warnings.simplefilter("error")
        effdense.convert(ours)
    return ours if when == "before" else TORCHS(ours), naive


class _Checkpointed(nn.Module):
    """A network whose first block's forward runs again in backward."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.features, self.classifier = network.features, network.classifier

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.features.named_children():
            again = name == "denseblock1"
            x = checkpoint(module, x, use_reentrant=False) if again else module(x)
        return self.classifier(x.relu().mean((2, 3)))


def _checkpointed() -> Networks:
    ours, naive = _networks(OURS)
    return _Checkpointed(ours), naive


CASES: dict[str, Case] = {
    "features": Case((2, 0, 3), partial(_networks, save="features")),
    "bottlenecks": Case((0, 4, 1), partial(_networks, save="bottlenecks")),
    "input": Case((2, 3, 0), partial(_networks, save="input")),
    "two processes": Case((3, 2), _networks),
    "two, one empty": Case((0, 4), partial(_networks, save="input")),
    "torch backend": Case((1, 0, 3), partial(_networks, backend="torch")),
    "without bottleneck": Case((2, 0, 3), partial(_networks, bn_size=None)),
    "without bottleneck, input": Case((2, 1, 0), partial(_networks, bn_size=None, save="input")),
    "ImageNet's stem": Case((2, 0, 1), partial(_networks, small_inputs=False), (3, 35, 29)),
    "1-D": Case((2, 0, 1), partial(_networks, spatial_dims=1, small_inputs=False), (3, 33)),
    "3-D": Case((0, 1, 2), partial(_networks, spatial_dims=3, small_inputs=False), (3, 9, 8, 8)),
    "one position each": Case((1, 1, 2), _networks, (3, 2, 2)),
    "frozen norms": Case((2, 0, 3), partial(_networks, prepare=_freeze_some_norms)),
    "frozen norms, input": Case(
        (2, 0, 3), partial(_networks, save="input", prepare=_freeze_some_norms)
    ),
    "a block of frozen norms": Case((2, 0, 3), partial(_networks, prepare=_freeze_first_norms)),
    "frozen parts": Case(
        (2, 0, 3), partial(_networks, prepare=_freeze_below), input_grad=False, stages=1
    ),
    "no input gradient": Case((2, 0, 3), _networks, input_grad=False),
    "other momenta": Case((2, 0, 3), partial(_networks, prepare=_average_all)),
    "our norms": Case((2, 0, 3), partial(_networks, OURS, small_inputs=False), (3, 35, 29)),
    "our norms, all kept": Case((2, 0, 3), partial(_networks, OURS, save="all"), stages=0),
    "checkpointed": Case((2, 0, 3), _checkpointed, stages=3),
    "torchvision's, converted before": Case(
        (2, 0, 3), partial(_torchvisions, "before"), (3, 37, 33)
    ),
    "torchvision's, converted after": Case((2, 0, 3), partial(_torchvisions, "after"), (3, 37, 33)),
}


def _share(case: Case, rank: int) -> slice:
    first = sum(case.shares[:rank])
    return slice(first, first + case.shares[rank])


# ------------------------------------------------------------- in the processes


def _equal_step(case: Case, rank: int) -> tuple[tuple[Any, ...], int]:
    ours, _ = case.networks()
    share, whole = _share(case, rank), sum(case.shares)
    x = images(whole, *case.image)[share]
    graph: list[Tensor] = []

    def call(x: Tensor) -> Tensor:
        graph.append(ours(x))
        return graph[0]

    loss = partial(loss_of, start=share.start, batch_size=whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = step(ours, x, input_grad=case.input_grad, call=call, loss=loss)
    return tuple(found), stages_in(*graph)


def _without_grad(rank: int) -> dict[str, Tensor]:
    """Buffers after a forward in training mode that keeps nothing."""
    ours, _ = _networks(small_inputs=False)
    x = images(5, 3, 35, 29)
    with torch.no_grad():
        ours(x[_share(CASES["features"], rank)])
    return dict(ours.named_buffers())


def _sgd(network: Any, called: Any, rank: int | None) -> dict[str, Tensor]:
    """Parameters and buffers after two steps of two parts each; the whole batch for rank None."""
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    shares = ((2, 0, 3), (1, 3, 1))
    for i in range(2):
        optimizer.zero_grad()
        for j in range(2):
            part = slice(None) if rank is None else _share(Case(shares[j], _networks), rank)
            x = images(5, 3, 6, 5, seed=10 + 2 * i + j)[part]
            last = j == 1 or rank is None
            with contextlib.nullcontext() if last else called.no_sync():
                loss = loss_of(called(x), part.start or 0, 5)
                (loss if rank is None else 3 * loss).backward()
        optimizer.step()
    return {name: value.detach() for name, value in network.state_dict().items()}


def _distributed_data_parallel(rank: int, **options: Any) -> dict[str, dict[str, Tensor]]:
    found = {}
    for wrapped_first in (False, True):
        ours: Any = twins()[0]
        if not wrapped_first:
            ours = OURS(ours)
        parallel = DistributedDataParallel(ours, **options)
        if wrapped_first:
            # DDP refuses torch's class on a CPU, but does not look again
            TORCHS(ours)
        found[str(wrapped_first)] = _sgd(ours, parallel, rank)
    return found


def _other_groups(rank: int) -> dict[str, Any]:
    """Steps of a network whose norms synchronise over ranks 0 and 2, and ours against naive."""
    pair, alone = dist.new_group([0, 2]), dist.new_group([1])
    own = alone if rank == 1 else pair
    ours, _ = twins()
    found: dict[str, Any] = {}
    # images of ranks 0 and 2 are one batch, those of rank 1 another
    case = Case((2, 0, 3) if rank != 1 else (0, 4, 0), _networks)
    x = images(sum(case.shares), 3, 6, 5)[_share(case, rank)]
    loss = partial(loss_of, start=_share(case, rank).start, batch_size=sum(case.shares))
    found["own group"] = tuple(step(TORCHS(ours, own), x, loss=loss))

    def mix(network: Any, name: str) -> Any:
        """All norms over all processes, but for one that takes its own."""
        parent, _, last = name.rpartition(".")
        holder = network.features.get_submodule(parent)
        norm = getattr(holder, last)
        network = OURS(network)
        setattr(holder, last, norm)
        return network

    x = images(3 + rank, 3, 6, 5, seed=rank)
    inside, last = "denseblock1.denselayer2.norm1", "transition1.norm"
    for name in (inside, last, "norm5"):
        ours, naive = twins()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = step(mix(ours, name), x)
        said = [str(warning.message) for warning in caught]
        found[name] = tuple(actual), tuple(step(mix(naive, name), x)), said
    return found


def _refusals(rank: int) -> list[str]:
    said = []
    ours, _ = _networks(save="all")
    for attempt in (
        lambda: ours(images(2, 3, 6, 5)),
        lambda: ours.features.denseblock1(images(2, 6, 6, 5)),
        lambda: ours.features.transition1(images(2, 14, 6, 5)),
        # a position in all processes together
        lambda: _networks()[0](images(1, 3, 2, 2)[: int(rank == 1)]),
        lambda: OURS(nn.BatchNorm1d(3).double())(images(1, 3)[: int(rank == 1)]),
    ):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


def _precisions(rank: int) -> dict[str, tuple[Any, ...]]:
    """Logits in other types."""
    found = {}
    for name, dtype, amp in (
        ("float32", torch.float32, None),
        ("autocast", torch.float32, torch.bfloat16),
        ("bfloat16", torch.bfloat16, None),
    ):
        ours, _ = _networks(OURS, dtype=dtype, small_inputs=False)
        ours.features.norm5.register_forward_hook(lambda m, i, o: None)
        x = images(5, 3, 35, 29, dtype=dtype)[_share(CASES["features"], rank)]
        with torch.autocast("cpu", amp, enabled=amp is not None):
            output = ours(x)
        output.sum().backward()
        found[name] = output.detach()
    return found


class _Communication(NamedTuple):
    """Bytes that one process hands to each collective of a step, in order."""

    forward: list[int]
    backward: list[int]


def _communication(model: nn.Module, x: Tensor) -> _Communication:
    found = _Communication([], [])
    counted = found.forward
    gather, reduce = dist.all_gather, dist.all_reduce

    def counting_gather(outputs: Any, own: Tensor, *args: Any, **options: Any) -> Any:
        counted.append(own.numel() * own.element_size())
        return gather(outputs, own, *args, **options)

    def counting_reduce(own: Tensor, *args: Any, **options: Any) -> Any:
        counted.append(own.numel() * own.element_size())
        return reduce(own, *args, **options)

    with (
        mock.patch.object(dist, "all_gather", counting_gather),
        mock.patch.object(dist, "all_reduce", counting_reduce),
    ):
        loss = model(x).sum()
        counted = found.backward
        loss.backward()
    return found


@contextlib.contextmanager
def _torchs_on_a_cpu() -> Iterator[None]:
    """Inside, torch's SyncBatchNorm runs on a CPU: its own code, its GPU kernels rewritten here."""

    def wide(vector: Tensor) -> Tensor:
        return vector.view(-1, 1, 1)

    def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean, (var + eps).rsqrt()

    def gathered(
        x: Tensor,
        means: Tensor,
        invstds: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights = (counts / counts.sum())[:, None]
        mean = (weights * means).sum(0)
        var = (weights * (invstds**-2 - eps + (means - mean) ** 2)).sum(0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * counts.sum() / (counts.sum() - 1), momentum)
        return mean, (var + eps).rsqrt()

    def apply(
        x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float
    ) -> Tensor:
        return (x - wide(mean)) * wide(invstd * weight) + wide(bias)

    def reduce(
        dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *needed: bool
    ) -> tuple[Tensor, ...]:
        s, t = dy.sum((0, 2, 3)), (dy * (x - wide(mean))).sum((0, 2, 3))
        return s, t, t * invstd, s

    def gradient(
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor,
        s: Tensor,
        t: Tensor,
        counts: Tensor,
    ) -> Tensor:
        correction = wide(s) + (x - wide(mean)) * wide(invstd**2 * t)
        return wide(invstd * weight) * (dy - correction / counts.sum())

    kernels = {
        "batch_norm_stats": statistics,
        "batch_norm_gather_stats_with_counts": gathered,
        "batch_norm_elemt": apply,
        "batch_norm_backward_reduce": reduce,
        "batch_norm_backward_elemt": gradient,
    }
    with contextlib.ExitStack() as stack:
        for name, kernel in kernels.items():
            stack.enter_context(mock.patch.object(torch, name, kernel))
        stack.enter_context(
            mock.patch.object(torch._C, "_get_privateuse1_backend_name", return_value="cpu")
        )
        yield


def _paper_networks() -> Networks:
    """DenseNet-BC (100, k 12), ours and naive, with torch's norms."""
    ours, naive = effdense.densenet_bc(100, 12), reference.densenet_bc(100, 12)
    naive.load_state_dict(ours.state_dict())
    return TORCHS(ours), TORCHS(naive)


def _counted() -> dict[str, tuple[Any, ...]]:
    ours, naive = _paper_networks()
    x = images(2, 3, 8, 8, dtype=torch.float32)
    found: dict[str, tuple[Any, ...]] = {"ours": tuple(_communication(ours, x))}
    with _torchs_on_a_cpu():
        found["torch's"] = tuple(_communication(naive, x))
    return found


def _against_torchs(rank: int) -> tuple[Any, ...]:
    """A step of ours, and of the naive network with torch's own SyncBatchNorm."""
    ours, naive = _networks(small_inputs=False)
    x = images(2 + rank, 3, 35, 29, seed=rank)
    actual = tuple(step(ours, x))
    with _torchs_on_a_cpu():
        return actual, tuple(step(TORCHS(naive), x))


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # every torch.empty holds NaN, so an element that is read unwritten can't hide
    torch.use_deterministic_algorithms(True)
    for world_size in (3, 2):
        if rank >= world_size:
            return
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store-{world_size}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=240),
        )
        found: dict[str, Any] = {
            name: _equal_step(case, rank)
            for name, case in CASES.items()
            if len(case.shares) == world_size
        }
        if world_size == 3:
            found["without grad"] = _without_grad(rank)
            found["DDP"] = _distributed_data_parallel(rank)
            found["DDP, views"] = _distributed_data_parallel(
                rank, gradient_as_bucket_view=True, find_unused_parameters=True
            )
            found["other groups"] = _other_groups(rank)
            found["refusals"] = _refusals(rank)
            found["precisions"] = _precisions(rank)
        else:
            found["counted"] = _counted()
            found["against torch's"] = _against_torchs(rank)
        torch.save(found, Path(folder) / f"{world_size}-{rank}.pt")
        dist.destroy_process_group()


# -------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What every process found, by name."""
    folder = tmp_path_factory.mktemp("processes")
    # as in test_hazards.py, where it says why
    mp.start_processes(_work, (str(folder),), nprocs=3, start_method="forkserver")
    by_name: dict[str, list[Any]] = {}
    for world_size in (3, 2):
        for rank in range(world_size):
            results = torch.load(folder / f"{world_size}-{rank}.pt", weights_only=True)
            for name, result in results.items():
                by_name.setdefault(name, []).append(result)
    return by_name.__getitem__


Found = Callable[[str], list[Any]]


def _together(steps: list[Step]) -> Step:
    """The processes' steps as one: outputs side by side, gradients summed, buffers equal."""
    for other in steps[1:]:
        for name, buffer in steps[0].buffers.items():
            assert torch.equal(buffer, other.buffers[name]), name
    gradients: dict[str, Tensor | None] = {}
    for name in steps[0].gradients:
        parts = [each.gradients[name] for each in steps]
        held = [part for part in parts if part is not None]
        assert len(held) in (0, len(steps)), f"{name} has a gradient in some processes only"
        gradients[name] = sum(held) if held else None  # type: ignore[assignment]
    inputs = [each.input_gradient for each in steps]
    held = [part for part in inputs if part is not None]
    assert len(held) in (0, len(steps))
    return Step(
        torch.cat([each.output for each in steps]),
        gradients,
        torch.cat(held) if held else None,
        steps[0].buffers,
    )


@pytest.mark.parametrize("name", CASES)
def test_processes_are_one_with_the_whole_batch(name: str, found: Found) -> None:
    case = CASES[name]
    assert {stages for _, stages in found(name)} == {case.stages}
    actual = _together([Step(*each) for each, _ in found(name)])
    _, naive = case.networks()
    x = images(sum(case.shares), *case.image)
    assert_same_step(actual, step(naive, x, input_grad=case.input_grad))


def test_statistics_move_without_gradients(found: Found) -> None:
    _, naive = _networks(small_inputs=False)
    naive(images(5, 3, 35, 29))
    for buffers in found("without grad"):
        assert_same_buffers(buffers, dict(naive.named_buffers()))


@pytest.mark.parametrize("options", ["DDP", "DDP, views"])
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_distributed_data_parallel_accumulates(
    wrapped_first: bool, options: str, found: Found
) -> None:
    _, naive = twins()
    expected = _sgd(naive, naive, None)
    for states in found(options):
        actual = states[str(wrapped_first)]
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(actual[key], value, 1e-9, key)


def test_groups_of_some_processes(found: Found) -> None:
    steps = [Step(*each["own group"]) for each in found("other groups")]
    for ranks, size in (((0, 2), 5), ((1,), 4)):
        _, naive = twins()
        expected = step(naive, images(size, 3, 6, 5))
        assert_same_step(_together([steps[rank] for rank in ranks]), expected)


@pytest.mark.parametrize(
    "name", ["denseblock1.denselayer2.norm1", "transition1.norm", "norm5"], ids=lambda name: name
)
def test_a_norm_with_statistics_of_its_own(name: str, found: Found) -> None:
    """Against the naive network in the same processes."""
    for each in found("other groups"):
        *steps, said = each[name]
        ours, naive = (Step(*result) for result in steps)
        assert_same_step(ours, naive)
        # a reader of the block runs by itself then
        assert len(said) == ("denselayer" in name)
        reason = "denselayer1.norm1 and denselayer2.norm1 take their statistics over different"
        assert all(reason in line for line in said)


def test_what_cannot_be_is_refused_in_every_process(found: Found) -> None:
    for said in found("refusals"):
        assert len(said) == 5
        assert all("effdense.SyncBatchNorm.convert_sync_batchnorm" in line for line in said[:3])
        assert all("got 1 in all processes together" in line for line in said[3:])


@pytest.mark.parametrize(("name", "tolerance"), [("float32", 1e-4), ("autocast", 0.1)])
def test_other_types(name: str, tolerance: float, found: Found) -> None:
    actual = torch.cat([each[name] for each in found("precisions")])
    _, naive = _networks(small_inputs=False)
    assert_close(actual, naive(images(5, 3, 35, 29)), tolerance)


def test_torchs_own_makes_the_same_step(found: Found) -> None:
    for results in found("against torch's"):
        actual, expected = (Step(*result) for result in results)
        assert_same_step(actual, expected, 1e-9)


def test_bytes_are_linear_in_depth_where_torchs_are_quadratic(found: Found) -> None:
    """DenseNet-BC (100, k 12), float32: what one process hands to collectives in a step."""
    layers, k, b = 16, 12, 48
    forward: list[int] = []
    backward: list[int] = []
    torchs: list[int] = []
    width = 24
    for _ in range(3):
        # a count in int64; two values in float32 for each channel
        forward += [8, 8 * width, *[8 * b, 8 * k] * layers]
        backward[:0] = [*[8 * k, 8 * b] * layers, 8 * width]
        torchs += [c for i in range(layers) for c in (width + i * k, b)] + [width + layers * k]
        width = (width + layers * k) // 2
    for each in found("counted"):
        ours, theirs = _Communication(*each["ours"]), _Communication(*each["torch's"])
        assert ours.forward == forward
        assert ours.backward == backward
        # mean, deviation and count; two sums
        assert theirs.forward == [8 * c + 4 for c in torchs]
        assert theirs.backward == [8 * c for c in reversed(torchs)]
        assert (sum(map(sum, ours)), sum(map(sum, theirs))) == (50_616, 192_300)
