"""CUDA graphs without a GPU: what a step does is recorded, and done again on new images.

Two things are shown for every kind of step: that two steps do the same operations on the same
places, and that doing the recorded ones again is a step, bit for bit.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torchvision
from torch import Tensor, nn

import effdense
from effdense.block import cuda_graphs
from tests.helpers.compare import SMALL, images, norms_of, randomize_norms
from tests.helpers.replaying import Operations, ReplayingDevice, replaying

pytestmark = pytest.mark.usefixtures("on_torch")

Model = Callable[[], nn.Module]


@pytest.fixture
def on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFDENSE_BACKEND", "torch")


def ours(**options: Any) -> Model:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = effdense.DenseNet(**SMALL | options)
        randomize_norms(model)
        return model

    return make


def frozen() -> nn.Module:
    model = ours()()
    for norm in list(norms_of(model))[::2]:
        norm.eval()
    for parameter in list(model.parameters())[::5]:
        parameter.requires_grad_(False)
    return model


def block_frozen() -> nn.Module:
    """In the midst of what learns, with what reads it."""
    model = ours()()
    for name in ("denseblock2", "norm5"):
        model.get_submodule(f"features.{name}").requires_grad_(False)
    return model


def converted() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.DenseNet(8, (2, 3), 16, num_classes=5, drop_rate=0.2)
    randomize_norms(model)
    return effdense.convert(model)


def recomputed(save: Any, drop_rate: float = 0.0) -> Model:
    """Of layers with another activation, which autograd recomputes."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = torchvision.models.DenseNet(8, (2, 3), 16, num_classes=5, drop_rate=drop_rate)
        for layer in model.modules():
            if hasattr(layer, "relu1"):
                layer.relu1 = nn.SiLU()
        randomize_norms(model)
        return effdense.convert(model, save=save)

    return make


def in_pieces() -> nn.Module:
    """Whose parts a user calls: blocks without their readers, and one of them twice."""

    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ours(block_config=(2, 2), compression=1.0)()
            self.again = effdense.Transition(14, 14)

        def forward(self, x: Tensor) -> Tensor:
            features: Any = self.net.features
            x = features.denseblock1(features.conv0(x))
            x = self.again(x) + self.again(x + 1)
            return features.denseblock2(features.transition1(x)).mean((2, 3))

    return Pieces()


class Case:
    def __init__(
        self, make: Model, shape: tuple[int, ...] = (3, 3, 10, 9), autocast: bool = False
    ) -> None:
        self.make, self.shape, self.autocast = make, shape, autocast

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()


CASES = {
    "features": Case(ours()),
    "bottlenecks": Case(ours(save="bottlenecks")),
    "input": Case(ours(save="input")),
    "modes by block": Case(ours(save=("all", "input"))),
    "dropout": Case(ours(drop_rate=0.3)),
    "dropout, input": Case(ours(drop_rate=0.3, save="input")),
    "autocast": Case(ours(drop_rate=0.3), autocast=True),
    "frozen": Case(frozen),
    "a block frozen": Case(block_frozen),
    "no bottleneck": Case(ours(bn_size=None)),
    "3-D": Case(ours(spatial_dims=3), (2, 3, 5, 4, 6)),
    "ImageNet": Case(ours(small_inputs=False, save="bottlenecks"), (2, 3, 37, 30)),
    "ImageNet, features, autocast": Case(ours(small_inputs=False), (2, 3, 37, 30), True),
    "converted": Case(converted, (2, 3, 35, 33)),
    "recomputed": Case(recomputed("features"), (2, 3, 35, 33)),
    "recomputed, input": Case(recomputed("input"), (2, 3, 35, 33)),
    "recomputed, autocast": Case(recomputed("features"), (2, 3, 35, 33), True),
    "recomputed, input, autocast": Case(recomputed("input"), (2, 3, 35, 33), True),
    "in pieces": Case(in_pieces),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def batch(case: Case, seed: int) -> Tensor:
    return images(*case.shape, dtype=torch.float32, seed=seed)


@pytest.fixture
def device() -> Iterator[ReplayingDevice]:
    with replaying() as device:
        yield device


@each_case
def test_two_steps_do_the_same_to_the_same_places(case: Case, device: ReplayingDevice) -> None:
    model, described = case.make(), []
    x = batch(case, 0)
    for seed in range(3):
        x.copy_(batch(case, seed))
        model.zero_grad()
        with Operations() as operations, case.context():
            model(x).square().sum().backward()
        described.append(operations.described())
        del operations
    # the first step looks things up
    assert len(described[1]) > 50
    assert described[1] == described[2]


def train(model: nn.Module, case: Case, steps: int = 3, parts: int = 1) -> list[list[Tensor]]:
    """Outputs, gradients, parameters and buffers of some steps, the first two of one size."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    found = []
    torch.manual_seed(9)
    for number in range(steps):
        optimizer.zero_grad()
        outputs = []
        for part in range(parts):
            with case.context():
                output = model(batch(case, 10 * number + part))
            output.float().square().sum().backward()
            outputs.append(output.detach())
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
        found.append([*outputs, *gradients, *state])
    return found


def assert_equal(actual: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert not a.isnan().any()
            assert torch.equal(a, b)


@each_case
@pytest.mark.parametrize("parts", [1, 2])
def test_replayed_steps_are_steps_bit_for_bit(
    case: Case, parts: int, device: ReplayingDevice
) -> None:
    expected = train(case.make(), case, parts=parts)
    model = case.make()
    with case.context(), warnings.catch_warnings():
        warnings.simplefilter("error")
        graphs = effdense.cuda_graphs(model, batch(case, 99))
    assert graphs.stages
    assert not graphs.left_out
    device.replays = 0
    assert_equal(train(model, case, parts=parts), expected)
    assert device.replays == 2 * len(graphs.stages) * 3 * parts


def test_capturing_leaves_no_trace(device: ReplayingDevice) -> None:
    model = CASES["dropout"].make()
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    graphs = effdense.cuda_graphs(model, batch(CASES["dropout"], 0))
    assert len(graphs.stages) == 2
    assert str(graphs).startswith("2 stages by CUDA graphs; other batch sizes")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.fixture
def captured(device: ReplayingDevice) -> tuple[nn.Module, ReplayingDevice]:
    model = CASES["features"].make()
    effdense.cuda_graphs(model, batch(CASES["features"], 0))
    device.replays = 0
    return model, device


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("how", ["another batch", "eval", "no_grad", "input gradient"])
def test_what_was_not_captured_runs_without(
    how: str, captured: tuple[nn.Module, ReplayingDevice]
) -> None:
    model, device = captured
    plain = CASES["features"].make()
    x = batch(CASES["features"], 1)[: 2 if how == "another batch" else 3]
    outputs = []
    for each in (plain, model):
        if how == "eval":
            each.eval()
        with torch.no_grad() if how in ("eval", "no_grad") else nullcontext():
            given = x.clone().requires_grad_(how == "input gradient")
            outputs.append(each(given))
    assert torch.equal(outputs[0], outputs[1])
    # the first convolution's output needs a gradient in any case
    assert device.replays == (2 if how == "input gradient" else 0)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a norm frozen": lambda m: m.features.denseblock1.denselayer2.norm2.eval(),
    "a parameter replaced": lambda m: setattr(
        m.features.denseblock1.denselayer1.conv1,
        "weight",
        nn.Parameter(m.features.denseblock1.denselayer1.conv1.weight.detach() * 2),
    ),
    "a parameter moved": lambda m: setattr(
        m.features.denseblock1.denselayer1.norm1.weight,
        "data",
        m.features.denseblock1.denselayer1.norm1.weight.data * 2,
    ),
    "a parameter that needs no gradient": (
        lambda m: m.features.denseblock1.denselayer1.norm1.weight.requires_grad_(False)
    ),
    "another momentum": lambda m: setattr(
        m.features.denseblock1.denselayer1.norm1, "momentum", 0.5
    ),
    "another mode": lambda m: setattr(m.features.denseblock1, "save", "bottlenecks"),
    "dropout": lambda m: setattr(m.features.denseblock1.denselayer1, "drop_rate", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_since_is_seen_and_said_once(
    change: str, captured: tuple[nn.Module, ReplayingDevice]
) -> None:
    model, device = captured
    plain = CASES["features"].make()
    CHANGES[change](plain), CHANGES[change](model)
    expected = train(plain, CASES["features"])
    with pytest.warns(UserWarning, match="denseblock1 runs without its CUDA graph") as said:
        actual = train(model, CASES["features"])
    assert len(said) == 1
    assert_equal(actual, expected)
    # the other block's graphs go on
    assert device.replays == 2 * 3


def test_a_hook_inside_is_called(captured: tuple[nn.Module, ReplayingDevice]) -> None:
    model, _ = captured
    calls: list[int] = []
    layer: Any = model.get_submodule("features.denseblock1.denselayer1.conv1")
    layer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="runs"):
        model(batch(CASES["features"], 1))
    assert calls == [1]


def test_two_forwards_before_a_backward(captured: tuple[nn.Module, ReplayingDevice]) -> None:
    model, _ = captured
    plain = CASES["features"].make()
    one, other = batch(CASES["features"], 1), batch(CASES["features"], 2)
    with pytest.warns(UserWarning, match="called again before the last call's backward"):
        (model(one) * model(other)).sum().backward()
    (plain(one) * plain(other)).sum().backward()
    for a, b in zip(gradients_of(model), gradients_of(plain), strict=True):
        assert torch.equal(a, b)


def test_a_forward_that_nobody_goes_back_through_is_forgotten(
    captured: tuple[nn.Module, ReplayingDevice],
) -> None:
    model, device = captured
    for seed in range(3):
        model(batch(CASES["features"], seed))
    assert device.replays == 2 * 3


def test_a_second_backward_raises(captured: tuple[nn.Module, ReplayingDevice]) -> None:
    model, _ = captured
    loss = model(batch(CASES["features"], 1)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="replayed by CUDA graphs"):
        loss.backward()


def test_a_parameter_changed_before_backward_raises(
    captured: tuple[nn.Module, ReplayingDevice],
) -> None:
    model, _ = captured
    loss = model(batch(CASES["features"], 1)).sum()
    with torch.no_grad():
        model.get_parameter("features.denseblock1.denselayer1.norm1.weight").add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_raise(captured: tuple[nn.Module, ReplayingDevice]) -> None:
    model, _ = captured
    (gradient,) = torch.autograd.grad(
        model(batch(CASES["features"], 1)).sum(),
        [model.get_parameter("features.conv0.weight")],
        create_graph=True,
    )
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.square().sum().backward()


def test_what_leaves_a_graph_is_its_owners(device: ReplayingDevice) -> None:
    block: Any = CASES["features"].make().get_submodule("features.denseblock1")
    effdense.cuda_graphs(block, images(3, 6, 5, 7, dtype=torch.float32).requires_grad_())
    device.replays = 0
    kept, before = [], []
    for seed in range(2):
        block.zero_grad()
        x = images(3, 6, 5, 7, dtype=torch.float32, seed=seed).requires_grad_()
        features = block(x)
        features.square().sum().backward()
        found = [features.detach(), x.grad, *[p.grad for p in block.parameters()]]
        kept.append(found)
        before.append([t.clone() for t in found])
    assert device.replays == 2 * 2
    for now, then in zip(kept, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))


def test_copies_have_no_graphs(captured: tuple[nn.Module, ReplayingDevice]) -> None:
    model, device = captured
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        twin(batch(CASES["features"], 1)).sum().backward()
    assert device.replays == 0
    assert not any("captured" in name for name in model.state_dict())


def test_released_graphs_are_gone(device: ReplayingDevice) -> None:
    model = CASES["features"].make()
    graphs = effdense.cuda_graphs(model, batch(CASES["features"], 0))
    graphs.release()
    device.replays = 0
    loss = model(batch(CASES["features"], 1)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert device.replays == 0


class _Wrong(ReplayingDevice):
    """Replays a recording wrongly."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        found, replay = super().record(function)
        if len(self.recordings) - 1 != self.number:
            return found, replay

        def wrong() -> None:
            replay()
            for result in found if isinstance(found, list) else [found]:
                result.data.mul_(1.1)

        return found, wrong


@pytest.mark.parametrize("number", range(4))
def test_a_difference_turns_graphs_off_with_one_warning(number: int) -> None:
    case = CASES["features"]
    expected = train(case.make(), case)
    model = case.make()
    with replaying(_Wrong(number)) as device:
        with pytest.warns(RuntimeWarning, match="CUDA graphs are not used: replayed, ") as said:
            graphs = effdense.cuda_graphs(model, batch(case, 0))
        assert len(said) == 1
        device.replays = 0
        assert_equal(train(model, case), expected)
        assert device.replays == 0
    assert graphs.stages == ()
    assert "differs by" in str(graphs)


@pytest.mark.parametrize("number", range(4))
def test_an_error_in_capture_turns_graphs_off_with_one_warning(
    number: int, device: ReplayingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["features"]
    model = case.make()
    state = copy.deepcopy(model.state_dict())
    record = ReplayingDevice.record

    def failing(self: ReplayingDevice, function: Any) -> Any:
        if len(self.recordings) == number:
            raise RuntimeError("CUDA error: out of memory\nand more")
        return record(self, function)

    monkeypatch.setattr(ReplayingDevice, "record", failing)
    with pytest.warns(RuntimeWarning, match="not used: recording .* out of memory$") as said:
        graphs = effdense.cuda_graphs(model, batch(case, 0))
    assert len(said) == 1
    assert graphs.fault is not None
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_value_that_is_read_on_the_host_can_not_be_captured(
    device: ReplayingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effdense.block import stage

    moved = stage.update_running_statistics

    def reading(norms: Any, means: Any, *rest: Any) -> None:
        float(means[0].sum())
        moved(norms, means, *rest)

    monkeypatch.setattr(stage, "update_running_statistics", reading)
    with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing"):
        effdense.cuda_graphs(CASES["features"].make(), batch(CASES["features"], 0))


def no_momentum(model: Any) -> None:
    model.features.denseblock1.denselayer1.norm1.momentum = None


def other_layers(model: Any) -> None:
    layers = [
        nn.Sequential(nn.BatchNorm2d(6 + 4 * i), nn.GELU(), nn.Conv2d(6 + 4 * i, 4, 3, padding=1))
        for i in range(2)
    ]
    model.features.denseblock1 = effdense.DenseBlock(layers)


def drawing(model: Any) -> None:
    """Layers whose code has been followed, and that draw."""
    torch.manual_seed(0)
    other = recomputed("features", drop_rate=0.2)()
    model.features.denseblock1 = other.get_submodule("features.denseblock1")
    model.features.conv0 = nn.Conv2d(3, 16, 3, padding=1)
    model.features.transition1 = effdense.Transition(32, 7)


def offloaded(model: Any) -> None:
    model.offload = (True, False)


@pytest.mark.parametrize(
    ("change", "reason", "alone"),
    [
        (no_momentum, "counts its batches in Python", False),
        (other_layers, "what Python does in its layers, which are recomputed", True),
        (drawing, "recomputed, draw random numbers", True),
        (offloaded, "offloaded", False),
    ],
)
def test_stages_that_can_not_be_captured_are_left_out(
    change: Callable[[Any], None], reason: str, alone: bool, device: ReplayingDevice
) -> None:
    model, plain = CASES["features"].make(), CASES["features"].make()
    torch.manual_seed(3)
    change(model)
    torch.manual_seed(3)
    change(plain)
    graphs = effdense.cuda_graphs(model, batch(CASES["features"], 0))
    assert list(graphs.left_out) == ["features.denseblock1"]
    assert reason in graphs.left_out["features.denseblock1"]
    # the block's reader is a stage of its own where the two are none together
    assert graphs.stages == (*["features.transition1"] * alone, "features.denseblock2")
    device.replays = 0
    assert_equal(train(model, CASES["features"]), train(plain, CASES["features"]))
    assert device.replays == 2 * 3 * len(graphs.stages)


def test_a_capture_that_fails_leaves_the_device_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own context ends neither its stream nor the allocator's and the generator's part."""
    calls: list[Any] = []
    inside: list[bool] = []
    overridden = getattr(torch._C, "_override_stale_capture_stream", None)

    class Graph:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> None:
            if overridden is not None:
                inside.append(overridden())

        def __exit__(self, *_: Any) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    fresh, old = mock.MagicMock(), mock.MagicMock()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for name in ("Stream", "graph_pool_handle", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: name)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream before")
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "set_stream", calls.append)
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
    for name in names:
        monkeypatch.delattr(torch._C, name, raising=False)
    end: Any = lambda *given: calls.append(given)  # noqa: E731
    monkeypatch.setattr(torch._C, names[0], end, raising=False)
    monkeypatch.setattr(torch.cuda, "default_generators", [None, old])
    monkeypatch.setattr(torch, "Generator", lambda device: fresh)
    device = cuda_graphs._CudaDevice(torch.device("cuda", 1))
    with pytest.raises(RuntimeError, match="during capture"):
        device.record(lambda: None)
    assert calls == ["the stream before", (1, "graph_pool_handle")]
    fresh.set_state.assert_called_once_with(old.get_state())
    old.graphsafe_set_state.assert_called_once_with(fresh.graphsafe_get_state())
    if overridden is not None:
        assert inside == [True]
        assert not overridden()


def test_a_wrapped_model_is_captured_where_torch_can(device: ReplayingDevice) -> None:
    case = CASES["features"]
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    try:
        model = nn.parallel.DistributedDataParallel(case.make())
        with (
            mock.patch.object(device, "records_stale_streams", return_value=False),
            pytest.warns(RuntimeWarning, match="call cuda_graphs before it takes the model"),
        ):
            assert not effdense.cuda_graphs(model, batch(case, 0)).stages
        assert effdense.cuda_graphs(model, batch(case, 0)).stages
    finally:
        torch.distributed.destroy_process_group()


def test_inputs_are_checked() -> None:
    model = CASES["features"].make()
    with pytest.raises(ValueError, match="need a GPU, got an input on cpu"):
        effdense.cuda_graphs(model, batch(CASES["features"], 0))
    with pytest.raises(ValueError, match="needs an input that is a tensor"):
        effdense.cuda_graphs(model)


def test_gradients_in_ddps_buckets(device: ReplayingDevice) -> None:
    case = CASES["dropout"]
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        found = []
        for captured in (False, True):
            model = case.make()
            if captured:
                effdense.cuda_graphs(model, batch(case, 0))
            wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
            device.replays = 0
            found.append(train(wrapped, case, parts=2))
        assert device.replays == 2 * 2 * 3 * 2
    finally:
        torch.distributed.destroy_process_group()
    assert_equal(found[1], found[0])


def test_a_network_of_plain_autograd_is_said_to_have_no_stages(device: ReplayingDevice) -> None:
    graphs = effdense.cuda_graphs(ours(save="all")(), images(3, 3, 10, 9, dtype=torch.float32))
    assert str(graphs).startswith("no CUDA graphs: the model has none of effdense's stages")
    graphs = effdense.cuda_graphs(ours(save=("all", "input"))(), images(3, 3, 10, 9).float())
    assert "2 stages by CUDA graphs" in str(graphs)
