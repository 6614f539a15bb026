"""What a Function that owns its buffer could get wrong: in-place changes, second backwards,
saved-tensor hooks, recomputation, copies, transforms, compilers and data parallelism.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import effdense
from effdense import SAVE_MODES, reference
from tests.helpers.compare import (
    SMALL,
    Step,
    assert_close,
    assert_identical,
    assert_same_buffers,
    assert_same_step,
    images,
    loss_of,
    randomize_norms,
    shared_masks,
    step,
    twins,
)
from tests.helpers.places import place, placed

pytestmark = pytest.mark.usefixtures("device")

fused_saves = pytest.mark.parametrize("save", [s for s in SAVE_MODES if s != "all"])


def _block(save: str = "features") -> effdense.DenseBlock:
    torch.manual_seed(0)
    block = effdense.DenseBlock(reference.dense_layers(2, 5, 4, 2)).double()
    randomize_norms(block)
    block.save = save  # type: ignore[assignment]
    return placed(block)


# ---------------------------------------------------------------- in-place changes


@fused_saves
@pytest.mark.parametrize(
    "name",
    [
        "features.conv0.weight",
        "features.denseblock1.denselayer2.norm1.weight",
        "features.denseblock1.denselayer2.norm2.bias",
        "features.denseblock2.denselayer1.conv1.weight",
        "features.denseblock2.denselayer3.conv2.weight",
        "features.transition1.norm.weight",
        "features.transition1.conv.weight",
        "features.norm0.weight",
        "features.norm5.bias",
    ],
)
def test_a_parameter_changed_in_place_before_backward_raises(name: str, save: str) -> None:
    ours, _ = twins(save, small_inputs=False)
    loss = loss_of(ours(images(2, 3, 37, 30)))
    with torch.no_grad():
        ours.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@fused_saves
def test_a_blocks_output_changed_in_place_before_backward_changes_nothing(save: str) -> None:
    """As the original's, whose concatenation backward doesn't ask for."""
    x = images(2, 5, 6, 6)
    expected = step(_block(save), x).input_gradient
    leaf = x.clone().requires_grad_()
    output = _block(save)(leaf)
    loss = loss_of(output)
    output.detach().mul_(2)
    loss.backward()
    assert leaf.grad is not None
    assert expected is not None
    assert torch.equal(leaf.grad, expected)


@fused_saves
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_input_changed_in_place_before_backward_raises_or_changes_nothing(
    save: str, layout: torch.memory_format
) -> None:
    x = images(2, 5, 6, 6).contiguous(memory_format=layout)
    expected = step(_block(save), x)
    block, leaf = _block(save), x.clone().requires_grad_()
    loss = loss_of(block(leaf))
    with torch.no_grad():
        leaf.mul_(3)
    if save == "input":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        loss.backward()
        assert leaf.grad is not None
        assert expected.input_gradient is not None
        assert torch.equal(leaf.grad, expected.input_gradient)


def test_a_transitions_input_changed_in_place_raises_where_it_is_not_copied() -> None:
    transition = placed(effdense.Transition(5, 3).double())
    x = images(2, 5, 6, 6)
    expected = step(transition, x)
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=layout).requires_grad_()
        loss = loss_of(transition(leaf))
        leaf.detach().mul_(3)
        if layout == torch.channels_last:
            with pytest.raises(RuntimeError, match=r"modified inplace|inplace operation"):
                loss.backward()
        else:
            loss.backward()
            assert leaf.grad is not None
            assert expected.input_gradient is not None
            assert torch.equal(leaf.grad, expected.input_gradient)


def test_the_callers_gradient_is_not_changed() -> None:
    block = _block()
    output = block(images(2, 5, 6, 6).requires_grad_())
    gradient = images(*output.shape, seed=3).contiguous(memory_format=torch.channels_last)
    before = gradient.clone()
    output.backward(gradient)
    assert torch.equal(gradient, before)


@fused_saves
def test_running_statistics_may_move_between_forward_and_backward(save: str) -> None:
    ours, naive = twins(save)
    x = images(2, 3, 8, 8)
    losses = [loss_of(model(x)) for model in (ours, naive)]
    for model in (ours, naive):
        with torch.no_grad():
            model(images(2, 3, 8, 8, seed=5))
    for loss in losses:
        loss.backward()
    for actual, expected in zip(ours.parameters(), naive.parameters(), strict=True):
        assert actual.grad is not None
        assert expected.grad is not None
        assert_close(actual.grad, expected.grad)


# ---------------------------------------------------------------- several backwards


@fused_saves
def test_a_second_backward_raises_without_retain_graph(save: str) -> None:
    loss = loss_of(twins(save, small_inputs=False)[0](images(2, 3, 37, 30)))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@fused_saves
@pytest.mark.parametrize("bn_size", [4, None])
def test_a_second_backward_with_retain_graph_repeats_the_first(
    save: str, bn_size: int | None
) -> None:
    ours, _ = twins(save, small_inputs=False, drop_rate=0.2, bn_size=bn_size)
    loss = loss_of(ours(images(2, 3, 37, 30)))
    first = torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(ours.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("small_inputs", [True, False])
def test_double_backward_raises(small_inputs: bool) -> None:
    ours, _ = twins(small_inputs=small_inputs)
    x = images(2, 3, 37, 30).requires_grad_()
    (gradient,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


def _alone(kind: str) -> nn.Module:
    """What runs in linear memory, without anything behind that could notice."""
    torch.manual_seed(0)
    if kind == "any layers":
        layer = nn.Sequential(nn.Conv2d(5, 3, 3, padding=1), nn.Tanh())
        return placed(effdense.DenseBlock([layer]).double())
    if kind == "transition":
        return placed(effdense.Transition(5, 4).double())
    if kind == "stem":
        return placed(effdense.DenseNet(**SMALL | {"small_inputs": False}).double().features[:4])
    return _block("bottlenecks" if kind == "bottlenecks" else "features")


@pytest.mark.parametrize("kind", ["features", "bottlenecks", "any layers", "transition", "stem"])
def test_no_second_derivative_is_left_out_in_silence(kind: str) -> None:
    """Behind a loss that is linear in the output, and beside a path that has one."""
    module = _alone(kind)
    x = images(2, 3 if kind == "stem" else 5, 13, 12).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return module(x).sum() + x.pow(3).sum()

    expected = torch.autograd.grad(loss(x), [x, *module.parameters()])
    found = torch.autograd.grad(loss(x), [x, *module.parameters()], create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for gradient in found:
        with pytest.raises(RuntimeError, match=r'no second derivatives.*save="all"'):
            torch.autograd.grad(gradient.square().sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.functional.hvp(loss, x.detach(), torch.ones_like(x))


def test_an_unused_output_costs_no_backward() -> None:
    block = _block()
    output = block(images(2, 5, 6, 6).requires_grad_())
    (output.detach().sum() + block.get_parameter("denselayer1.norm1.weight").sum()).backward()
    assert block.get_parameter("denselayer1.conv1.weight").grad is None


# ---------------------------------------------------------------- saved tensors


def _saved_storages(model: nn.Module, x: Tensor) -> list[tuple[int, int]]:
    """(storage, bytes) of every tensor saved for backward, parameters and input left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    alive, saved = [], []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in own:
            saved.append((storage.data_ptr(), storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return saved


@pytest.mark.real_device
@fused_saves
def test_saved_tensor_hooks_see_each_buffer_once_and_whole(save: str) -> None:
    ours, _ = twins(save, small_inputs=False)
    x = images(2, 3, 64, 64)
    saved = _saved_storages(ours, x)
    large = [(pointer, size) for pointer, size in saved if size > 8 * 2 * 100]
    assert len({pointer for pointer, _ in large}) == len(large)
    # positions x channels of block 1 and block 2
    features = [2 * 16 * 16 * (6 + 2 * 4), 2 * 8 * 8 * (7 + 3 * 4)]
    expected = sorted(8 * n for n in features)
    if save in ("features", "slabs"):
        assert sorted(size for _, size in large) == expected
    elif save == "bottlenecks":
        # and the first convolution's output
        expected += [8 * 2 * 16 * 16 * 16] * 2 + [8 * 2 * 8 * 8 * 16] * 3 + [8 * 2 * 32 * 32 * 6]
        assert sorted(size for _, size in large) == sorted(expected)
    else:
        inputs = [2 * 16 * 16 * 6, 2 * 8 * 8 * 7]
        assert sum(size for _, size in large) == 8 * sum(inputs)


@fused_saves
def test_features_offloaded_to_host_memory_give_the_same_gradients(save: str) -> None:
    ours, _ = twins(save, small_inputs=False)
    x = images(2, 3, 37, 30)
    expected = step(copy.deepcopy(ours), x)
    with torch.autograd.graph.save_on_cpu():
        assert_identical(step(ours, x), expected)


@pytest.mark.real_device
@fused_saves
def test_hooks_that_do_not_keep_strides_give_the_same_gradients(save: str) -> None:
    ours, _ = twins(save, small_inputs=False)
    x = images(2, 3, 37, 30)
    expected = step(copy.deepcopy(ours), x)

    def pack(tensor: Tensor) -> bytes:
        file = io.BytesIO()
        torch.save(tensor.detach().contiguous().clone(), file)
        return file.getvalue()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda b: torch.load(io.BytesIO(b))):
        # not bit for bit: torch's own classifier multiplies by another layout
        assert_same_step(step(ours, x), expected, 1e-12)


@pytest.mark.real_device
def test_forward_without_gradients_saves_nothing() -> None:
    ours, _ = twins()
    with torch.no_grad():
        assert _saved_storages(ours, images(2, 3, 8, 8)) == []
    with torch.inference_mode():
        assert _saved_storages(ours, images(2, 3, 8, 8)) == []


@fused_saves
def test_no_reference_cycle_keeps_a_graph_alive(save: str) -> None:
    ours, _ = twins(save, small_inputs=False)
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            seen: list[weakref.ref[Tensor]] = []

            def pack(tensor: Tensor, seen: list[weakref.ref[Tensor]] = seen) -> Tensor:
                seen.append(weakref.ref(tensor))
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = ours(images(2, 3, 37, 30))
            own = {id(t) for t in [*ours.parameters(), *ours.buffers()]}
            assert any(ref() is not None and id(ref()) not in own for ref in seen)
            if backward:
                output.sum().backward()
            del output
            assert all(ref() is None or id(ref()) in own for ref in seen)
    finally:
        gc.enable()


# ---------------------------------------------------------------- copies and transforms


@pytest.mark.real_device
def test_a_model_copies_pickles_and_moves_after_a_step() -> None:
    ours, _ = twins(small_inputs=False)
    x = images(2, 3, 37, 30)
    step(ours, x)
    expected = step(copy.deepcopy(ours), x)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    copies.append(copy.deepcopy(ours).to("meta").to_empty(device=place()))
    copies[-1].load_state_dict(ours.state_dict())
    for model in copies:
        assert_identical(step(model, x), expected)
    assert not any(isinstance(v, Tensor) for m in ours.modules() for v in vars(m).values())


@pytest.mark.real_device
def test_moving_between_precisions_keeps_working() -> None:
    ours, _ = twins()
    ours.float()(images(2, 3, 8, 8, dtype=torch.float32)).sum().backward()
    assert ours.double()(images(2, 3, 8, 8)).dtype == torch.float64


def test_functional_call_differentiates_the_given_parameters() -> None:
    ours, naive = twins()
    results = []
    for model in (ours, naive):
        scaled = {n: (p * 1.1).detach().requires_grad_() for n, p in model.named_parameters()}
        output = torch.func.functional_call(model, scaled, (images(2, 3, 8, 8),))
        results.append(torch.autograd.grad(loss_of(output), list(scaled.values())))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev"])
def test_function_transforms_raise(transform: str) -> None:
    ours, _ = twins(prepare=nn.Module.eval)
    x = images(2, 3, 8, 8)

    def scalar(x: Tensor) -> Tensor:
        return ours(x).sum()

    calls: dict[str, Callable[[], object]] = {
        "grad": lambda: torch.func.grad(scalar)(x),
        "vmap": lambda: torch.func.vmap(ours)(x.unsqueeze(0)),
        "jvp": lambda: torch.func.jvp(ours, (x,), (x,)),
        "jacrev": lambda: torch.func.jacrev(ours)(x),
    }
    with pytest.raises(RuntimeError):
        calls[transform]()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_forward_mode_differentiation_raises() -> None:
    ours, _ = twins()
    x = images(2, 3, 8, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises((RuntimeError, NotImplementedError)):
            ours(dual)


# ---------------------------------------------------------------- outer checkpoints


@fused_saves
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["model", "block"])
def test_an_outer_checkpoint_changes_nothing(part: str, reentrant: bool, save: str) -> None:
    config: dict[str, Any] = {"small_inputs": False, "drop_rate": 0.3, "block_config": (2, 3)}
    ours, naive = twins(save, **config)
    x = images(3, 3, 29, 27)
    if part == "model":
        whole = ours

        def call(x: Tensor) -> Tensor:
            output = checkpoint(whole, x, use_reentrant=reentrant)
            assert isinstance(output, Tensor)
            return output
    else:
        for name in ("denseblock1", "denseblock2"):
            block: Any = ours.features.get_submodule(name)
            inner = block.forward

            def run(x: Tensor, inner: Any = inner) -> Any:
                return checkpoint(inner, x, use_reentrant=reentrant)

            block.forward = run
        call = ours
    with shared_masks(3, (2, 3)):
        assert_same_step(step(ours, x, call=call), step(naive, x))


# ---------------------------------------------------------------- compilers and tracers


@pytest.mark.only_cpu
@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
def test_a_compiled_model_equals_naive(backend: str, training: bool) -> None:
    torch.compiler.reset()
    ours, naive = twins(small_inputs=False)
    ours.train(training), naive.train(training)
    x = images(2, 3, 37, 30)
    compiled = torch.compile(ours, backend=backend)
    for _ in range(2):
        assert_same_step(step(ours, x, call=compiled), step(naive, x))


@pytest.mark.only_cpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("converted", [False, True])
def test_compiling_for_two_sizes_meets_no_limit(converted: bool, caplog: Any) -> None:
    """What is compiled depends on no block, of which there may be more than dynamo's limit."""
    torch.compiler.reset()
    config: dict[str, Any] = {"block_config": (1, 1, 1, 1, 1)}
    ours, naive = twins(**config)
    model = effdense.convert(copy.deepcopy(naive)) if converted else ours
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings(), caplog.at_level("WARNING", "torch._dynamo"):
        warnings.filterwarnings("error", ".*recompile")
        for size in (32, 48, 32):
            x = images(2, 3, size, size)
            with torch.no_grad():
                assert_close(compiled(x), naive(x))
    assert "recompile_limit" not in caplog.text


@pytest.mark.only_cpu
@pytest.mark.parametrize("config", [{}, {"small_inputs": False}, {"bn_size": None}])
def test_export_gives_the_same_function(config: dict[str, Any]) -> None:
    ours, _ = twins(prepare=nn.Module.eval, **config)
    x = images(2, 3, 37, 30)
    exported = torch.export.export(ours, (x,)).module()
    assert_close(exported(x), ours(x))


@pytest.mark.only_cpu
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("config", [{}, {"small_inputs": False}, {"bn_size": None}])
def test_trace_gives_the_same_function(config: dict[str, Any]) -> None:
    ours, _ = twins(prepare=nn.Module.eval, **config)
    x = images(2, 3, 37, 30)
    traced = torch.jit.trace(ours, x)
    assert_close(traced(x), ours(x))


# ---------------------------------------------------------------- data parallelism


@pytest.mark.only_cpu
def test_data_parallel_is_refused_naming_ddp() -> None:
    ours, _ = twins()
    for name in ("", "features.denseblock1", "features.transition1"):
        module: Any = ours.get_submodule(name)
        replica = module._replicate_for_data_parallel()
        replica._former_parameters = {}
        x = images(2, 3, 8, 8)
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            replica(x if module is ours else images(2, 6, 8, 8))


@pytest.fixture
def one_process_group(tmp_path: Any) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.only_cpu
@fused_saves
@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize(
    "options",
    [
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ddp_accumulates_and_steps_as_naive(options: dict[str, bool], save: str) -> None:
    ours, naive = twins(save, drop_rate=0.2)
    parallel = DistributedDataParallel(ours, **options)  # type: ignore[arg-type]
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (ours, naive)]
    for i in range(3):
        with shared_masks(i, (2, 3)):
            if not options.get("static_graph"):
                with parallel.no_sync():
                    loss_of(parallel(images(2, 3, 8, 8, seed=20 + i))).backward()
                loss_of(naive(images(2, 3, 8, 8, seed=20 + i))).backward()
            torch.manual_seed(i)
            loss_of(parallel(images(2, 3, 8, 8, seed=i))).backward()
            loss_of(naive(images(2, 3, 8, 8, seed=i))).backward()
        for actual, expected in zip(ours.parameters(), naive.parameters(), strict=True):
            assert actual.grad is not None
            assert expected.grad is not None
            assert_close(actual.grad, expected.grad, 1e-9)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_buffers(dict(ours.named_buffers()), dict(naive.named_buffers()), 1e-10)


def _rank_step(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for name in ("own", "converted"):
        ours: Any = twins(small_inputs=False)[0]
        if name == "converted":
            ours = effdense.convert(twins(small_inputs=False)[1])
        ours.to(memory_format=torch.channels_last)
        # gradients of other strides than the buckets' are a warning, and a copy
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*strides")
            parallel = DistributedDataParallel(ours)
            for _ in range(2):
                ours.zero_grad()
                mine = images(4, 3, 37, 30)[2 * rank : 2 * rank + 2]
                mine = mine.contiguous(memory_format=torch.channels_last)
                parallel(mine).square().mean().backward()
        found[name] = [(p.grad, p.grad.stride() == p.stride()) for p in ours.parameters()]
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()


@pytest.mark.only_cpu
@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path: Any) -> None:
    results = str(tmp_path / "gradients.pt")
    # forkserver's processes end without tearing the interpreter down, in which a thread of gloo's
    # that is still letting go of a collective's tensors has aborted one in some hundred
    arguments = str(tmp_path / "store"), results
    mp.start_processes(_rank_step, arguments, nprocs=2, start_method="forkserver")
    averaged = torch.load(results, weights_only=True)
    total: list[Tensor] | None = None
    for half in images(4, 3, 37, 30).split(2):
        _, naive = twins(small_inputs=False)
        naive(half).square().mean().backward()
        found = [p.grad for p in naive.parameters() if p.grad is not None]
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    assert total is not None
    for found in averaged.values():
        for (actual, same_strides), expected in zip(found, total, strict=True):
            assert_close(actual, expected / 2)
            assert same_strides


# ---------------------------------------------------------------- interleaving


def test_interleaved_forwards_and_backwards_do_not_share_memory() -> None:
    ours, naive = twins()
    x, other = images(2, 3, 8, 8), images(3, 3, 9, 7, seed=8)
    steps: list[Step] = []
    for model in (ours, naive):
        first = loss_of(model(x))
        second = loss_of(model(other))
        weight = model.get_parameter("features.conv0.weight")
        (a,) = torch.autograd.grad(first, [weight])
        (b,) = torch.autograd.grad(second, [weight])
        steps.append(Step(a, {"second": b}, None, {}))
    assert_same_step(steps[0], steps[1])
