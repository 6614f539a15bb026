"""What a finished run leaves for others: weights, a report, and a network to use on images."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import xml.etree.ElementTree
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

import effdense
from effdense.__main__ import main
from effdense.engine import report
from effdense.engine.data.datasets import load
from effdense.engine.data.images import InMemory, Normalization
from effdense.engine.data.order import generator
from effdense.engine.export import first_tested
from effdense.engine.mistakes import SHOWN, SIDE
from effdense.engine.mistakes import pictures as drawn
from effdense.engine.options import TrainConfig
from effdense.engine.plots import read
from effdense.engine.training import train
from effdense.errors import UserError
from effdense.weights import read_metadata, read_safetensors, safetensors_bytes


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "run"
    options = {"depth": 10, "growth_rate": 8, "epochs": 3, "threads": 1, "tensorboard": True}
    train(TrainConfig(work_dir=path, **options, budget="2GiB"))  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("of", ["run", "file"])
def test_a_run_of_another_machine_s_backend_is_used_on_this_one(
    of: str, digits_run: Path, tmp_path: Path
) -> None:
    source = tmp_path / ("run" if of == "run" else "model.safetensors")
    if of == "run":
        source.mkdir()
        text = (digits_run / "config.yaml").read_text()
        assert "\n  backend: auto\n" in text
        (source / "config.yaml").write_text(
            text.replace("\n  backend: auto\n", "\n  backend: triton\n")
        )
        shutil.copy(digits_run / "model.safetensors", source)
    else:
        held = digits_run / "model.safetensors"
        about = json.loads(read_metadata(held)["run"])
        about["options"]["backend"] = "triton"
        source.write_bytes(safetensors_bytes(read_safetensors(held), {"run": json.dumps(about)}))
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(effdense.load(source)(images), effdense.load(digits_run)(images))


def test_the_format_is_what_its_own_package_reads_and_writes(tmp_path: Path) -> None:
    tensors = {
        "weights": torch.randn(3, 5),
        "transposed": torch.randn(4, 6).t(),
        "half": torch.randn(7).half(),
        "brain": torch.randn(2, 1).bfloat16(),
        "double": torch.randn(3).double(),
        "count": torch.tensor(12),
        "mask": torch.tensor([True, False]),
        "nothing": torch.empty(0, 3),
    }
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    ours.write_bytes(safetensors_bytes(tensors, {"made": "here"}))
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, theirs)
    for found in (safetensors.torch.load_file(ours), read_safetensors(theirs)):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40, b"\2\0\0\0\0\0\0\0{}..."[:9]])
def test_what_is_no_safetensors_file_is_said(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is not a safetensors file"):
        read_safetensors(tmp_path / "model.safetensors")


def test_the_names_are_torchvision_s(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(effdense.densenet121(num_classes=7).state_dict(), {}))
    theirs = torchvision.models.densenet121(num_classes=7)
    theirs.load_state_dict(safetensors.torch.load_file(path))


def test_a_run_s_weights_are_the_same_in_both_files(digits_run: Path) -> None:
    pickled = torch.load(digits_run / "model.pt", weights_only=True)
    found = safetensors.torch.load_file(digits_run / "model.safetensors")
    assert found.keys() == pickled.keys()
    assert all(torch.equal(found[name], pickled[name]) for name in pickled)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' test images as files."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=generator("digits"))
    for i in order[: len(order) // 5 + 1].tolist():
        (folder / str(digits.target[i])).mkdir(exist_ok=True)
        pixels = (digits.images[i] * (255 / 16)).round().astype("uint8")
        Image.fromarray(pixels).save(folder / str(digits.target[i]) / f"{i}.png")
    return folder


def test_evaluate_on_files_repeats_the_run_s_own_test(
    digits_run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["evaluate", str(digits_run), str(pictures)])
    error, loss, images = re.findall(r"[\d.]+", capsys.readouterr().out)
    test = read(digits_run / "test.csv")
    best = test["error"].index(min(test["error"]))
    assert images == "360"
    assert float(loss) == pytest.approx(test["loss"][best], rel=0.02)  # bytes, not 0..16
    assert float(error) == pytest.approx(test["error"][best], abs=0.6)


def test_predict_names_the_classes(
    digits_run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["predict", str(digits_run), str(pictures)])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 360
    wrong = sum(Path(row["image"]).parent.name != row["class"] for row in rows)
    assert 100 * wrong / 360 == pytest.approx(min(read(digits_run / "test.csv")["error"]), abs=0.6)
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)


def test_mistakes_in_using_a_run(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wolf").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "wolf" / "1.png")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    for arguments, said in (
        (["evaluate", tmp_path, tmp_path], "there is no config.yaml"),
        (["evaluate", digits_run, tmp_path / "wolf"], "is not in a folder of"),
        (["evaluate", digits_run, tmp_path / "nothing"], "there is no image in"),
        (["predict", digits_run, tmp_path / "cut.png"], "cannot be read as an image"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_answers_are_written_whole_or_not_at_all(digits_run: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "1.png")
    answers, link = tmp_path / "answers.csv", tmp_path / "link.csv"
    answers.write_text("those of yesterday")
    link.symlink_to(answers)
    before = sorted(tmp_path.iterdir())
    predict = ["predict", str(digits_run), str(tmp_path), "--batch-size", "1", "-o"]
    (tmp_path / "2.png").write_bytes(b"\x89PNG")
    with pytest.raises(SystemExit):
        main([*predict, str(answers)])
    assert answers.read_text() == "those of yesterday"
    (tmp_path / "2.png").unlink()
    assert sorted(tmp_path.iterdir()) == before
    main([*predict, str(link)])
    assert answers.read_text().startswith("image,class,probability\n")
    assert link.is_symlink()
    out, into = os.pipe()
    main([*predict, f"/dev/fd/{into}"])
    assert os.read(out, 5) == b"image"
    os.close(out)
    os.close(into)
    with pytest.raises(SystemExit):
        main([*predict, str(tmp_path)])


def test_the_report_is_one_page_with_everything_in_it(digits_run: Path) -> None:
    page = (digits_run / "report.html").read_text()
    assert page.count("<svg") == 5
    for part in ("Test error <b>", "growth_rate", "features.denseblock1", effdense.__version__):
        assert part in page
    # what differs comes first, all else is folded
    first, folded = page.split("<details>", 1)
    differences = first.split("What differs from the defaults")[1].split("</table>")[0]
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", differences)
    changed = {"data": "digits", "depth": "10", "growth_rate": "8", "epochs": "3"}
    assert dict(rows) == {**changed, "budget": "2GiB", "tensorboard": "True"}
    assert "weight_decay" in folded
    assert "weight_decay" not in first
    assert 'name="viewport"' in page
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)  # it needs no other file
    for row in (digits_run / "classes.csv").read_text().splitlines()[1:]:
        name, samples, error, *areas = row.split(",")
        shown = [samples, f"{float(error):.2f}\N{NO-BREAK SPACE}%"]
        shown += [f"{float(area):.4f}" for area in areas]
        cells = "".join(f'<td class="number">{cell}</td>' for cell in shown)
        assert f"<tr><td>{name}</td>{cells}</tr>" in page
    assert re.search(r"top-5 error [\d.]+\N{NO-BREAK SPACE}%, AUROC 0\.\d{4}, AUPRC", page)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        xml.etree.ElementTree.fromstring(svg)


@pytest.mark.parametrize(
    "options",
    [
        {"data": "digits"},
        {"data": "csv", "table": "t.csv", "label_columns": ["a", "b"], "lr": 0.05},
        {"data": "csv", "table": "t.csv", "channels": 1, "arch": "densenet_bc", "depth": 10},
        {"data": "csv", "table": "t.csv", "spatial_dims": 3, "model": "a:b", "crop": [8, 8, 8]},
        {"data": "own", "model": "given:Net", "augment": "none", "epochs": 2},
        {"data": "imagefolder", "arch": "densenet161", "weights": "IMAGENET1K_V1"},
    ],
    ids=str,
)
def test_what_differs_from_the_defaults(options: dict[str, Any]) -> None:
    """All that was asked for, and nothing that follows from it."""
    asked: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in options.items()
    }
    resolved = TrainConfig(**asked, work_dir=Path("run"), threads=3).resolved().options()
    assert report._differences(resolved) == options


def test_the_report_shows_what_the_network_is_most_wrongly_sure_of(digits_run: Path) -> None:
    page = (digits_run / "report.html").read_text()
    with (digits_run / "mistakes.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = re.findall(
        r"base64,(.*?)\".*?<figcaption>(\w+), taken for (\w+) with (\d+)&nbsp;%", page
    )
    assert len(shown) == len(rows) == SHOWN
    probabilities = [float(row["probability"]) for row in rows]
    assert probabilities == sorted(probabilities, reverse=True)
    data = load(TrainConfig().resolved(), download=False)
    for row, (png, truth, answer, percent) in zip(rows, shown, strict=True):
        assert (truth, answer) == (row["truth"], row["answer"])
        assert truth == str(int(data.test.labels[int(row["number"])])) != answer
        assert percent == f"{100 * float(row['probability']):.0f}"
        with Image.open(io.BytesIO(base64.b64decode(png))) as image:
            # darkest to brightest
            seen = torch.from_numpy(np.array(image)).float() / 255
        stored = cast(Any, data.test).images[int(row["number"])][0].float()
        torch.testing.assert_close(seen, stored / stored.max(), atol=1 / 255, rtol=0)


def test_pictures_of_volumes_are_their_middle_and_other_signals_have_none() -> None:
    volumes = torch.rand(2, 1, 300, 20, 5)
    split = InMemory(volumes, torch.zeros(2).long(), Normalization((0.0,), (1.0,)))
    (png,) = drawn(split, [1], torch.device("cpu"))
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        assert (image.mode, max(image.size)) == ("L", SIDE)
    signals = InMemory(torch.rand(2, 1, 300), torch.zeros(2).long(), Normalization((0.0,), (1.0,)))
    assert drawn(signals, [0, 1], torch.device("cpu")) == ["", ""]


def test_what_the_network_was_first_tested(digits_run: Path) -> None:
    expected = load(TrainConfig().resolved(), download=False).test
    (images,) = (x for x, _ in expected.batches([torch.arange(3)], None, torch.device("cpu")))
    assert torch.equal(first_tested(digits_run, 3), images)
    assert torch.equal(first_tested(digits_run / "model.safetensors", 3), images)


def test_speed_and_memory_are_recorded_and_drawn(digits_run: Path) -> None:
    speed = read(digits_run / "speed.csv", ["images_per_second", "wait_percent", "memory_mib"])
    assert speed["epoch"] == [1, 2, 3]
    assert min(speed["images_per_second"]) > 1
    assert all(0 <= share <= 100 for share in speed["wait_percent"])
    # over the start of this process, in which other tests may have left as much room
    assert min(speed["memory_mib"]) >= 0
    for name in ("images-per-second.png", "memory.png"):
        with Image.open(digits_run / name) as image:
            image.verify()


def test_tensorboard_gets_the_scores(digits_run: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(digits_run / "tensorboard"))
    events.Reload()
    got = [(scalar.step, scalar.value) for scalar in events.Scalars("error/test")]
    test = read(digits_run / "test.csv")
    assert got == [(e, pytest.approx(v)) for e, v in zip((1, 2, 3), test["error"], strict=True)]
