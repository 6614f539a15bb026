"""torch.fx and TorchScript on converted and own networks, and convert on torch.fx's graphs."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import effdense
from effdense import reference
from effdense.verification.comparison import randomize_norms
from tests.helpers.compare import (
    assert_close,
    assert_same_buffers,
    assert_same_step,
    images,
    stages_in,
    step,
)
from tests.helpers.other_densenets import (
    AppendingBottleneck,
    FlatNet,
    PrependingBottleneck,
    SequentialLayer,
    Wrapped,
)

# of torch, about TorchScript's age
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

CONFIG: dict[str, Any] = {
    "growth_rate": 4,
    "block_config": (2, 3),
    "num_init_features": 8,
    "bn_size": 2,
    "num_classes": 5,
}
X = (2, 3, 37, 33)


def _naive(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    model = torchvision.models.DenseNet(**CONFIG | options).to(dtype)
    randomize_norms(model)
    return model


@pytest.fixture(params=["own", "converted"])
def networks(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Ours and the original, in float64, with norms as after training."""
    naive = _naive()
    if request.param == "converted":
        return effdense.convert(copy.deepcopy(naive)), naive
    ours = effdense.DenseNet(**CONFIG).double()
    randomize_norms(ours)
    ours.load_state_dict(naive.state_dict())
    return ours, naive


def _packages_model(name: str) -> tuple[Any, tuple[int, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "timm":
            timm = pytest.importorskip("timm.models.densenet", exc_type=ImportError)
            return timm.DenseNet(growth_rate=4, block_config=(2, 3), num_classes=5), X
        nets = pytest.importorskip("monai.networks.nets", exc_type=ImportError)
    arguments: dict[str, Any] = {"init_features": 8, "growth_rate": 4, "block_config": (2, 3)}
    return nets.DenseNet(3, 1, 3, **arguments), (2, 1, 19, 17, 18)


# ------------------------------------------------------------------- TorchScript


def _modules(model: nn.Module) -> list[Any]:
    return [(name, id(m), type(m)) for name, m in model.named_modules()]


@pytest.mark.parametrize("training", [True, False])
def test_a_scripted_network_is_the_originals(networks: Any, training: bool) -> None:
    ours, naive = networks
    before = _modules(ours)
    x = images(*X)
    for model in networks:
        model.train(training)
    scripted = torch.jit.script(ours)
    assert _modules(ours) == before
    if training:
        assert_same_step(step(scripted, x), step(naive, x))
    else:
        assert_close(scripted(x), naive(x))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert loaded.state_dict().keys() == naive.state_dict().keys()
    assert_close(loaded.eval()(x), naive.eval()(x))
    assert stages_in(ours(x)) == 2


def test_what_holds_a_converted_network_can_be_scripted(networks: Any) -> None:
    ours, naive = networks
    whole = nn.Sequential(ours, nn.ReLU())
    before = _modules(whole)
    x = images(*X)
    assert_close(torch.jit.script(whole)(x), nn.functional.relu(naive(x)))
    assert _modules(whole) == before
    block = torch.jit.script(ours.get_submodule("features.denseblock1"))
    y = images(2, 8, 6, 5)
    assert_close(block(y), naive.features.denseblock1(y))


@pytest.mark.filterwarnings("ignore::UserWarning:(?!effdense)")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["timm", "monai"])
def test_packages_models_are_scripted(name: str) -> None:
    naive, shape = _packages_model(name)
    naive = naive.double().eval()
    randomize_norms(naive)
    ours = effdense.convert(copy.deepcopy(naive))
    x = images(*shape)
    assert_close(torch.jit.script(ours)(x), naive(x))


@pytest.mark.filterwarnings("ignore::UserWarning:(?!effdense)")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_monais_own_test_of_scripting_passes() -> None:
    naive, shape = _packages_model("monai")
    from monai.networks.utils import convert_to_torchscript

    ours = effdense.convert(naive)
    x = torch.randn(*shape)
    convert_to_torchscript(ours, inputs=[x], verify=True, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------- torch.fx


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_traced_network_has_the_bits_of_the_untraced(
    networks: Any, dtype: torch.dtype, training: bool
) -> None:
    ours = networks[0].to(dtype).train(training)
    twin = copy.deepcopy(ours)
    x = images(*X).to(dtype)
    traced = torch.fx.symbolic_trace(twin)
    assert not any("denselayer" in str(node.target) for node in traced.graph.nodes)
    if not training:
        with torch.inference_mode():
            assert torch.equal(traced(x), ours(x))
        return
    actual, expected = step(traced, x), step(ours, x)
    assert torch.equal(actual.output, expected.output)
    for name, gradient in expected.gradients.items():
        assert gradient is not None
        assert actual.gradients[name] is not None
        assert torch.equal(torch.as_tensor(actual.gradients[name]), gradient), name
    assert_same_buffers(dict(traced.named_buffers()), dict(ours.named_buffers()))
    assert stages_in(traced(x)) == 2


@pytest.mark.filterwarnings("ignore:The TorchScript type system")
def test_a_traced_network_can_be_scripted(networks: Any) -> None:
    ours, naive = networks
    x = images(*X)
    scripted = torch.jit.script(torch.fx.symbolic_trace(ours.eval()))
    assert_close(scripted(x), naive.eval()(x))


def test_blocks_are_leaves_of_what_holds_them(networks: Any) -> None:
    ours, naive = networks

    class Segmentation(nn.Module):
        def __init__(self, features: Any) -> None:
            super().__init__()
            self.stem = features[:4]
            self.block1, self.transition1 = features.denseblock1, features.transition1

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            skip = self.block1(self.stem(x))
            return skip, self.transition1(skip)

    x = images(*X)
    traced = torch.fx.symbolic_trace(Segmentation(ours.features))
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert "block1" in called
    assert "transition1" in called
    for found, expected in zip(traced(x), Segmentation(naive.features)(x), strict=True):
        assert_close(found, expected)
    assert stages_in(*traced(x)) == 2


ASKED = (
    ["features.denseblock1", "features.transition1", "features.norm5"],
    ["features.pool0", "features.denseblock2"],
    ["features", "classifier"],
)


@pytest.mark.parametrize("names", ASKED)
@pytest.mark.parametrize("training", [True, False])
def test_a_feature_extractor_gives_the_originals_features(
    networks: Any, names: list[str], training: bool
) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    x = images(*X)
    found, expected = (create_feature_extractor(m, names).train(training)(x) for m in networks)
    assert found.keys() == expected.keys()
    for name in names:
        # torchvision's ReLU works in place on its last features
        last = torch.relu if name in ("features", "features.norm5") else torch.clone
        assert_close(last(found[name]), last(expected[name]), name=name)
    assert stages_in(*found.values()) >= 2
    assert_same_buffers(dict(networks[0].named_buffers()), dict(networks[1].named_buffers()))


def test_timms_graphs_have_the_bits_of_the_untraced() -> None:
    """What timm's own test asks of a model: its graph, by its own tracer, gives what it gives."""
    naive, shape = _packages_model("timm")
    from timm.models._features_fx import GraphExtractNet
    from torchvision.models.feature_extraction import get_graph_node_names

    ours = effdense.convert(naive).eval()
    x = torch.randn(*shape)
    node = get_graph_node_names(ours)[1][-1]
    for inputs in (x, x.double()):
        ours.to(inputs.dtype)
        assert torch.equal(GraphExtractNet(ours, [node])(inputs), ours(inputs))


def test_names_of_nodes_can_be_listed(networks: Any) -> None:
    from torchvision.models.feature_extraction import get_graph_node_names

    ours, _ = networks
    for names in get_graph_node_names(ours):
        assert {"features.pool0", "features.denseblock1", "features.norm5"} <= {*names}


def test_a_feature_within_a_block_leaves_that_block_plain_and_says_so(networks: Any) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    x = images(*X)
    names = ["features.denseblock1.denselayer1.conv1", "classifier"]
    with pytest.warns(UserWarning, match="denselayer1.conv1 of it is asked for"):
        ours = create_feature_extractor(networks[0], names)
    found, expected = ours(x), create_feature_extractor(networks[1], names)(x)
    for name in names:
        assert_close(found[name], expected[name], name=name)
    # the other block, and the transition alone
    assert stages_in(*found.values()) == 2
    assert_same_buffers(dict(networks[0].named_buffers()), dict(networks[1].named_buffers()))


# ----------------------------------------------------------- convert on torch.fx's graphs


def test_a_traced_model_is_converted() -> None:
    naive = _naive()
    ours = torch.fx.symbolic_trace(copy.deepcopy(naive))
    keys = list(ours.state_dict())
    assert effdense.convert(ours) is ours
    assert list(ours.state_dict()) == keys
    x = images(*X)
    assert_same_step(step(ours, x), step(naive, x))
    for model in (ours, naive):
        model.eval()
    # two blocks, and the transition between them alone
    assert stages_in(ours(x)) == 3
    assert_close(copy.deepcopy(ours)(x), naive(x))
    assert stages_in(copy.deepcopy(ours).train()(x)) == 3
    assert_close(effdense.revert(ours)(x), naive(x))


def test_a_traced_densenet121_is_converted() -> None:
    traced: Any = torch.fx.symbolic_trace(torchvision.models.densenet121())
    report = effdense.conversion_report(traced)
    assert report.left == []
    assert [what for _, what in report.converted if what.startswith("dense block")] == [
        f"dense block, {n} layers of 32 features" for n in (6, 12, 24, 16)
    ]
    # the report changed nothing
    assert type(traced.features.denseblock1) is nn.Module
    assert sum(node.target is torch.cat for node in traced.graph.nodes) == 62


@pytest.mark.parametrize("layer", [AppendingBottleneck, PrependingBottleneck])
def test_either_order_in_a_graph_equals_the_original(layer: Any) -> None:
    torch.manual_seed(0)
    naive = FlatNet(layer).double()
    randomize_norms(naive)
    ours = torch.fx.symbolic_trace(copy.deepcopy(naive))
    effdense.convert(ours)
    x = images(2, 3, 9, 7)
    assert_same_step(step(ours, x), step(naive, x))
    assert stages_in(ours(x)) == 3


def test_layers_that_hold_a_sequence_are_found_in_a_graph() -> None:
    torch.manual_seed(0)
    naive = FlatNet(SequentialLayer, Wrapped).double()
    randomize_norms(naive)
    ours = torch.fx.symbolic_trace(copy.deepcopy(naive))
    effdense.convert(ours)
    x = images(2, 3, 9, 7)
    assert_same_step(step(ours, x), step(naive, x))
    assert stages_in(ours(x)) == 3


def test_what_is_asked_for_leaves_its_block_plain_and_the_report_says_why() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    naive = _naive()
    names = ["features.denseblock1.denselayer2.conv1", "features.transition1", "classifier"]
    ours = create_feature_extractor(copy.deepcopy(naive), names)
    report = effdense.conversion_report(ours)
    inner = "features.denseblock1.denselayer2.conv1 is asked for"
    assert ("features.denseblock1", inner) in report.left
    with pytest.warns(UserWarning, match=inner):
        effdense.convert(ours)
    x = images(*X)
    plain = create_feature_extractor(naive, names)
    for training in (True, False):
        ours.train(training), plain.train(training)
        found, expected = ours(x), plain(x)
        for name in names:
            assert_close(found[name], expected[name], name=name)
    assert stages_in(*ours.train()(x).values()) == 2


def test_modules_that_are_called_twice_stay_as_they_are_in_a_graph() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = _naive().features

        def forward(self, x: Tensor) -> Tensor:
            return self.features(x) + self.features(x.flip(0))

    naive = Twice()
    ours = torch.fx.symbolic_trace(copy.deepcopy(naive))
    with pytest.warns(UserWarning, match="no module that holds it alone"):
        effdense.convert(ours)
    x = images(*X)
    assert_same_step(step(ours, x), step(naive, x))


def test_a_module_that_stands_twice_in_a_sequence_runs_twice() -> None:
    relu = nn.ReLU()
    norm = nn.BatchNorm2d(8)

    def network() -> nn.Sequential:
        block = reference.DenseBlock(reference.dense_layers(2, 8, 4, 2))
        last = nn.Conv2d(16, 8, 1, bias=False)
        return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm, relu, block, last, norm, relu)

    torch.manual_seed(0)
    naive = network().double()
    randomize_norms(naive)
    ours = effdense.convert(copy.deepcopy(naive))
    x = images(2, 3, 9, 7)
    assert_same_step(step(ours, x), step(naive, x))
    assert stages_in(ours(x)) == 1
