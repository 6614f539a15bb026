"""``python -m effdense verify``: holds for what is right, and fails, in the right row, if not."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effdense
from effdense import reference
from effdense.__main__ import main
from effdense.backends.torch_backend import TorchBackend
from effdense.block import dense_block, stage
from effdense.commands import verification
from effdense.commands.measure import Job, measured
from effdense.commands.network import Batch, Network
from effdense.verification.claims import Comparison, Twins, operations
from effdense.verification.comparison import near_prediction
from effdense.verification.rows import Row

TINY = ["densenet_bc", "--depth", "10", "--growth-rate", "4", "--batch-size", "2"]
TINY += ["--image-size", "9", "--no-measurements"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def status(*arguments: str) -> object:
    with pytest.raises(SystemExit) as exit_:
        main(["verify", *arguments])
    return exit_.value.code


def twins() -> Twins:
    options: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 6}
    options |= {"num_classes": 5, "small_inputs": True}
    return Twins.of(reference.DenseNet(**options), effdense.DenseNet(**options), CPU)


def failures(pair: Twins | None = None) -> dict[str, Row]:
    """The failed rows of a comparison in float64, by claim."""
    comparison = Comparison(pair or twins(), (3, 3, 9, 10), optimizer_steps=2)
    return {row.claim: row for row in comparison.exact() if row.failed}


def test_a_right_network_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", *TINY, "--json", "rows.json", "--dtype", "float64", "float32"])
    said = capsys.readouterr().out
    assert "all claims hold" in said
    found = json.loads((tmp_path / "rows.json").read_text())
    by_claim = {row["claim"]: row for row in found["rows"]}
    assert found["failed"] == 0
    assert found["environment"]["torch"].startswith(torch.__version__)
    assert by_claim["new features of dense layers"]["compared"].startswith("float64, 3 tensors")
    assert by_claim["bottlenecks of dense layers"]["compared"].startswith("float64, 3 tensors")
    assert by_claim["every Triton kernel against float64"]["status"] == "not checked"
    assert "float32 against float64" in by_claim["weight of norms"]["compared"]
    report = (tmp_path / "effdense-verify.md").read_text()
    for claim in by_claim:
        assert claim in report
    assert "self-check ok" in report or "C compiler" in report


def test_the_documentation_shows_these_claims() -> None:
    main(["verify", *TINY])
    page = Path(__file__).parents[2] / "docs" / "verification.md"
    shown = [_cells(text) for text in (page.read_text(), Path("effdense-verify.md").read_text())]
    claims = [[(claim, limit, status) for claim, _, limit, status, _ in rows] for rows in shown]
    assert claims[0] == claims[1]
    # of operations and of what is not checked nothing depends on the network
    assert [row[4] for row in shown[0][-4:]] == [row[4] for row in shown[1][-4:]]
    for claim, error, limit, _, _ in shown[0]:
        if limit:
            assert float(error) <= float(limit), claim


def _cells(report: str) -> list[list[str]]:
    """The rows of a report's table."""
    lines = report[report.index("| claim ") :].splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[2:])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


def test_a_converted_model_verifies_against_itself_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "from torchvision.models import DenseNet\n"
        "def small():\n"
        "    return DenseNet(4, (2, 2), 6, drop_rate=0.3, num_classes=5)\n"
        "def recomputed():\n"
        "    model = small()\n"
        "    for name, module in list(model.named_modules()):\n"
        "        if name.endswith('norm2'):\n"
        "            setattr(model.get_submodule(name[:-6]), 'norm2', nn.GroupNorm(2, 16))\n"
        "    return model\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, bottlenecks in (("small", True), ("recomputed", False)):
        options = ["--batch-size", "3", "--image-size", "33", "--no-measurements"]
        main(["verify", f"my_models:{name}", *options])
        said = capsys.readouterr().out
        assert re.search(r"ok +runs in linear memory +2 of 2 +dense blocks", said)
        assert ("bottlenecks of dense layers" in said) == bottlenecks
        assert "all claims hold" in said


# ------------------------------------------------------------------- failures


def scaled(operation: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on torch's backend multiplies what an operation writes last by a factor."""
    monkeypatch.setenv("EFFDENSE_BACKEND", "torch")
    original = getattr(TorchBackend, operation)

    def wrong(self: TorchBackend, *args: Any) -> Any:
        result = original(self, *args)
        args[-1].mul_(factor)
        return result

    monkeypatch.setattr(TorchBackend, operation, wrong)


def test_nothing_fails_where_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures() == {}
    scaled("finish_gradient", 1.0, monkeypatch)
    assert failures() == {}


def test_a_wrong_convolution_is_seen_in_the_features(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled("convolve", 1 + 1e-6, monkeypatch)
    assert status(*TINY) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert any(line.startswith("FAILED      new features of dense layers") for line in failed)
    assert any(line.split()[1] == "output" for line in failed)


def test_a_wrong_gradient_is_seen_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled("finish_gradient", 1 + 1e-3, monkeypatch)
    found = failures()
    assert {"gradients of parameters", "gradient of the input"} <= found.keys()
    assert "gradient by finite differences" in found
    assert not {"output", "new features of dense layers", "buffers after a step"} & found.keys()


def test_a_wrong_layer_is_named() -> None:
    pair = twins()
    pair.ours.get_submodule("features.denseblock2.denselayer2.norm1").eps = 0.1  # type: ignore[assignment]
    row = failures(pair)["new features of dense layers"]
    assert "worst features.denseblock2, layer 2" in row.compared or "layer 3" in row.compared


def test_running_statistics_that_move_twice_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = stage.update_running_statistics

    def twice(*args: Any) -> None:
        original(*args)
        original(*args)

    monkeypatch.setattr(stage, "update_running_statistics", twice)
    found = failures()
    assert "num_batches_tracked" in found["buffers after a step"].compared
    assert "gradients of parameters" not in found


def test_save_modes_that_differ_in_a_bit_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = dense_block._Stage.load

    def load(self: Any, *args: Any) -> None:
        original(self, *args)
        if self.spec.save == "input":
            self.x = self.x * (1 + 2e-16)

    monkeypatch.setattr(dense_block._Stage, "load", load)
    assert set(failures()) == {'save="input" is save="features"'}


def test_a_block_that_falls_back_to_the_plain_path_is_seen() -> None:
    pair = twins()
    for module in pair.ours.modules():
        if isinstance(module, reference.DenseLayer):
            module.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="hook"):
        found = failures(pair)
    assert found["runs in linear memory"].error == "0 of 2"


def test_an_error_is_a_row_and_the_other_checks_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Iterator[Row]:
        raise RuntimeError("no such luck\nand more")
        yield

    monkeypatch.setattr(Comparison, "_save_modes", broken)
    rows = list(Comparison(twins(), (3, 3, 9, 10), optimizer_steps=2).exact())
    (failed,) = [row for row in rows if row.failed]
    assert failed == Row("save modes", "RuntimeError: no such luck", "", "", "FAILED")
    assert rows[-1].claim == "state after 2 SGD steps"


def test_float32_may_err_twice_as_much_as_the_naive_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    comparison = Comparison(twins(), (3, 3, 9, 10), optimizer_steps=2)
    assert not [row for row in comparison.narrow(torch.float32) if row.failed]
    assert not [row for row in comparison.narrow(torch.bfloat16) if row.failed]
    scaled("convolve", 1 + 1e-5, monkeypatch)
    failed = [row.claim for row in comparison.narrow(torch.float32) if row.failed]
    # batch norms later on divide by the factor again: the output tells nothing of it
    assert {"other weights", "running_mean"} <= set(failed)


def test_operations_are_rows() -> None:
    rows = list(operations(TorchBackend(CPU), CPU, torch.float32, each=True))
    assert len(rows) == 13
    assert {row.status for row in rows} == {"ok"}

    class Other(TorchBackend):
        name = "other"

        def bn_relu_avg_pool_conv1x1(self, *args: Any) -> None:
            raise RuntimeError("illegal memory access\nand its trace")

        def bn_relu_global_pool(self, *args: Any) -> None:
            super().bn_relu_global_pool(*args)
            args[-1][0, 0] = float("nan")

    rows = list(operations(Other(CPU), CPU, torch.float32, each=True))
    raised, wrong = (row for row in rows if row.failed)
    assert raised.claim == "other: bn_relu_avg_pool_conv1x1"
    assert raised.compared.endswith("RuntimeError: illegal memory access")
    assert (wrong.claim, wrong.error) == ("other: bn_relu_global_pool", "nan")
    *raised_alone, together = operations(Other(CPU), CPU, torch.float32, each=False)
    assert [row.claim for row in raised_alone] == ["other: bn_relu_avg_pool_conv1x1"]
    assert together.failed
    assert "worst bn_relu_global_pool" in together.compared


# --------------------------------------------------------------- measurements


@pytest.mark.slow
def test_memory_and_time_are_measured_in_a_fresh_process() -> None:
    network = Network("densenet_bc", 22, 12)
    job = Job(network, "features", (16, 3, 32, 32), (16,), 10)
    found = measured(job, threads=1, samples=2)
    with torch.device("meta"):
        model = network.ours()
    predicted = effdense.estimate(model, job.shape)
    assert predicted.resident is not None
    assert abs(found["peak"] - predicted.resident) <= near_prediction(found["peak"], torch.float32)
    assert len(found["seconds"]) == 2
    assert all(seconds > 0 for seconds in found["seconds"])


MORE = "memory over the naive network's"


def measurements(monkeypatch: pytest.MonkeyPatch, device: str, **peaks: int) -> list[Row]:
    """Rows of measurements where processes answer with these peaks in MiB; 0 runs out of it."""

    def answer(job: Job, threads: int, samples: int) -> dict[str, Any]:
        peak = peaks[job.save or "naive"]
        if peak == 0:
            return {"error": "no memory left", "out_of_memory": True}
        return {"baseline": 0, "peak": peak << 20, "seconds": [0.1, 0.1, 0.2]}

    monkeypatch.setattr(verification, "measured", answer)
    found = verification.Verification(Network("densenet_bc", 40, 12), Batch(8), CPU, [])
    found._device = torch.device(device)
    return list(found._measurements())


@pytest.mark.slow
def test_measurements_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measurements(monkeypatch, "cpu", naive=68, features=13, bottlenecks=22)
    assert not [row for row in rows if row.failed]
    assert [row.error for row in rows if row.claim == MORE] == ["0.19", "0.32"]
    assert "80.0 images/s" in rows[0].compared
    assert rows[-1].status == "not checked"
    rows = measurements(monkeypatch, "cpu", naive=68, features=80, bottlenecks=22)
    failed = [row.claim for row in rows if row.failed]
    assert failed == [MORE, "memory as predicted"]
    # 13 MiB are predicted
    rows = measurements(monkeypatch, "cpu", naive=68, features=17, bottlenecks=22)
    assert [row.compared.partition(":")[0] for row in rows if row.failed] == [
        'float32, save="features"'
    ]
    # with next to nothing kept there is nothing to judge
    rows = measurements(monkeypatch, "cpu", naive=30, features=40, bottlenecks=40)
    assert [row.status for row in rows if row.claim == MORE] == 2 * ["measured"]
    rows = measurements(monkeypatch, "cpu", naive=0, features=13, bottlenecks=22)
    assert rows[0] == Row("training step, naive", "float32: no memory left", "", "", "not checked")
    assert not [row for row in rows if row.failed]


def test_on_a_gpu_autocast_and_channels_last_are_measured_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = measurements(monkeypatch, "cuda:0", naive=68, features=13, bottlenecks=22)
    claims = [row.claim for row in rows if row.status == "measured"]
    assert claims == 2 * [
        "training step, naive",
        "training step, naive, channels last",
        'training step, save="features"',
        'training step, save="bottlenecks"',
    ]
    predicted = [row for row in rows if row.claim == "memory as predicted"]
    assert {row.compared.partition(",")[0] for row in predicted} == {"float32", "bfloat16 autocast"}


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["densenet122"], "expected MODULE:CALLABLE"),
        (["densenet_bc", "--depth", "23"], "nearest valid depths"),
        (["densenet_bc", "--depth", "10", "--image-size", "2"], "refuses input of shape"),
        (
            ["densenet_bc", "--depth", "10", "--image-size", "4", "--batch-size", "7"],
            "leaves 7 values",
        ),
        (["densenet_bc", "--batch-size", "0"], "a positive integer"),
        (["densenet_bc", "--steps", "0"], "positive integer"),
        (["densenet_bc", "--device", "tpu9"], "cpu, cuda or cuda:N"),
        (["densenet_bc", "--device", "cuda:7"], "torch sees"),
        (["torchvision.models:resnet18"], "converts no dense block"),
        (["densenet_bc", "-o", "nowhere/report.md"], "no folder nowhere"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_twins_leave_nothing_trivial() -> None:
    pair = twins()
    weights = torch.cat([n.weight for n in pair.ours.modules() if isinstance(n, nn.BatchNorm2d)])
    assert (weights > 0).any()
    assert (weights < 0).any()
    assert (weights == 0).any()
