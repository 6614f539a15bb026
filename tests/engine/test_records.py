from __future__ import annotations

import csv
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from effdense.engine import lock, plots
from effdense.engine.distributed import World
from effdense.engine.options import ResolvedConfig, TrainConfig
from effdense.engine.progress import Speed
from effdense.engine.records import CsvLog, WorkDir, write_atomically
from effdense.engine.scores import Score
from effdense.engine.standings import Standings
from effdense.engine.tensorboard import add_scores
from effdense.errors import UserError
from effdense.machine import environment as machine


def config(work_dir: Path | None, **options: Any) -> ResolvedConfig:
    return TrainConfig(work_dir=work_dir, **options).resolved()


def write_run(path: Path, errors: list[float]) -> Path:
    work_dir = WorkDir.claim(config(path))
    logs = work_dir.logs({})
    train, test = logs["train.csv"], logs["test.csv"]
    for epoch, error in enumerate(errors, 1):
        train.add(epoch=epoch, step=epoch * 10, lr=0.1, loss=error / 10, error=error)
        test.add(epoch=epoch, step=epoch * 10, loss=error / 5, error=2 * error, samples=7)
    work_dir.close()
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, list[float]]]:
    """The curves of each figure in the order of saving: label -> y values."""
    figures: list[dict[str, list[float]]] = []
    save = Figure.savefig

    def savefig(self: Figure, *arguments: Any, **options: Any) -> None:
        (axes,) = self.axes
        figures.append({str(line.get_label()): list(line.get_ydata()) for line in axes.lines})  # type: ignore[arg-type]
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_csv_rows_are_on_disk_at_once_and_exact(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "x.csv", ("a", "b"))
    assert (tmp_path / "x.csv").read_text().split() == ["a,b"]
    values = [(1, 0.1 + 0.2), (2, 1e-300)]
    for i, (a, b) in enumerate(values, 1):
        log.add(b=b, a=a)
        with (tmp_path / "x.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(int(r["a"]), float(r["b"])) for r in rows] == values[:i]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("old")

    def half(partial: Path) -> None:
        partial.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*model.pt: No space left on device"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

    def whole(partial: Path) -> None:
        partial.write_text("new")

    write_atomically(path, whole)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_is_not_written_over_unless_asked(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [5.0])
    (path / "notes.txt").write_text("mine")
    before = {file: file.read_bytes() for file in path.glob("[!.]*")}
    with pytest.raises(UserError, match=r"already holds a run .*--overwrite"):
        WorkDir.claim(config(path))
    assert {file: file.read_bytes() for file in path.glob("[!.]*")} == before
    WorkDir.claim(config(path, overwrite=True)).close()
    assert list(path.glob("[!.]*")) == [path / "notes.txt"]


ALIEN: dict[str, dict[str, str]] = {
    "a config.yaml": {"config.yaml": "my: precious\n"},
    "a config.yaml with options": {"config.yaml": "options: {lr: 3}\n"},
    "a newer format": {"config.yaml": "format: 7\noptions: {data: fake}\ncommand: train\n"},
    "tables of a contest": {"train.csv": "id,label\n1,2\n", "test.csv": "id\n1\n"},
    "a table of one line": {"train.csv": "id,label"},
    "a list of classes": {"classes.csv": "cat"},
    "weights": {"model.pt": "mine"},
    "checkpoints": {"checkpoints/best.ckpt": "mine"},
    "a note": {".2026-notes.txt": "mine"},
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ALIEN)
def test_files_that_are_no_run_s_stay(what: str, overwrite: bool, tmp_path: Path) -> None:
    for name, text in ALIEN[what].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    if what == "a note":
        WorkDir.claim(config(tmp_path, overwrite=overwrite)).close()
    else:
        with pytest.raises(UserError, match=r"may be no run's, .*: choose another --work-dir"):
            WorkDir.claim(config(tmp_path, overwrite=overwrite))
    assert {name: (tmp_path / name).read_text() for name in ALIEN[what]} == ALIEN[what]


def test_what_a_killed_write_left_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / ".17-train.csv").write_text("epo")
    WorkDir.claim(config(tmp_path)).close()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_torchrun_restarts_keeps_what_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def begin(launch: str, **options: Any) -> WorkDir:
        asked = config(None, **options)
        work_dir = WorkDir.claim(asked, launch=launch)
        if not (work_dir.path / "config.yaml").exists():
            world = World(0, 2, 0, 2, torch.device("cpu"), "gloo", "some attempt", launch)
            work_dir.write_config(asked, world, {})
        work_dir.close()
        return work_dir

    assert str(begin("one").path) == "runs/digits-1"
    assert str(begin("two").path) == "runs/digits-2"
    assert str(begin("one").path) == "runs/digits-1"
    assert str(begin("one", lr=0.3).path) == "runs/digits-3"
    assert str(begin("").path) == "runs/digits-4"
    assert str(begin("").path) == "runs/digits-5"
    # so --overwrite is meant for what there was before the launch
    path = begin("one").path
    for launch, stays in (("one", True), ("two", False)):
        again = WorkDir.claim(config(path, overwrite=True), launch=launch)
        assert (path / "config.yaml").exists() == stays
        again.close()


def test_a_work_dir_that_is_removed_meanwhile(tmp_path: Path) -> None:
    work_dir = WorkDir.claim(config(tmp_path / "run"))
    shutil.rmtree(work_dir.path)
    work_dir.close()
    assert not work_dir.path.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lustre mounted without flock, and NFS whose server's lock daemon is away."""

    def lockf(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    before = os.listdir("/proc/self/fd")
    said = f"cannot lock .*run: {os.strerror(number)}; choose a --work-dir on another file system"
    with pytest.raises(UserError, match=said):
        WorkDir.claim(config(tmp_path / "run"))
    assert os.listdir("/proc/self/fd") == before


def test_a_folder_for_tensorboard_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("")
    score = Score(1.0, 2.0, 3)
    with pytest.raises(UserError, match=r"cannot write .*tensorboard: File exists"):
        add_scores(tmp_path / "tensorboard", 1, score, score, Speed(3, 1.0, 0.0, 1))


def test_without_a_work_dir_every_run_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits-2").mkdir(parents=True)
    found = [str(WorkDir.claim(config(None)).path) for _ in range(3)]
    assert found == ["runs/digits-1", "runs/digits-3", "runs/digits-4"]


def test_a_work_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/run"):
        WorkDir.claim(config(tmp_path / "file" / "run"))


def test_source_revision_is_git_s_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "environment.py"))
    assert machine.source_revision() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.source_revision() is None


def test_plots_show_what_the_csv_files_say(
    tmp_path: Path, drawn: list[dict[str, list[float]]]
) -> None:
    path = write_run(tmp_path / "run", [30.0, 20.0, 10.0])
    assert plots.draw([path], path) == [path / "loss.png", path / "error.png"]
    assert drawn == [
        {"train": [3.0, 2.0, 1.0], "test": [6.0, 4.0, 2.0]},
        {"train": [30.0, 20.0, 10.0], "test": [60.0, 40.0, 20.0]},
    ]
    for name in ("loss.png", "error.png"):
        with Image.open(path / name) as image:
            assert image.format == "PNG"
            assert image.width > 500


def test_curves_that_can_be_read(tmp_path: Path) -> None:
    """One loss that dwarfs the rest does not press it into a line, and the best is marked."""
    for errors, scale in (([300.0, 20.0, 10.0, 9.0], "log"), ([30.0, 20.0, 10.0], "linear")):
        path = write_run(tmp_path / scale, errors)
        found = plots.figures([path], plots.ALL, best=2)
        assert found["loss"].axes[0].get_yscale() == scale
        assert found["error"].axes[0].get_yscale() == "linear"
        (mark,) = (line for line in found["loss"].axes[0].lines if line.get_label() == MARK)
        assert np.array(mark.get_xdata()).tolist() == [2, 2]
        (rate, _) = found["learning-rate"].axes[0].lines
        assert np.array(rate.get_ydata()).tolist() == [0.1] * len(errors)
        # not on the frame's edge
        assert found["learning-rate"].axes[0].get_ylim() == pytest.approx((0, 0.105))


MARK = "best epoch, 2"


def test_several_runs_are_overlaid_under_their_names(
    tmp_path: Path, drawn: list[dict[str, list[float]]]
) -> None:
    runs = [write_run(tmp_path / str(i) / "same", [10.0 + i]) for i in range(12)]
    plots.draw([write_run(tmp_path / "a", [4.0]), write_run(tmp_path / "b", [8.0])], tmp_path)
    assert drawn[1] == {
        "a, train": [4.0],
        "a, test": [8.0],
        "b, train": [8.0],
        "b, test": [16.0],
    }
    plots.draw(runs, tmp_path / "new" / "folder")
    assert len(drawn[3]) == 24  # runs of one name are told apart
    assert (tmp_path / "new" / "folder" / "loss.png").exists()


def test_a_row_that_was_cut_short_is_left_out(
    tmp_path: Path, drawn: list[dict[str, list[float]]]
) -> None:
    path = write_run(tmp_path / "run", [30.0, 20.0])
    with (path / "test.csv").open("a") as file:
        file.write("3,30,0.")
    plots.draw([path], path)
    assert drawn[1] == {"train": [30.0, 20.0], "test": [60.0, 40.0]}


def test_a_run_without_epochs_yet_can_be_drawn(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [])
    plots.draw([path], path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no run: there is no test.csv"),
        ("", "cannot read"),
        ("a,b\n1,2\n", "no columns epoch, loss and error"),
        ("epoch,loss,error\n1,x,3\n", "could not convert"),
    ],
)
def test_what_cannot_be_drawn(tmp_path: Path, content: str | None, said: str) -> None:
    path = write_run(tmp_path / "run", [1.0])
    (path / "test.csv").unlink()
    if content is not None:
        (path / "test.csv").write_text(content)
    with pytest.raises(UserError, match=said):
        plots.draw([path], path)
    assert not list(path.glob("*.png"))


@pytest.mark.parametrize("cell", ["nan", ""], ids=["nan", "as 0.1 wrote it"])
def test_a_test_that_is_not_a_number_is_drawn_and_is_never_the_best(
    tmp_path: Path, cell: str
) -> None:
    log = CsvLog(tmp_path / "test.csv", ["epoch", "step", "loss", "error", "samples"])
    for epoch, loss in enumerate((2.0, float("nan"), 1.0), 1):
        log.add(epoch=epoch, step=epoch, loss=loss, error=10.0 if epoch < 3 else loss, samples=5)
    assert log.text().splitlines()[2] == "2,2,nan,10.0,5"
    text = log.text().replace("nan", cell)
    (tmp_path / "test.csv").write_text(text)
    standings = Standings("loss", {"test.csv": text})
    assert standings.best == 3
    assert Standings("loss", {"test.csv": "\n".join(text.splitlines()[:3])}).best == 1
    assert np.isnan(plots.read(tmp_path / "test.csv")["loss"][1])
    (tmp_path / "train.csv").write_text(text)
    plots.draw([tmp_path], tmp_path)
