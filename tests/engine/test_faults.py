"""What goes wrong around a run: each fault with the real processes, nothing published lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import meddlers
from tests.helpers.launch import REPOSITORY, flags
from tests.helpers.pictures import write_folder
from tests.helpers.ranks import RUN, Ranks, final_state, wait_for

pytestmark = pytest.mark.slow

SCRIPT = REPOSITORY / "train_ddp.py"


def published(work_dir: Path) -> list[str]:
    return sorted(path.name for path in (work_dir / "checkpoints").glob("epoch-*"))


def finish(folder: Path, like: Path, world_size: int = 1) -> str:
    """Run the same command again; it must end like the run that nothing happened to."""
    with Ranks(folder, RUN, world_size) as ranks:
        assert ranks.wait() == [0] * world_size, ranks.said()
    assert final_state(folder / "run") == final_state(like)
    return ranks.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_to_one_process_stops_all_with_a_checkpoint(
    number: signal.Signals, uninterrupted: Path, tmp_path: Path
) -> None:
    with Ranks(tmp_path, RUN, 3) as ranks:
        wait_for(lambda: published(tmp_path / "run"))
        ranks.send(1, number)
        assert ranks.wait() == [75, 75, 75], ranks.said()
        assert f"stopped by {number.name} before step" in ranks.said()
    assert "going on from epoch" in finish(tmp_path, uninterrupted, 3)


def _workers(launcher: int) -> dict[int, int]:
    """Rank to process of torchrun's processes."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True
    ).stdout.split()
    found = {}
    for pid in map(int, listed):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        found.update({int(v[5:]): pid for v in variables if v.startswith("RANK=")})
    return found


def test_torchrun_restarts_after_a_kill_and_passes_sigterm_on(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """No --work-dir: what torchrun has restarted finds the folder that it had begun."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", "3", "--max-restarts", "1", str(SCRIPT)),
        *map(str, RUN[: RUN.index("--work-dir")]),
    ]
    run = tmp_path / "runs" / "fake-1"
    with (
        (tmp_path / "said.txt").open("wb") as said,
        subprocess.Popen(command, stdout=said, stderr=said, cwd=tmp_path) as launcher,
    ):
        try:
            wait_for(lambda: published(run))
            killed = _workers(launcher.pid)
            os.kill(killed[1], signal.SIGKILL)
            wait_for(lambda: b"going on from epoch" in (tmp_path / "said.txt").read_bytes())
            at_restart = published(run)
            wait_for(lambda: published(run) != at_restart)
            again = _workers(launcher.pid)
            assert not set(again.values()) & set(killed.values())
            launcher.send_signal(signal.SIGTERM)
            assert launcher.wait(240) != 0
        finally:
            launcher.kill()
    assert "stopped by SIGTERM before step" in (tmp_path / "said.txt").read_text()
    assert [path.name for path in run.parent.iterdir()] == ["fake-1"]
    run.rename(tmp_path / "run")
    finish(tmp_path, uninterrupted, 3)


def test_a_full_disk_stops_the_run_and_takes_nothing_away(
    uninterrupted_alone: Path, tmp_path: Path
) -> None:
    with Ranks(tmp_path, RUN) as ranks:
        wait_for(lambda: len(published(tmp_path / "run")) > 1)
        ranks.kill()
    before = published(tmp_path / "run")
    with Ranks(tmp_path, RUN, meddle=meddlers.small_files) as ranks:
        assert ranks.wait() == [2]
    (line,) = (line for line in ranks.said().splitlines() if line.startswith("error: "))
    assert "cannot write the checkpoint" in line
    assert "File too large" in line
    assert before[-1] in line
    assert published(tmp_path / "run") == before
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    finish(tmp_path, uninterrupted_alone)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_holds_whole_checkpoints_or_none(small_disk: Path) -> None:
    with Ranks(small_disk, [*RUN, "--keep-checkpoints", 99]) as ranks:
        assert ranks.wait() == [2]
    assert "No space left on device" in ranks.said()
    from effdense.engine.checkpoint import verified

    names = published(small_disk / "run")
    assert names
    for name in names:
        verified(small_disk / "run" / "checkpoints" / name)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    folder = Path("/proc/run")  # root may write to almost anything else
    if os.geteuid():
        folder = tmp_path / "kept" / "run"
        folder.parent.mkdir(mode=0o500)
    with Ranks(tmp_path, [*RUN, "--work-dir", folder], 2) as ranks:
        assert ranks.first_status() == 2
    said = ranks.said()
    assert said.count("\n") == 1
    assert f"error: cannot write {folder}" in said


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def nonsense(file: Path) -> None:
    file.write_text("{}")


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("state.pt", cut, "state.pt has "),
        ("rank-0.pt", flip, "rank-0.pt has changed since it was written"),
        ("run.json", Path.unlink, "run.json is missing"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
        ("manifest.json", nonsense, "manifest.json cannot be understood"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    file: str,
    damage: Callable[[Path], None],
    reason: str,
    uninterrupted_alone: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(uninterrupted_alone, tmp_path / "run")
    *_, before, newest = published(tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / newest / file)
    said = finish(tmp_path, uninterrupted_alone)
    assert f"passed over the checkpoint run/checkpoints/{newest}: {reason}" in said
    epoch, step = (int(part) for part in before.split("-")[1::2])
    assert f"going on from epoch {epoch} of 2, step {step + 1}" in said
    assert (tmp_path / "run" / "checkpoints" / f"damaged-{newest}").is_dir()


def test_where_every_checkpoint_is_damaged_the_run_begins_again(
    uninterrupted_alone: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted_alone, tmp_path / "run")
    for name in published(tmp_path / "run"):
        flip(tmp_path / "run" / "checkpoints" / name / "state.pt")
    said = finish(tmp_path, uninterrupted_alone)
    assert said.count("passed over") == 3
    assert "going on" not in said


def test_two_runs_in_one_work_dir(uninterrupted_alone: Path, tmp_path: Path) -> None:
    with Ranks(tmp_path, RUN) as first:
        wait_for(lambda: published(tmp_path / "run"))
        os.kill(first.processes[0].pid or 0, signal.SIGSTOP)
        for more in ([], ["--overwrite"]):
            with Ranks(tmp_path, [*RUN, *more]) as second:
                assert second.wait() == [2]
            assert f"another run is at work in run (process {first.processes[0].pid} on" in (
                second.said()
            )
        os.kill(first.processes[0].pid or 0, signal.SIGCONT)
        assert first.wait() == [0]
    assert final_state(tmp_path / "run") == final_state(uninterrupted_alone)


def test_a_loss_that_is_not_finite_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    with Ranks(tmp_path, RUN, 2, meddle=meddlers.nan_images) as ranks:
        assert ranks.first_status() == 1
    (line,) = (line for line in ranks.said().splitlines() if line.startswith("error: "))
    assert "the loss is nan, not finite in epoch 1" in line
    assert "try a lower --lr" in line
    assert "the newest checkpoint is run/checkpoints/epoch-00001-step-0000003" in line
    newest = tmp_path / "run" / "checkpoints" / published(tmp_path / "run")[-1]
    state = torch.load(newest / "state.pt", weights_only=True)
    assert all(p.isfinite().all() for p in state["parameters"].values())


def test_steps_that_are_not_finite_are_left_out_up_to_a_limit(tmp_path: Path) -> None:
    skipping = [*RUN, "--non-finite", "skip"]
    with Ranks(tmp_path, skipping, 2, meddle=meddlers.nan_images) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    assert "steps left out so far, as something was not finite: 2" in ranks.said()
    weights = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert all(value.isfinite().all() for value in weights.values())

    limited = [*skipping, "--max-skipped", 1, "--work-dir", "limited"]
    with Ranks(tmp_path, limited, 2, meddle=meddlers.nan_images) as ranks:
        assert ranks.first_status() == 1
    assert "2 steps had a loss or gradient that is not finite, the last of them step 5 of" in (
        ranks.said()
    )


def test_a_process_that_is_stopped_is_named(tmp_path: Path) -> None:
    with Ranks(tmp_path, [*RUN, "--hang-timeout", 6], 3) as ranks:
        wait_for(lambda: published(tmp_path / "run"))
        ranks.send(1, signal.SIGSTOP)
        assert ranks.first_status() == 1
    assert f"rank 1 (process {ranks.processes[1].pid} on" in ranks.said()
    assert "does not answer" in ranks.said()


def test_a_process_that_hangs_in_its_reader_is_named(tmp_path: Path) -> None:
    hanging = [*RUN, "--hang-timeout", 6]
    with Ranks(tmp_path, hanging, 2, meddle=meddlers.stuck_reader) as ranks:
        assert ranks.first_status() == 1
    assert f"rank 1 (process {ranks.processes[1].pid} on" in ranks.said()
    assert "hangs reading the images of step 5 of epoch 1" in ranks.said()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images of two classes, one file of each part not an image any more."""
    root = write_folder(tmp_path / "images", train=8, val=3)
    for part in ("train", "val"):
        cut_off = root / part / "dog" / "001.png"
        cut_off.write_bytes(cut_off.read_bytes()[:200])
    return root


def test_images_that_cannot_be_read(images: Path, tmp_path: Path) -> None:
    run = flags(
        data="imagefolder",
        data_dir=images,
        arch="densenet_bc",
        depth=10,
        growth_rate=4,
        image_size=16,
        epochs=1,
        batch_size=8,
        num_workers=1,
        threads=1,
        work_dir="run",
    )
    with Ranks(tmp_path, run) as ranks:
        assert ranks.wait() == [2]
    unreadable = images / "train" / "dog" / "001.png"
    assert f"error: {unreadable} cannot be read as an image" in ranks.said()
    with Ranks(tmp_path, [*run, "--corrupt-images", "skip", "--overwrite"], 2) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    assert "images that could not be read so far: 2, first" in ranks.said()
    assert (tmp_path / "run" / "test.csv").read_text().splitlines()[1].endswith(",5")
