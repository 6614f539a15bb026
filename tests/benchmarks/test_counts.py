"""What is counted on paper agrees with design.md's figures and with what torch runs."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
from harness import counts, roofline
from harness.case import Case
from harness.devices import DEVICES
from harness.providers import setup

from effdense.memory import timeline

SMALL = Case("densenet_bc", depth=22, growth_rate=6, batch_size=2, image_size=8)
VOLUME = dataclasses.replace(SMALL, spatial_dims=3)
IMAGENET = Case("densenet121", 0, 0, batch_size=2, image_size=64)
CASES = {
    "cifar": SMALL,
    "imagenet": IMAGENET,
    "1-D": dataclasses.replace(SMALL, spatial_dims=1),
    "3-D": VOLUME,
    "3-D imagenet": dataclasses.replace(IMAGENET, spatial_dims=3),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_floor_gives_the_designs_figures():
    case = Case("densenet_bc", 250, 24, 32, 32)
    assert counts.floor(case).total / 2**20 == pytest.approx(433, abs=0.5)
    twice = dataclasses.replace(case, batch_size=64)
    assert counts.floor(twice).total / 2**20 == pytest.approx(691, abs=0.5)
    deepest = dataclasses.replace(twice, depth=1000)
    # design.md states two digits
    assert counts.floor(deepest).total / 2**30 == pytest.approx(4.5, abs=0.2)
    assert counts.floor(Case("densenet_bc", 1000, 12, 8, 32)).total / 2**20 == pytest.approx(
        754, abs=0.5
    )


def test_floor_of_an_imagenet_net_keeps_what_its_stem_is_computed_again_from():
    floor = counts.floor(IMAGENET)
    images = 2 * 3 * 64 * 64
    block1, block2 = 2 * 16 * 16 * (64 + 6 * 32), 2 * 8 * 8 * (128 + 12 * 32)
    assert floor.features == 4 * (images + block1)
    assert floor.gradient_buffer == 4 * block1 > 4 * block2
    assert floor.parameters == 4 * 7_978_856
    # autocast's images are float32
    narrow = counts.floor(dataclasses.replace(IMAGENET, dtype="float16"))
    assert narrow.features == 4 * images + 2 * block1


def test_floor_of_a_volume():
    floor = counts.floor(VOLUME)
    block1, block2 = 2 * 8**3 * (12 + 3 * 6), 2 * 4**3 * (15 + 3 * 6)
    assert floor.features == 4 * block1
    assert floor.gradient_buffer == 4 * block1 > 4 * block2


@each_case
def test_parameters_are_those_of_the_network(case):
    model = setup("naive", dataclasses.replace(case, device="meta")).model
    assert counts.parameter_count(case) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("image_size", "dims"), [(64, 2), (70, 2), (75, 2), (75, 3), (70, 1)])
def test_shapes_are_those_of_the_network(image_size, dims):
    case = dataclasses.replace(IMAGENET, image_size=image_size, spatial_dims=dims, device="meta")
    job = setup("naive", case)
    positions = {}
    for i in range(1, 5):
        module = job.model.get_submodule(f"features.denseblock{i}")
        module.register_forward_hook(
            lambda module, inputs, output, i=i: positions.update({i: output.shape})
        )
    job.loss()
    for block, shape in zip(counts.blocks(case), positions.values(), strict=True):
        assert (block.positions, block.width) == (shape[0] * math.prod(shape[2:]), shape[1])


@each_case
def test_arithmetic_is_what_torch_counts(case):
    counted = sum(op.flops for op in roofline.operations("naive", case))
    assert counted == counts.training_flops(case)


@each_case
def test_effdense_moves_less_and_recomputes_one_product(case):
    # a batch that isn't dwarfed by the parameters
    case = dataclasses.replace(case, batch_size=64)
    naive, bottlenecks, features = (
        roofline.operations(name, case)
        for name in ("naive", "effdense-bottlenecks", "effdense-features")
    )
    products = sum(
        2 * x.positions * x.width * x.bottleneck for b in counts.blocks(case) for x in b.layers()
    )
    recomputed = sum(op.flops for op in features) - sum(op.flops for op in bottlenecks)
    assert recomputed == products
    assert sum(op.nbytes for op in features) < 0.6 * sum(op.nbytes for op in naive)
    h100 = DEVICES["h100"]
    time = roofline.seconds(features, h100.flops["float32"], h100.memory)
    assert 0 < time < roofline.seconds(naive, h100.flops["float32"], h100.memory)


def test_growth_exponent_of_known_growth():
    sizes = [40.0, 100.0, 250.0]
    assert counts.growth_exponent(sizes, [3 * s**1.7 for s in sizes]) == pytest.approx(1.7)
    with pytest.raises(ValueError, match="two sizes"):
        counts.growth_exponent([40.0], [1.0])
    with pytest.raises(ValueError, match="positive"):
        counts.growth_exponent([1.0, 2.0], [0.0, 1.0])


def test_synchronised_statistics_grow_linearly_where_they_are_shared():
    depths = [100.0, 400.0]
    cases = [Case("densenet_bc", int(depth), 12, 8, 32) for depth in depths]
    naive, shared = (
        counts.growth_exponent(depths, [counts.statistics_bytes(c, s) for c in cases])
        for s in (False, True)
    )
    assert shared < 1.1 < 1.6 < naive


@pytest.mark.parametrize("case", [SMALL, VOLUME], ids=["cifar", "3-D"])
@pytest.mark.parametrize(
    "provider", ["naive", "checkpoint", "effdense-features", "effdense-bottlenecks"]
)
def test_meta_tensors_predict_live_bytes(provider, case):
    real, meta = (
        timeline.record_step(functools.partial(setup, provider, c))
        for c in (case, dataclasses.replace(case, device="meta"))
    )
    if provider.startswith("effdense"):
        # some channels' sums need a tile of their own, which depends on the norms' weights
        assert meta.total == pytest.approx(real.total, rel=0.02)
    else:
        assert real == meta


def test_live_bytes_of_effdense_are_split_as_the_floor_is():
    case = Case("densenet_bc", depth=40, growth_rate=12, batch_size=2, image_size=32)
    peak = timeline.record_step(lambda: setup("effdense-features", case))
    split, floor = peak.parts, counts.floor(case)
    assert peak.total == sum(split[role] for role in timeline.ROLES)
    assert split["optimizer"] == floor.optimizer
    # features, and small vectors: statistics, the input, the loss
    assert floor.features <= split["features"] < 1.2 * floor.features
    assert split["gradient buffer"] >= floor.gradient_buffer
    naive = timeline.record_step(lambda: setup("naive", case)).parts
    assert naive["features"] > 10 * split["features"]
