"""Same outputs, gradients and buffers as the naive network, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import effdense
from effdense import SAVE_MODES, reference
from tests.helpers.compare import (
    SMALL,
    assert_close,
    assert_identical,
    assert_same_buffers,
    assert_same_step,
    images,
    loss_of,
    norms_of,
    randomize_norms,
    shared_masks,
    stages_in,
    step,
    twins,
)
from tests.helpers.places import placed

pytestmark = pytest.mark.usefixtures("each_place", "nan_filled_memory")

saves = pytest.mark.parametrize("save", SAVE_MODES)
fused_saves = pytest.mark.parametrize("save", [s for s in SAVE_MODES if s != "all"])


ARCHITECTURES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "bottleneck 1-D": ({"spatial_dims": 1}, (3, 3, 19)),
    "bottleneck 2-D": ({}, (3, 3, 9, 7)),
    "bottleneck 3-D": ({"spatial_dims": 3}, (2, 3, 5, 4, 7)),
    "no bottleneck 1-D": ({"spatial_dims": 1, "bn_size": None}, (3, 3, 19)),
    "no bottleneck 2-D": ({"bn_size": None}, (3, 3, 9, 7)),
    "no bottleneck 3-D": ({"spatial_dims": 3, "bn_size": None}, (2, 3, 5, 4, 7)),
    "ImageNet stem 1-D": ({"small_inputs": False, "spatial_dims": 1}, (2, 3, 53)),
    "ImageNet stem 2-D": ({"small_inputs": False}, (2, 3, 37, 30)),
    "ImageNet stem 3-D": ({"small_inputs": False, "spatial_dims": 3}, (2, 3, 17, 13, 15)),
    "three blocks": ({"block_config": (2, 1, 3)}, (2, 3, 13, 15)),
    "one block": ({"block_config": (3,)}, (2, 3, 5, 5)),
    "first block empty": ({"block_config": (0, 2)}, (2, 3, 6, 6)),
    "last block empty": ({"block_config": (2, 0)}, (2, 3, 6, 6)),
    "all blocks empty": ({"block_config": (0, 0)}, (2, 3, 6, 6)),
    # Not bn_size 1: the gradient of a single bottleneck's bias is, for a norm weight of zero,
    # a sum that cancels, and its relative error as large as the machine's rounding makes it.
    "growth rate 1": ({"growth_rate": 1, "bn_size": 2}, (2, 3, 6, 6)),
    "compression 1": ({"compression": 1.0}, (2, 3, 6, 6)),
    "compression 0.3": ({"compression": 0.3}, (2, 3, 6, 6)),
    "one input channel": ({"in_channels": 1}, (2, 1, 6, 6)),
    "batch of one": ({}, (1, 3, 6, 6)),
    "one position per image": ({"block_config": (2,)}, (5, 3, 1, 1)),
    "several steps and slabs": ({}, (6, 3, 96, 97)),
    "an image larger than a slab": ({}, (1, 3, 257, 255)),
    "images of one tile and a part": (
        {"block_config": (2,), "num_init_features": 320, "bn_size": 1},
        (7, 3, 33, 31),
    ),
}


@saves
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_step_equals_naive(name: str, save: str) -> None:
    config, shape = ARCHITECTURES[name]
    ours, naive = twins(save, **config)
    assert_same_step(step(ours, images(*shape)), step(naive, images(*shape)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_eval_equals_naive(name: str) -> None:
    config, shape = ARCHITECTURES[name]
    ours, naive = twins(prepare=nn.Module.eval, **config)
    assert_same_step(step(ours, images(*shape)), step(naive, images(*shape)))
    with torch.no_grad():
        assert_close(ours(images(*shape)), naive(images(*shape)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_block_runs_fused(name: str) -> None:
    config, shape = ARCHITECTURES[name]
    ours, _ = twins(**config)
    assert stages_in(ours(images(*shape))) == len((SMALL | config)["block_config"])


def test_save_all_runs_plain() -> None:
    assert stages_in(twins("all")[0](images(2, 3, 6, 6))) == 0


@saves
@pytest.mark.parametrize("bn_size", [4, None])
def test_dropout_equals_naive_with_the_same_masks(save: str, bn_size: int | None) -> None:
    config = {"bn_size": bn_size, "drop_rate": 0.3, "block_config": (2, 1, 3)}
    ours, naive = twins(save, **config)  # type: ignore[arg-type]
    x = images(3, 3, 9, 11)
    with shared_masks(7, config["block_config"]):  # type: ignore[arg-type]
        assert_same_step(step(ours, x), step(naive, x))
        ours.eval(), naive.eval()
        assert_same_step(step(ours, x), step(naive, x))


def test_dropout_drops_the_asked_fraction_of_new_features() -> None:
    block = placed(effdense.DenseBlock(reference.dense_layers(1, 4, 8, 2, 0.3)))
    kept = block(placed(torch.randn(8, 4, 32, 32)))[:, 4:] != 0
    assert ((kept.double().mean((0, 2, 3)) - 0.7).abs() < 0.03).all()


def test_layers_and_forwards_drop_independently() -> None:
    block = placed(effdense.DenseBlock(reference.dense_layers(3, 4, 8, 2, 0.5)))
    first = block(placed(torch.randn(4, 4, 16, 16)))[:, 4:] != 0
    again = block(placed(torch.randn(4, 4, 16, 16)))[:, 4:] != 0
    masks = [*first.split(8, 1), *again.split(8, 1)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).double().mean().item() - 0.5) < 0.03


def _freeze(pattern: str) -> Callable[[nn.Module], None]:
    def freeze(model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and pattern in name:
                module.eval()

    return freeze


def _set(attribute: str, value: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for norm in norms_of(model):
            setattr(norm, attribute, value)

    return change


def _untracked(model: nn.Module) -> None:
    for norm in norms_of(model)[::2]:
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        norm.track_running_stats = False


def _mixed(model: nn.Module) -> None:
    momenta = (None, 0.0, 1.0, 0.3)
    for i, norm in enumerate(norms_of(model)):
        norm.momentum = momenta[i % 4]
        norm.train(i % 3 != 0)


def _without_counter(model: nn.Module) -> None:
    for norm in norms_of(model):
        norm.num_batches_tracked = None


NORMS: dict[str, Callable[[nn.Module], object]] = {
    "first layers' norms frozen": _freeze("denselayer1."),
    "norm1 frozen": _freeze("norm1"),
    "norm2 frozen": _freeze("norm2"),
    "transition frozen": _freeze("transition1"),
    "stem frozen": _freeze("norm0"),
    "last norm frozen": _freeze("norm5"),
    "all norms frozen": _freeze(""),
    "momentum None": _set("momentum", None),
    "momentum 0": _set("momentum", 0.0),
    "no running statistics": _untracked,
    "tracking switched off": _set("track_running_stats", False),
    "no batch counter": _without_counter,
    "modes and momenta mixed": _mixed,
    "one layer in eval": lambda model: model.features.denseblock2.denselayer2.eval(),  # type: ignore[union-attr]
    "one block in eval": lambda model: model.features.denseblock1.eval(),  # type: ignore[union-attr]
}


@saves
@pytest.mark.parametrize("name", NORMS)
def test_norm_settings_equal_naive(name: str, save: str) -> None:
    ours, naive = twins(save, prepare=NORMS[name], small_inputs=False, drop_rate=0.2)
    x = images(3, 3, 29, 27)
    for _ in range(3):
        with shared_masks(3, (2, 3)):
            assert_same_step(step(ours, x), step(naive, x))


@pytest.mark.parametrize("name", NORMS)
def test_norm_settings_equal_naive_in_eval(name: str) -> None:
    ours, naive = twins(prepare=NORMS[name], small_inputs=False)
    ours.eval(), naive.eval()
    assert_same_step(step(ours, images(3, 3, 29, 27)), step(naive, images(3, 3, 29, 27)))


INPUTS: dict[str, Callable[[], Tensor]] = {
    "channels-last": lambda: images(3, 3, 8, 7).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: images(3, 3, 8, 7).transpose(2, 3),
    "strided": lambda: images(3, 3, 16, 14)[:, :, ::2, ::2],
    "expanded": lambda: images(3, 1, 8, 7).expand(3, 3, 8, 7),
    "batch innermost": lambda: images(3, 8, 7, 3).movedim(-1, 0),
}


@fused_saves
@pytest.mark.parametrize("name", INPUTS)
def test_input_layouts_equal_naive(name: str, save: str) -> None:
    ours, naive = twins(save)
    assert_same_step(step(ours, INPUTS[name]()), step(naive, INPUTS[name]()))


@fused_saves
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_channels_last_weights_equal_naive(dims: int, save: str) -> None:
    ours, naive = twins(save, spatial_dims=dims)
    if dims > 1:
        layout = torch.channels_last if dims == 2 else torch.channels_last_3d
        ours = ours.to(memory_format=layout)
    x = images(2, 3, *[6] * dims)
    assert_same_step(step(ours, x), step(naive, x))


@saves
def test_input_without_gradient_equals_naive(save: str) -> None:
    ours, naive = twins(save)
    x = images(3, 3, 8, 7)
    assert_same_step(step(ours, x, input_grad=False), step(naive, x, input_grad=False))


@fused_saves
@pytest.mark.parametrize("bn_size", [4, None])
@pytest.mark.parametrize("seed", range(6))
def test_random_subsets_of_trained_parameters_equal_naive(
    seed: int, bn_size: int | None, save: str
) -> None:
    ours, naive = twins(save, bn_size=bn_size, small_inputs=False)
    generator = torch.Generator().manual_seed(seed)
    share = (0.1, 0.5, 0.9)[seed % 3]
    chosen = (torch.rand(len(list(naive.parameters())), generator=generator) < share).tolist()
    for model in (ours, naive):
        for parameter, trained in zip(model.parameters(), chosen, strict=True):
            parameter.requires_grad_(trained)
        model.classifier.bias.requires_grad_(True)
    x, input_grad = images(3, 3, 29, 27), seed % 2 == 0
    assert_same_step(step(ours, x, input_grad=input_grad), step(naive, x, input_grad=input_grad))


@fused_saves
@pytest.mark.parametrize("kind", ["input only", "first convolution", "one norm", "last block"])
def test_a_single_trained_part_equals_naive(kind: str, save: str) -> None:
    ours, naive = twins(save)
    for model in (ours, naive):
        features: Any = model.requires_grad_(False).features
        part = {
            "first convolution": features.conv0,
            "one norm": features.denseblock1.denselayer2.norm2,
            "last block": features.denseblock2,
        }.get(kind)
        if part is not None:
            part.requires_grad_(True)
    x, input_grad = images(3, 3, 8, 7), kind == "input only"
    assert_same_step(step(ours, x, input_grad=input_grad), step(naive, x, input_grad=input_grad))


@fused_saves
def test_several_optimizer_steps_equal_naive(save: str) -> None:
    ours, naive = twins(save, drop_rate=0.1)
    optimizers = [
        torch.optim.SGD(m.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
        for m in (ours, naive)
    ]
    for i in range(5):
        x = images(4, 3, 8, 8, seed=10 + i)
        with shared_masks(i, (2, 3)):
            assert_same_step(step(ours, x), step(naive, x), 1e-9)
        for optimizer in optimizers:
            optimizer.step()
    for (name, actual), expected in zip(ours.named_parameters(), naive.parameters(), strict=True):
        assert_close(actual, expected, 1e-9, name)


def test_two_forwards_before_one_backward_equal_naive() -> None:
    ours, naive = twins()

    def siamese(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x) * model(x.flip(0) * 2)

    x = images(3, 3, 8, 7)
    assert_same_step(step(ours, x, call=siamese(ours)), step(naive, x, call=siamese(naive)))


def test_gradients_accumulate_over_backwards() -> None:
    ours, naive = twins()
    for model in (ours, naive):
        for seed in (1, 2):
            loss_of(model(images(3, 3, 8, 7, seed=seed))).backward()
    for actual, expected in zip(ours.parameters(), naive.parameters(), strict=True):
        assert actual.grad is not None
        assert expected.grad is not None
        assert_close(actual.grad, expected.grad)


def test_tied_weights_equal_naive() -> None:
    def tie(model: Any) -> None:
        block = model.features.denseblock2
        block.denselayer1.conv2.weight = block.denselayer3.conv2.weight
        block.denselayer2.norm2.weight = block.denselayer1.norm2.bias

    ours, naive = twins(prepare=tie)
    assert_same_step(step(ours, images(3, 3, 8, 7)), step(naive, images(3, 3, 8, 7)))


def test_ties_in_the_stem_pooling_equal_naive() -> None:
    def coarse(model: Any) -> None:
        model.features.conv0.weight.data.mul_(20).round_().clamp_(-1, 1)

    ours, naive = twins(prepare=coarse, small_inputs=False)
    x = images(2, 3, 31, 31).round().clamp(0, 1)
    assert_same_step(step(ours, x), step(naive, x))


def _blocks(bn_size: int | None, **arguments: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    naive = reference.DenseBlock(reference.dense_layers(3, 5, 4, bn_size)).double()
    ours = effdense.DenseBlock(reference.dense_layers(3, 5, 4, bn_size)).double()
    randomize_norms(naive)
    randomize_norms(ours)
    ours.load_state_dict(naive.state_dict())
    for name, value in arguments.items():
        setattr(ours, name, value)
    return placed(ours), placed(naive)


@saves
@pytest.mark.parametrize("bn_size", [2, None])
def test_a_block_alone_equals_naive(bn_size: int | None, save: str) -> None:
    ours, naive = _blocks(bn_size, save=save)
    assert_same_step(step(ours, images(3, 5, 7, 6)), step(naive, images(3, 5, 7, 6)))


@fused_saves
@pytest.mark.parametrize("bn_size", [2, None])
def test_a_block_alone_passes_gradcheck(bn_size: int | None, save: str) -> None:
    ours, _ = _blocks(bn_size, save=save)
    names = [name for name, _ in ours.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(ours, dict(zip(names, parameters, strict=True)), (x,))

    x = images(2, 5, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *ours.parameters()), fast_mode=True)


def test_an_expanded_output_gradient_equals_naive() -> None:
    ours, naive = _blocks(2)
    x = images(3, 5, 7, 6)
    gradients = []
    for block in (ours, naive):
        leaf = x.clone().requires_grad_()
        # a sum's gradient is one element, expanded
        block(leaf).sum(1).square().sum().backward()
        gradients.append(leaf.grad)
    assert_close(gradients[0], gradients[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 6, 6, 8), (2, 6, 7, 5), (1, 6, 2, 2), (1, 6, 3, 2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_transition_alone_equals_naive(shape: tuple[int, ...], channels_last: bool) -> None:
    torch.manual_seed(0)
    naive = placed(reference.Transition(6, 3).double())
    ours = placed(effdense.Transition(6, 3).double())
    randomize_norms(naive)
    randomize_norms(ours)
    ours.load_state_dict(naive.state_dict())
    x = images(*shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_same_step(step(ours, x), step(naive, x))
    assert stages_in(ours(x)) == 1


@saves
def test_features_called_alone_equal_naive(save: str) -> None:
    ours, naive = twins(save, small_inputs=False)
    x = images(2, 3, 37, 30)
    assert_same_step(step(ours, x, call=ours.features), step(naive, x, call=naive.features))


@pytest.mark.parametrize("save", ["features", "input"])
@pytest.mark.parametrize(
    "module", ["", "conv0", "norm0", "relu0", "pool0", "denseblock1", "transition1", "norm5"]
)
def test_hooks_see_what_they_see_in_the_naive_network(module: str, save: str) -> None:
    ours, naive = twins(save, small_inputs=False)
    seen: list[list[Tensor]] = []
    steps = []
    for model in (ours, naive):
        found: list[Tensor] = []
        target = model.features.get_submodule(module)

        def see(m: nn.Module, inputs: Any, output: Tensor, found: list[Tensor] = found) -> None:
            found.append(output.detach().clone())
            output.register_hook(found.append)

        target.register_forward_hook(see)
        steps.append(step(model, images(2, 3, 37, 30)))
        seen.append(found)
    assert_same_step(steps[0], steps[1])
    assert len(seen[0]) == len(seen[1]) == 2
    for actual, expected in zip(*seen, strict=True):
        assert_close(actual, expected)


def test_grad_cam_keeps_the_blocks_fused() -> None:
    ours, _ = twins()
    activations: list[Tensor] = []
    for name in ("denseblock1", "transition1", "denseblock2"):
        ours.features.get_submodule(name).register_forward_hook(
            lambda m, i, o: activations.append(o)
        )
    output = ours(images(2, 3, 8, 8))
    gradients = torch.autograd.grad(output[:, 1].sum(), activations)
    assert [g.shape for g in gradients] == [a.shape for a in activations]
    assert stages_in(output) == 3


@saves
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_step_equals_torchvision(save: str, drop_rate: float) -> None:
    arguments: dict[str, Any] = {
        "growth_rate": 8,
        "block_config": (2, 3),
        "num_init_features": 16,
        "num_classes": 7,
        "drop_rate": drop_rate,
    }
    torch.manual_seed(0)
    theirs = placed(torchvision.models.DenseNet(**arguments).double())
    ours = placed(effdense.DenseNet(**arguments, save=save).double())  # type: ignore[arg-type]
    randomize_norms(theirs)
    randomize_norms(ours)
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 3, 35, 33)
    with shared_masks(5, (2, 3)):
        assert_same_step(step(ours, x), step(theirs, x))


def test_step_equals_torchvision_densenet121() -> None:
    torch.manual_seed(0)
    theirs = placed(torchvision.models.densenet121().double())
    ours = placed(effdense.densenet121().double())
    # Fresh norms would make norm0's weight gradient zero up to rounding: its ReLU, pooling
    # and the batch norms after it don't see a channel's scale.
    randomize_norms(theirs)
    randomize_norms(ours)
    ours.load_state_dict(theirs.state_dict())
    assert_same_step(step(ours, images(2, 3, 64, 64)), step(theirs, images(2, 3, 64, 64)))


@pytest.mark.parametrize("bn_size", [4, None])
@pytest.mark.parametrize("other", ["bottlenecks", "input"])
def test_save_modes_agree_bit_for_bit(other: str, bn_size: int | None) -> None:
    results = []
    for save in ("features", other):
        ours, _ = twins(save, bn_size=bn_size, drop_rate=0.2, dtype=torch.float32)
        torch.manual_seed(3)
        results.append(step(ours, images(5, 3, 33, 31, dtype=torch.float32)))
    assert_identical(*results)


@saves
def test_two_runs_with_one_seed_agree_bit_for_bit(save: str) -> None:
    results = []
    for _ in range(2):
        ours, _ = twins(save, drop_rate=0.2, small_inputs=False, dtype=torch.float32)
        torch.manual_seed(3)
        results.append(step(ours, images(5, 3, 65, 63, dtype=torch.float32)))
    assert_identical(*results)


@fused_saves
def test_forward_without_gradients_moves_buffers_as_naive(save: str) -> None:
    ours, naive = twins(save, small_inputs=False)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_close(ours(images(2, 3, 37, 30)), naive(images(2, 3, 37, 30)))
    assert_same_buffers(dict(ours.named_buffers()), dict(naive.named_buffers()))
