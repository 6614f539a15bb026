"""The best epoch: which it is, that it is what is exported, and what interrupted runs answer."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from PIL import Image

import effdense
from effdense.__main__ import main
from effdense.engine.checkpoint import CheckpointStore, Position
from effdense.engine.options import TrainConfig
from effdense.engine.plots import read
from effdense.engine.resumption import weights_in
from effdense.engine.standings import Standings
from effdense.engine.training import train
from effdense.errors import UserError

DIGITS: dict[str, Any] = {"depth": 10, "growth_rate": 8, "threads": 1, "epochs": 4}

UNSTEADY: dict[str, Any] = {
    **DIGITS,
    "schedule": "multistep",
    "milestones": (0.99,),
    "lr": 0.4,
    "weight_decay": 0.02,
    "seed": 3,
    "best_by": "loss",
    "keep_checkpoints": 1,
}


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which an earlier epoch is the best, with much loss after that."""
    path = tmp_path_factory.mktemp("best") / "run"
    train(TrainConfig(work_dir=path, **UNSTEADY))
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "1.png"
    Image.new("L", (8, 8), 100).save(path)
    return path


def best_of(path: Path) -> int:
    test = read(path / "test.csv")
    return int(test["epoch"][test["loss"].index(min(test["loss"]))])


def metadata(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_the_best_epoch_is_exported_and_named(
    work_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = best_of(work_dir)
    assert best < 4, "the fixture wants an earlier epoch to be the best"
    shutil.copytree(work_dir, tmp_path / "run")
    # nothing is left to be trained: the last line again
    train(TrainConfig(work_dir=tmp_path / "run", **UNSTEADY))
    last_line = capsys.readouterr().out.splitlines()[-1]
    error = read(work_dir / "test.csv")["error"][best - 1]
    assert last_line.startswith(f"best epoch {best} of 4: test error {error:.2f} % on 360 images")
    for name, epoch in (("model", best), ("last", 4)):
        found = metadata(work_dir / f"{name}.safetensors")
        assert json.loads(found["classes"]) == [str(i) for i in range(10)]
        about = json.loads(found["run"])
        assert (about["epoch"], about["last"]) == (epoch, 4)
        assert about["options"]["depth"] == 10
        assert "work_dir" not in about["options"]
    published = sorted(path.name for path in (work_dir / "checkpoints").glob("epoch-*"))
    assert published == [f"epoch-{best:05d}-tested", "epoch-00004-tested"]
    assert f"in epoch {best}, the best of 4" in (work_dir / "report.html").read_text()


def test_what_is_exported_is_what_was_tested(work_dir: Path) -> None:
    """Held by another test of the data: the errors of both files are those of their epochs."""
    from effdense.engine.data.datasets import load

    test = load(TrainConfig().resolved(), download=False).test
    ((images, labels),) = test.batches([torch.arange(360)], None, torch.device("cpu"))
    for name, epoch in (("model", best_of(work_dir)), ("last", 4)):
        network = effdense.load(work_dir / f"{name}.safetensors")
        assert not network.training
        with torch.no_grad():
            wrong = (network(images).argmax(1) != labels).double().mean()
        assert 100 * float(wrong) == pytest.approx(read(work_dir / "test.csv")["error"][epoch - 1])


def test_load_gives_a_network_that_says_what_it_takes(work_dir: Path, picture: Path) -> None:
    for source in (work_dir, str(work_dir / "model.safetensors")):
        network: Any = effdense.load(source)
        assert network.classes == tuple("0123456789")
        image = network.preprocess(picture)
        assert image.shape == (1, 8, 8)
        probabilities = network.probabilities(network(image[None]))
        assert probabilities.sum().item() == pytest.approx(1)
    torch.save({"a": torch.zeros(1)}, picture.parent / "weights.pt")
    with pytest.raises(ValueError, match="does not say what network it is for"):
        effdense.load(picture.parent / "weights.pt")
    with pytest.raises(ValueError, match="cannot read"):
        effdense.load(picture.parent / "nothing.safetensors")


def test_an_interrupted_run_answers_with_its_best_epoch_so_far(
    work_dir: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(work_dir, tmp_path / "run")
    for file in (tmp_path / "run").glob("*.safetensors"):
        file.unlink()
    network, exported = effdense.load(tmp_path / "run"), effdense.load(work_dir)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, exported.state_dict()[name])
    main(["predict", str(tmp_path / "run"), str(picture)])
    interrupted = capsys.readouterr().out
    main(["predict", str(work_dir), str(picture)])
    assert capsys.readouterr().out == interrupted
    # before the first test the newest is what there is
    store = CheckpointStore(tmp_path / "early" / "checkpoints", keep=1)
    (tmp_path / "early").mkdir()
    shutil.copy(work_dir / "config.yaml", tmp_path / "early" / "config.yaml")
    with pytest.raises(UserError, match="has no checkpoint yet, and no weights"):
        effdense.load(tmp_path / "early")
    best = CheckpointStore(work_dir / "checkpoints", keep=1).best()
    assert best is not None
    store.publish(Position(1, 6), best.files)
    assert effdense.load(tmp_path / "early")


def test_a_run_that_has_gone_on_since_its_export_answers_anew(
    work_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(work_dir, tmp_path / "run")
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=9)
    best = store.best()
    assert best is not None
    files = dict(best.files)
    state = torch.load(io.BytesIO(files["state.pt"]), weights_only=True)
    state["parameters"]["classifier.bias"] += 1
    changed = io.BytesIO()
    torch.save(state, changed)
    store.publish(Position(6, 0), {**files, "state.pt": changed.getvalue()}, -1.0)
    bias = effdense.load(tmp_path / "run").state_dict()["classifier.bias"]
    assert torch.equal(bias, weights_in(best)["classifier.bias"] + 1)


def test_predict_s_forms(
    work_dir: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(*options: object) -> list[list[str]]:
        main(["predict", str(work_dir), str(picture), *map(str, options)])
        return list(csv.reader(io.StringIO(capsys.readouterr().out)))

    header, one = rows()
    assert header == ["image", "class", "probability"]
    header, three = rows("--top-k", 3)
    assert header == ["image", *[f"{n}{k}" for k in (1, 2, 3) for n in ("class", "probability")]]
    assert three[1:3] == one[1:]
    assert float(three[2]) >= float(three[4]) >= float(three[6])
    header, every = rows("--all")
    assert header == ["image", *"0123456789"]
    assert every[1 + int(one[1])] == one[2]
    assert rows("--all", "-o", tmp_path / "out.csv") == []
    written = (tmp_path / "out.csv").read_text().splitlines()
    assert list(csv.reader(written)) == [header, every]
    with pytest.raises(SystemExit):
        rows("--all", "--top-k", 2)
    assert "choose one" in capsys.readouterr().err


@pytest.mark.slow
def test_onnx_answers_as_torch_does(
    work_dir: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    main(["export", str(work_dir), "--onnx", str(tmp_path / "model.onnx")])
    said = capsys.readouterr().out
    assert "ONNX Runtime and torch differ by" in said
    assert said.endswith("on the test set's first 8 images\n")
    network: Any = effdense.load(work_dir)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for count in (1, 3):
        images = torch.stack([network.preprocess(picture)] * count)
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), network(images), atol=1e-4, rtol=0)
    # one that fails the check is not to be found under the name
    before = (tmp_path / "model.onnx").read_bytes()
    with pytest.raises(SystemExit):
        main(["export", str(work_dir), "--onnx", str(tmp_path / "model.onnx"), "--tolerance=-1"])
    assert "model.onnx is not written, as it would answer otherwise" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "onnx" in path.name] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == before
    with pytest.raises(SystemExit):
        main(["export", str(work_dir), "--onnx", str(tmp_path / "no" / "model.onnx")])
    assert "there is no folder" in capsys.readouterr().err


def test_early_stopping_is_a_function_of_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "epoch,step,loss,error,samples\n1,5,1.0,50.0,9\n2,10,0.9,40.0,9\n"
    text += "3,15,0.8,40.0,9\n4,20,nan,41.0,9\n"
    standings = Standings("error", {"test.csv": text})
    assert standings.best == 2
    assert [standings.is_over(patience) for patience in (0, 1, 2, 3)] == [False, True, True, False]
    assert Standings("loss", {"test.csv": text}).best == 3
    # nothing is learnt at such a rate
    still = {"epochs": 9, "lr": 1e-12, "patience": 2}
    options: dict[str, Any] = {**DIGITS, **still, "work_dir": tmp_path / "run"}
    done = train(TrainConfig(**options))
    assert len(done.tests) < 9
    said = capsys.readouterr().out
    assert f"stopped after epoch {len(done.tests)}: 2 epochs have brought no better error" in said
    # and neither is a step taken by the same command once more
    train(TrainConfig(**options))
    again = capsys.readouterr().out
    assert "going on from" in again
    assert read(tmp_path / "run" / "train.csv")["epoch"] == [float(e) for e in done.tests]
