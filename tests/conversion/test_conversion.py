"""convert and revert: other people's DenseNets, parity, identity, refusals, companions.

Each real package's model is built by the package itself; where one is not installed its
tests are skipped and say so.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from harness.fc_densenet import FCDenseNet
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import effdense
from effdense.__main__ import main
from effdense.backends.dropout import draw_seed, dropout_mask, layer_keys
from effdense.block.forwards import BlockForward
from effdense.recognition import proving
from effdense.tracing import nodes_behind
from tests.helpers.compare import (
    assert_close,
    assert_same_buffers,
    assert_same_step,
    images,
    loss_of,
    norms_of,
    randomize_norms,
    shared_masks,
    stages_in,
    step,
)
from tests.helpers.other_densenets import (
    AppendingBottleneck,
    DroppingBottleneck,
    FlatNet,
    PrependingBottleneck,
    ScaledBottleneck,
    SequentialLayer,
    SingleLayer,
    UsersChain,
    Wrapped,
    WrongWidthChain,
)
from tests.helpers.places import placed

everywhere = pytest.mark.usefixtures("device")

# Importing other people's packages warns about matters of their own.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:(?!effdense)"),
]

SMALL: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 3)}


def _package(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def _torchvision(**options: Any) -> nn.Module:
    arguments = SMALL | {"num_init_features": 8, "bn_size": 2, "num_classes": 5}
    return torchvision.models.DenseNet(**arguments | options)


def _monai(dims: int, **options: Any) -> nn.Module:
    nets = _package("monai.networks.nets")
    arguments = SMALL | {"init_features": 8, "bn_size": 2}
    return nets.DenseNet(dims, 1, 3, **arguments | options)


def _timm(**options: Any) -> nn.Module:
    densenet = _package("timm.models.densenet")
    return densenet.DenseNet(**SMALL | {"num_classes": 5} | options)


def _timm_blur() -> nn.Module:
    layers = _package("timm.layers")
    return _timm(aa_layer=layers.BlurPool2d, aa_stem_only=False)


def _rdnet() -> nn.Module:
    return _package("timm.models.rdnet").RDNet(
        growth_rates=(8, 8, 8),
        num_blocks_list=(2, 2, 2),
        block_type=("Block", "Block", "BlockESE"),
        is_downsample_block=(None, True, True),
        num_init_features=16,
        num_classes=5,
        ls_init_value=0.5,
        drop_path_rate=0.2,
    )


def _torchxrayvision() -> nn.Module:
    models = _package("torchxrayvision").models
    return models.DenseNet(**SMALL, num_init_features=8)


def _smp_unet() -> nn.Module:
    smp = _package("segmentation_models_pytorch")
    return smp.Unet("densenet121", encoder_weights=None, decoder_channels=(16, 8, 8, 4, 4))


def _fc_densenet(drop_rate: float = 0.0, biases: bool = False) -> nn.Module:
    model = FCDenseNet(4, (2, 3), 2, 7, 5, drop_rate=drop_rate)
    for name, parameter in model.named_parameters():
        # the gradient of a bias before a batch norm is zero up to rounding
        normed = name.endswith("bias") and "norm" not in name and "classify" not in name
        parameter.requires_grad_(biases or not normed)
    return model


# name: (how it is made, shape of an input, fused stages in a step, recomputed blocks)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "torchvision": (_torchvision, (2, 3, 37, 33), 2, 0),
    "monai 1-D": (lambda: _monai(1), (3, 1, 67), 2, 0),
    "monai 2-D": (lambda: _monai(2), (2, 1, 37, 33), 2, 0),
    "monai 3-D": (lambda: _monai(3), (2, 1, 19, 17, 18), 2, 0),
    "monai instance norm": (lambda: _monai(2, norm="instance"), (2, 1, 37, 33), 0, 2),
    "monai leaky ReLU": (lambda: _monai(2, act="leakyrelu"), (2, 1, 37, 33), 0, 2),
    "timm": (_timm, (2, 3, 37, 33), 2, 0),
    "timm deep stem": (lambda: _timm(stem_type="deep"), (2, 3, 37, 33), 2, 0),
    "timm blur pools": (_timm_blur, (2, 3, 37, 33), 2, 0),
    "timm SiLU": (lambda: _timm(act_layer="silu"), (2, 3, 37, 33), 0, 2),
    "timm RDNet": (_rdnet, (2, 3, 33, 32), 0, 3),
    "torchxrayvision": (_torchxrayvision, (2, 1, 224, 224), 2, 0),
    "segmentation-models-pytorch": (_smp_unet, (2, 3, 32, 64), 4, 0),
    "FC-DenseNet": (_fc_densenet, (2, 3, 12, 20), 5, 0),
    "new features last": (lambda: FlatNet(AppendingBottleneck), (2, 3, 9, 7), 3, 0),
    "new features first": (lambda: FlatNet(PrependingBottleneck), (2, 3, 9, 7), 3, 0),
    "without bottleneck": (lambda: FlatNet(SingleLayer), (2, 3, 9, 7), 3, 0),
    "one ReLU for both": (lambda: FlatNet(DroppingBottleneck), (2, 3, 9, 7), 3, 0),
    "sequential layers": (lambda: FlatNet(SequentialLayer, Wrapped), (2, 3, 9, 7), 3, 0),
    "scaled features": (lambda: FlatNet(ScaledBottleneck), (2, 3, 9, 7), 1, 2),
}


def _pair(
    build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Module]:
    """Twice the same model with norms as after training, nothing converted yet."""
    torch.manual_seed(0)
    naive = placed(build().to(dtype).train())
    randomize_norms(naive)
    return copy.deepcopy(naive), naive


def _convert(model: nn.Module, *settings: str) -> nn.Module:
    """Converted, whatever is left as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "effdense: left as they are")
        return effdense.convert(model, *settings)  # type: ignore[arg-type]


def _freeze_norms(model: nn.Module) -> None:
    for norm in norms_of(model):
        norm.eval()


def _random_step(model: nn.Module, x: Tensor) -> Any:
    """A step whose random numbers (drop path, dropout) are the same for every model."""
    torch.manual_seed(3)
    return step(model, x)


def _recomputed_in(model: nn.Module) -> int:
    return sum(getattr(m, "kind", "") == "dense block, recomputed" for m in model.modules())


@everywhere
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_equals_the_original(name: str) -> None:
    build, shape, stages, recomputed = MODELS[name]
    ours, naive = _pair(build)
    keys = list(ours.state_dict())
    assert _convert(ours) is ours
    assert list(ours.state_dict()) == keys
    assert _recomputed_in(ours) == recomputed
    x = images(*shape)
    assert_same_step(_random_step(ours, x), _random_step(naive, x))
    for change in (_freeze_norms, nn.Module.eval):
        change(ours), change(naive)
        assert_same_step(_random_step(ours, x), _random_step(naive, x))
    assert stages_in(ours(x)) == stages
    with torch.inference_mode():
        assert_close(ours(x), naive(x))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("save", [s for s in effdense.SAVE_MODES if s != "all"])
@pytest.mark.usefixtures("each_place", "nan_filled_memory")
def test_biases_of_layers_get_their_gradients(save: str, frozen: bool) -> None:
    ours, naive = _pair(lambda: _fc_densenet(biases=True))
    _convert(ours, save)
    if frozen:
        for model in (ours, naive):
            _freeze_norms(model)
    actual, expected = (step(model, images(2, 3, 12, 20)) for model in (ours, naive))
    if frozen:
        assert_same_step(actual, expected)
    for name, gradient in expected.gradients.items():
        found, weight = actual.gradients[name], expected.gradients[name.replace("bias", "weight")]
        assert found is not None
        assert gradient is not None
        assert weight is not None
        # where a batch norm follows, only rounding is left of a bias's
        assert (found - gradient).abs().max() <= 1e-10 * weight.abs().max(), name


def test_dropped_channels_of_layers_with_biases_are_zero() -> None:
    model: Any = _convert(_fc_densenet(0.5, biases=True))
    # with norms of 0 a layer's new features are its bias alone
    for norm in norms_of(model):
        nn.init.zeros_(norm.weight), nn.init.zeros_(norm.bias)
    block = model.down[1]
    for layer in block.layers:
        nn.init.ones_(layer.conv.bias)
    x = torch.randn(64, block.layers[0].norm.num_features, 4, 6)
    new = block(x)[:, x.shape[1] :]
    assert set(new.flatten().tolist()) == {0.0, 2.0}
    assert 0.4 < float((new == 0).double().mean()) < 0.6
    assert torch.equal(new, new[:, :, :1, :1].expand_as(new))
    new.sum().backward()
    kept = new[:, :4, 0, 0].sum(0) * 24
    assert_close(block.layers[0].conv.bias.grad, kept, 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_revert_restores_every_module(name: str) -> None:
    model = MODELS[name][0]()
    before = [(id(m), type(m), set(vars(m))) for m in model.modules()]
    _convert(model)
    changed = [m for m in model.modules() if isinstance(m, effdense.conversion._Converted)]
    assert changed
    assert all(isinstance(m, type(m).original) for m in changed)
    assert effdense.revert(model) is model
    assert [(id(m), type(m), set(vars(m))) for m in model.modules()] == before


def _full_size(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    if name == "timm":
        return _package("timm").create_model("densenet121"), (2, 3, 64, 48)
    nets = _package("monai.networks.nets")
    return nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=2), (6, 1, 32, 32, 33)


@everywhere
@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm", "monai"])
def test_a_full_densenet121_equals_the_original(name: str) -> None:
    model, shape = _full_size(name)
    ours, naive = _pair(lambda: model)
    effdense.convert(ours)
    assert_same_step(step(ours, images(*shape)), step(naive, images(*shape)))


@everywhere
@pytest.mark.parametrize("save", [*effdense.SAVE_MODES, ("input", "bottlenecks")])
def test_save_modes_of_a_converted_model_equal_the_original(save: Any) -> None:
    ours, naive = _pair(_torchvision)
    effdense.convert(ours, save)
    x = images(2, 3, 37, 33)
    assert_same_step(step(ours, x), step(naive, x))
    assert stages_in(ours(x)) == (0 if save == "all" else 2)


@everywhere
@pytest.mark.parametrize("save", ["features", "input"])
@pytest.mark.parametrize("layer", [AppendingBottleneck, PrependingBottleneck, SingleLayer])
def test_either_order_of_concatenation_equals_the_original(layer: Any, save: Any) -> None:
    ours, naive = _pair(lambda: FlatNet(layer))
    effdense.convert(ours, save)
    x = images(3, 3, 8, 9)
    assert_same_step(step(ours, x), step(naive, x))


# ------------------------------------------------------------------------ dropout


@everywhere
def test_dropout_of_new_features_equals_the_original() -> None:
    ours, naive = _pair(lambda: _torchvision(drop_rate=0.3))
    effdense.convert(ours)
    x = images(2, 3, 35, 33)
    with shared_masks(5, (2, 3)):
        assert_same_step(step(ours, x), step(naive, x))


@everywhere
def test_channel_dropout_equals_the_original() -> None:
    ours, naive = _pair(lambda: _monai(3, dropout_prob=0.4, block_config=(3,)))
    effdense.convert(ours)
    x = images(4, 1, 18, 17, 16)
    torch.manual_seed(7)
    keys = iter(layer_keys(draw_seed(x.device), 3))

    def dropout(new: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        mask = new.new_empty(new.shape[:2])
        dropout_mask(next(keys), p, mask)
        return new * mask.view(*new.shape[:2], 1, 1, 1)

    with mock.patch.object(F, "dropout3d", dropout):
        expected = step(naive, x)
    torch.manual_seed(7)
    assert_same_step(step(ours, x), expected)
    assert stages_in(ours(x)) == 1


def _dropping_block(rate: float) -> nn.Module:
    """On its own: what a fused stage returns is laid out otherwise, and F.dropout looks at that."""
    layers = [DroppingBottleneck(3 + 4 * i, 4, rate) for i in range(3)]
    return nn.Sequential(Wrapped(layers), nn.Flatten(1), nn.Linear(15 * 9 * 7, 2))


@everywhere
def test_dropout_that_is_not_of_new_features_is_recomputed() -> None:
    ours, naive = _pair(lambda: _dropping_block(0.4))
    effdense.convert(ours)
    assert _recomputed_in(ours) == 1
    x = images(2, 3, 9, 7)
    assert_same_step(_random_step(ours, x), _random_step(naive, x))


@everywhere
def test_dropout_that_is_turned_on_later_is_seen() -> None:
    ours, naive = _pair(lambda: _dropping_block(0.0))
    effdense.convert(ours)
    x = images(2, 3, 9, 7)
    naive(x)
    assert stages_in(ours(x)) == 1
    for model in (ours, naive):
        for layer in model.modules():
            if isinstance(layer, DroppingBottleneck):
                layer.droprate = 0.4
    # no dense layer any more, but as much a chain of concatenations
    assert_same_step(_random_step(ours, x), _random_step(naive, x))
    assert "RecomputedBackward" in {type(node).__name__ for node in nodes_behind(ours(x))}


# ----------------------------------------------------------------- what is left alone


def _hook(block: Any) -> None:
    block.denselayer2.conv1.register_forward_hook(lambda m, i, o: 2 * o)


def _weight_norm(block: Any) -> None:
    parametrizations.weight_norm(block.denselayer2.conv2)


def _share_norm(block: Any) -> None:
    block.denselayer2.norm2 = block.denselayer1.norm2


def _replace_forward(block: Any) -> None:
    block.forward = lambda x: type(block).forward(block, 2 * x)


def _own_save(block: Any) -> None:
    block.save = lambda path: None


REFUSALS: dict[str, tuple[Callable[[Any], None], str]] = {
    "hook": (_hook, "conv1 has hooks"),
    "parametrised weight": (_weight_norm, "conv2 is parametrised"),
    "forward on the instance": (_replace_forward, "its forward is replaced on the instance"),
    "own attribute": (_own_save, "it has an attribute 'save' of its own"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_block_that_cannot_be_honoured_is_left_by_name(name: str) -> None:
    change, reason = REFUSALS[name]
    ours, naive = _pair(_torchvision)
    change(ours.get_submodule("features.denseblock2"))
    change(naive.get_submodule("features.denseblock2"))
    with pytest.warns(UserWarning, match=f"features.denseblock2: .*{reason}"):
        assert effdense.convert(ours) is ours
    x = images(2, 3, 37, 33)
    assert_same_step(step(ours, x), step(naive, x))
    assert stages_in(ours(x)) == 1
    report = effdense.conversion_report(effdense.revert(ours))
    assert [where for where, _ in report.left] == ["features.denseblock2"]
    assert reason in str(report)
    assert "features.denseblock1" in [where for where, _ in report.converted]


@pytest.mark.parametrize("name", ["hook", "parametrised weight"])
def test_a_block_that_stops_qualifying_takes_the_originals_forward(name: str) -> None:
    change, reason = REFUSALS[name]
    ours, naive = _pair(_torchvision)
    effdense.convert(ours)
    for model in (ours, naive):
        change(model.get_submodule("features.denseblock2"))
    x = images(2, 3, 37, 33)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = step(ours, x)
        ours(x)
    found = [str(w.message) for w in caught if "effdense" in str(w.message)]
    assert len(found) == 1
    assert "_DenseBlock runs layer by layer" in found[0]
    assert reason.split(" ")[0] in found[0]
    expected = step(naive, x)
    assert_same_step(actual, expected._replace(buffers=actual.buffers))


@everywhere
def test_shared_norms_are_recomputed_in_the_originals_order() -> None:
    ours, naive = _pair(_torchvision)
    for model in (ours, naive):
        _share_norm(model.get_submodule("features.denseblock2"))
    report = effdense.conversion_report(ours)
    assert "recomputed" in dict(report.converted)["features.denseblock2"]
    effdense.convert(ours)
    x = images(2, 3, 37, 33)
    assert_same_step(step(ours, x), step(naive, x))


@everywhere
def test_a_block_used_twice_equals_the_original() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(AppendingBottleneck(6, 3), AppendingBottleneck(9, 3))
            self.same = self.block
            self.back = nn.Conv2d(12, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.same(self.back(self.block(x)))

    ours, naive = _pair(Twice)
    report = effdense.conversion_report(ours)
    assert [name for name, _ in report.converted] == ["block"]
    effdense.convert(ours)
    assert_same_step(step(ours, images(2, 6, 5, 7)), step(naive, images(2, 6, 5, 7)))


def test_lookalikes_are_not_converted() -> None:
    ours, naive = _pair(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), WrongWidthChain(6, 3)))
    report = effdense.conversion_report(ours)
    assert report.converted == []
    assert "no chain of concatenations" in str(report)
    with pytest.warns(UserWarning, match="left as they are"):
        effdense.convert(ours)
    x = images(2, 3, 9, 9)
    assert torch.equal(ours(x), naive(x))


def test_a_report_changes_nothing() -> None:
    model = nn.Sequential(_torchvision(), UsersChain(5, 3, 2), WrongWidthChain(6, 3))
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    report = effdense.conversion_report(model)
    assert (len(report.converted), len(report.left)) == (5, 1)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before
    effdense.convert(model[0])
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    assert str(effdense.conversion_report(model)) == str(report)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before


@pytest.mark.parametrize("build", [torchvision.models.resnet18, torchvision.models.vgg11_bn])
def test_a_model_without_dense_blocks_is_unchanged_and_said_so(build: Any) -> None:
    model = build()
    types = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match="no dense block found"):
        assert effdense.convert(model) is model
    assert [type(m) for m in model.modules()] == types


def test_data_parallel_is_refused_naming_ddp() -> None:
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        effdense.convert(nn.DataParallel(_torchvision()))
    replica = effdense.convert(_torchvision().double())._replicate_for_data_parallel()
    replica._former_parameters = {}
    block = replica.features.denseblock1._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        block(images(2, 8, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save": "nothing"}, "save must be one of"),
        ({"save": ("features",)}, "a save mode for each of 2 blocks"),
        ({"backend": "tpu"}, "backend must be"),
    ],
)
def test_bad_arguments_raise_and_change_nothing(arguments: Any, message: str) -> None:
    model = _torchvision()
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        effdense.convert(model, **arguments)
    assert [type(m) for m in model.modules()] == types


def test_something_else_than_a_module_is_refused() -> None:
    with pytest.raises(ValueError, match="got str"):
        effdense.convert("densenet121")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.complex128, torch.int64])
def test_input_that_is_not_real_gives_the_originals_error(dtype: torch.dtype) -> None:
    ours, naive = _pair(_torchvision)
    effdense.convert(ours)
    x = torch.ones(2, 8, 8, 8, dtype=dtype)
    messages = []
    for model in (ours, naive):
        with pytest.raises(RuntimeError) as caught:
            model.get_submodule("features.denseblock1")(x)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_proofs_leave_random_numbers_and_parameters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FlatNet(AppendingBottleneck)
    seeded: list[int] = []
    for device in (torch.cuda, torch.mps, torch.xpu):
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(device, name, seeded.append, raising=False)
    before = copy.deepcopy(model.state_dict())
    proving._proofs.clear()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    seeded.clear()
    effdense.convert(model)
    assert torch.equal(torch.rand(3), expected)
    # a device's generator has nobody who would put it back
    assert seeded == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -------------------------------------------------------------------- works inside


@pytest.fixture(params=["torchvision", "new features first", "timm SiLU"])
def converted(request: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model of each kind, converted, and its original; and an input."""
    build, shape, *_ = MODELS[request.param]
    ours, naive = _pair(build)
    _convert(ours)
    return ours, naive, images(*shape)


def test_copies_pickles_and_state_dicts(converted: Any) -> None:
    ours, naive, x = converted
    expected = step(copy.deepcopy(naive), x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = [
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ]
    for model in copies:
        assert [type(m) for m in model.modules()] == [type(m) for m in ours.modules()]
        assert_same_step(step(model, x), expected)
        effdense.revert(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in naive.modules()]
    naive.load_state_dict(ours.state_dict())
    ours.load_state_dict(naive.state_dict())
    assert ours.state_dict()._metadata.keys() == naive.state_dict()._metadata.keys()


def test_converting_twice_changes_the_settings_only(converted: Any) -> None:
    ours, _, _ = converted
    types = [type(m) for m in ours.modules()]
    _convert(ours, "input", "torch")
    assert [type(m) for m in ours.modules()] == types
    assert {m.save for m in ours.modules() if isinstance(m, BlockForward)} == {"input"}


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compiled(converted: Any, training: bool) -> None:
    torch.compiler.reset()
    ours, naive, x = converted
    ours.train(training), naive.train(training)
    compiled = torch.compile(ours, backend="aot_eager")
    for _ in range(2):
        assert_same_step(step(ours, x, call=compiled), step(naive, x))


def test_exported(converted: Any) -> None:
    ours, naive, x = converted
    exported = torch.export.export(ours.eval(), (x,)).module()
    assert_close(exported(x), naive.eval()(x))


@pytest.mark.slow
def test_exported_to_onnx(tmp_path: Any) -> None:
    onnx = _package("onnx.reference")
    _package("onnxscript")
    ours, naive = _pair(_torchvision, torch.float32)
    effdense.convert(ours)
    ours.eval(), naive.eval()
    x = images(1, 3, 32, 32, dtype=torch.float32)
    path = tmp_path / "model.onnx"
    torch.onnx.export(ours, (x,), path, dynamo=True, verbose=False)
    session = onnx.ReferenceEvaluator(str(path))
    (found,) = session.run(None, {session.input_names[0]: x.numpy()})
    assert_close(torch.from_numpy(found), naive(x), 1e-4)


@everywhere
def test_freezing_and_unfreezing_between_steps(converted: Any) -> None:
    ours, naive, x = converted
    for frozen in (True, False):
        for model in (ours, naive):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not (frozen and "1" in name))
            model.train()
            if frozen:
                _freeze_norms(model)
        assert_same_step(step(ours, x), step(naive, x))


@everywhere
@pytest.mark.real_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_train_and_infer(converted: Any, dtype: torch.dtype) -> None:
    """How narrow results compare with the original's is in test_precision.py."""
    ours, _, x = converted
    ours.to(dtype)
    output = ours(x.to(dtype))
    assert output.dtype == dtype
    loss_of(output).backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)
    with torch.inference_mode():
        assert ours.eval()(x.to(dtype)).isfinite().all()


@pytest.fixture
def one_process(tmp_path: Any) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("when", ["before", "after"])
def test_data_distributed_parallel(converted: Any, when: str) -> None:
    ours, naive, x = converted
    if when == "after":
        effdense.revert(ours)
    parallel = DistributedDataParallel(ours)
    if when == "after":
        report = effdense.conversion_report(parallel)
        _convert(parallel)
        assert all(name.startswith("module.") for name, _ in report.converted)
    assert_same_step(step(ours, x, call=parallel), step(naive, x))


@pytest.mark.parametrize("when", ["before", "after"])
def test_synchronised_batch_norm_of_one_process(when: str) -> None:
    """What several make of it: test_synchronization.py."""
    ours, naive = _pair(_torchvision)
    synchronise = nn.SyncBatchNorm.convert_sync_batchnorm
    if when == "before":
        ours = synchronise(ours)
        assert not effdense.conversion_report(ours).left
        effdense.convert(ours)
    else:
        effdense.convert(ours)
        ours = synchronise(ours)
    x = images(2, 3, 37, 33)
    assert_same_step(step(ours, x), step(naive, x))
    assert stages_in(ours.eval()(x)) == 2
    ours.train()
    effdense.revert(ours)
    assert_same_step(step(ours, x), step(naive, x))


def test_a_hook_on_a_block_or_features_sees_what_it_saw() -> None:
    ours, naive = _pair(_torchvision)
    effdense.convert(ours)
    x = images(2, 3, 37, 33)
    seen: list[list[Tensor]] = []
    for model in (ours, naive):
        found: list[Tensor] = []
        for name in ("features.denseblock2", "features"):

            def see(m: Any, inputs: Any, output: Tensor, found: list[Tensor] = found) -> None:
                found.append(output.detach().clone())
                output.register_hook(found.append)

            model.get_submodule(name).register_forward_hook(see)
        loss_of(model(x)).backward()
        seen.append(found)
    assert len(seen[0]) == len(seen[1]) == 4
    for actual, expected in zip(*seen, strict=True):
        assert_close(actual, expected)
    assert stages_in(ours(x)) == 2


def test_blocks_called_by_keyword_or_sliced_out_of_features_work() -> None:
    ours, naive = _pair(_torchvision)
    effdense.convert(ours)
    x = images(2, 8, 9, 9)
    blocks: list[Any] = [m.get_submodule("features.denseblock1") for m in (ours, naive)]
    assert_close(blocks[0](init_features=x), blocks[1](init_features=x))
    parts: list[Any] = [m.get_submodule("features")[4:6] for m in (ours, naive)]  # type: ignore[index]
    assert_close(parts[0](x), parts[1](x))


def test_a_lightning_trainer_takes_a_step() -> None:
    lightning = _package("lightning")
    ours, naive = _pair(_torchvision, torch.float32)
    x, target = images(4, 3, 33, 33, dtype=torch.float32), torch.arange(4)

    class Task(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, target), 4)
    task = effdense.convert(Task(ours))
    assert "model.features.denseblock1" in dict(effdense.conversion_report(task).converted)
    options = {"max_steps": 1, "accelerator": "cpu", "logger": False, "barebones": True}
    lightning.Trainer(**options).fit(task, batches)
    lightning.Trainer(**options).fit(Task(naive), batches)
    assert ours.training
    for actual, expected in zip(ours.parameters(), naive.parameters(), strict=True):
        assert_close(actual, expected, 1e-3)
    assert_same_buffers(dict(ours.named_buffers()), dict(naive.named_buffers()), 1e-5)


def test_accelerate_style_wrapping_of_the_models_forward_works() -> None:
    ours, naive = _pair(_torchvision)
    forward = ours.forward
    ours.forward = lambda x: forward(x).float().double()
    effdense.convert(ours)
    x = images(2, 3, 37, 33)
    assert_close(ours(x), naive(x), 1e-6)
    assert stages_in(ours(x)) == 2


def test_a_model_on_meta_is_converted() -> None:
    proving._proofs.clear()
    with torch.device("meta"):
        model = _torchvision()
    report = effdense.conversion_report(model)
    assert len(report.converted) == 4
    assert all(p.is_meta for p in model.parameters())


def test_a_users_own_chain_is_recomputed() -> None:
    ours, naive = _pair(lambda: UsersChain(5, 3, 4))
    report = effdense.conversion_report(ours)
    effdense.convert(ours)
    assert dict(report.converted) == {"": "dense block, 4 layers, each recomputed in backward"}
    x = images(2, 5, 7, 6)
    assert_same_step(_random_step(ours, x), _random_step(naive, x))


# -------------------------------------------------------------------- command line


def test_the_report_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert-report", "torchvision.models:densenet121"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[0].split(maxsplit=2)[:2] == ["converted", "features.denseblock1"]
    main(["convert-report", "torchvision.models:resnet18"])
    assert capsys.readouterr().out == "no dense block found\n"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("torchvision.models", "expected MODULE:CALLABLE"),
        ("no_such_module:model", "No module named 'no_such_module'"),
        ("torchvision.models:no_such_model", "no_such_model"),
        ("torch:__version__", "can't be called"),
        ("torch:rand", "failed"),
        ("builtins:dict", "returned a dict, not a torch.nn.Module"),
        ("./models/net.py:model", "is what import takes, not a file, such as net"),
        (".net:model", "is what import takes, not a file, such as net"),
        ("misspelled_module:model", "importing misspelled_module failed: SyntaxError: "),
        ("broken_module:model", "importing broken_module failed: RuntimeError: no licence"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    argument: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "misspelled_module.py").write_text("def model(:\n")
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as status:
        main(["convert-report", argument])
    assert status.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
