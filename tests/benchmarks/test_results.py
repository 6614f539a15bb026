"""Command lines, results files and pictures; nothing is measured."""

from __future__ import annotations

import dataclasses

import draw
import memory
import pytest
import scaling
import throughput
import timeline
from harness import pictures, results
from harness.case import Case
from harness.measure import Memory
from harness.providers import DEFAULT

from effdense.machine.tables import table
from effdense.memory.timeline import ROLES, Moment

GIB = 1 << 30


@pytest.fixture
def fake_measurements(monkeypatch):
    """Peaks as fast as one can type: naive grows with the square of depth, effdense linearly."""

    def measured(name, case, **options):
        growth = 2 if name == "naive" else 1
        state = memory.counts.floor(case).state
        return Memory("measured", baseline=1, peak=state + 1000 * case.depth**growth)

    monkeypatch.setattr(memory, "memory", measured)


@pytest.mark.parametrize(
    ("main", "arguments", "says"),
    [
        (memory.main, ["--depth", "251"], "nearest valid depths: 250 and 256"),
        (memory.main, ["--arch", "densenet121", "--sweep", "depth"], "DenseNet-BC"),
        (memory.main, ["--arch", "densenet121", "--growth-rate", "12"], "fixed"),
        (memory.main, ["--providers", "nobody"], "no provider 'nobody'"),
        (memory.main, ["--providers", "nomodule:net"], "no module 'nomodule'"),
        (memory.main, ["--providers", "effdense.reference:net"], "has no 'net'"),
        (throughput.main, ["--providers", "compile:fastest"], "max-autotune"),
        (memory.main, ["--max-depth-for", "plenty"], "12GiB"),
        (memory.main, ["--sweep", "depth", "--points", "41"], "nearest valid depths"),
        (memory.main, ["--arch", "densenet12"], "densenet121"),
        (memory.main, ["--points", "10"], "--sweep"),
        (memory.main, ["--all", "--providers", "naive"], "choose one"),
        (memory.main, ["--image-size", "2"], "at least 4 pixels"),
        (throughput.main, ["--device", "tpu"], "cuda:N"),
        (throughput.main, ["--spatial-dims", "4"], "--spatial-dims"),
        (throughput.main, ["--on", "v100", "--dtype", "bfloat16"], "no published bfloat16"),
        (
            throughput.main,
            ["--spatial-dims", "3", "--providers", "naive", "torchvision"],
            "2-D only",
        ),
        (memory.main, ["--spatial-dims", "1", "--providers", "naive-channels-last"], "3-D only"),
        (throughput.main, ["--batch-size", "0"], "positive integer"),
        (scaling.main, ["--processes", "3"], "divided"),
    ],
)
def test_a_bad_argument_is_one_line(main, arguments, says, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    said = capsys.readouterr().err.strip()
    assert says in said
    assert len(said.splitlines()) == 1


def test_a_sweep_states_its_exponents_and_draws(tmp_path, fake_measurements, capsys):
    output = tmp_path / "sweep.csv"
    arguments = ["--sweep", "depth", "--points", "40", "100", "250", "--providers", "naive"]
    memory.main([*arguments, "effdense-features", "--output", str(output)])
    out = capsys.readouterr().out
    exponents = {
        line.split("|")[1].strip(): line.split("|")[-2].strip()
        for line in out.splitlines()
        if line.startswith("| ")
    }
    assert exponents["naive"] == "2.00"
    assert exponents["effdense-features"] == "1.00"
    assert output.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("wide", [False, True])
def test_rows_come_one_by_one_and_fit_a_hundred_columns(tmp_path, monkeypatch, capsys, wide, kind):
    shown = []

    def measured(name, case, **options):
        shown.append(capsys.readouterr().out)
        live = dict.fromkeys(ROLES, 12345 << 20)
        found = Memory("measured", baseline=1, peak=98765 << 20, live=live | {"total": 7 << 30})
        return found if kind == "cpu" else dataclasses.replace(found, reserved=1, process=1)

    monkeypatch.setattr(memory, "memory", measured)
    monkeypatch.setattr("harness.case.objection", lambda case: None)
    monkeypatch.setattr("harness.results.environment", lambda *_: ENVIRONMENT)
    output = tmp_path / "memory.csv"
    arguments = ["--device", kind, "--output", str(output)] + ["--all"] * wide
    memory.main([*arguments, "--depth", "250"])
    text = "".join([*shown, capsys.readouterr().out])
    names = DEFAULT if wide else memory.QUICK
    # a row is there before the next one is measured
    assert [name for name, before in zip(names, shown[1:], strict=False) if name in before] == list(
        names[:-1]
    )
    assert max(map(len, text.splitlines()[2:-3])) <= 100
    assert {"backward", "training"} <= set(text.split())
    assert "bottlenecks" not in {word for row in text.splitlines() for word in row.split()[1:]}
    assert output.with_suffix(".png").stat().st_size > 10_000


ENVIRONMENT = dict.fromkeys(results.ENVIRONMENT_COLUMNS, "") | {"threads": 1, "memory_bytes": GIB}


def test_results_say_where_they_come_from(tmp_path, fake_measurements):
    output = tmp_path / "memory.csv"
    memory.main(["--providers", "naive", "--output", str(output)])
    rows = results.read(output)
    assert list(rows[0]) == [*results.RESULT_COLUMNS, *results.ENVIRONMENT_COLUMNS]
    (peak,) = [row for row in rows if row["metric"] == "peak"]
    assert peak["kind"] == "measured"
    assert {row["kind"] for row in rows if row["provider"] == "floor"} == {"formula"}
    for column in ("processor", "cores", "torch", "git_revision", "command", "date"):
        assert peak[column], column
    picture = tmp_path / "memory.svg"
    draw.main([str(output), "--output", str(picture)])
    assert "DenseNet-BC" in picture.read_text() or picture.stat().st_size > 10_000


def test_volumes_are_described(tmp_path, fake_measurements, capsys):
    output = tmp_path / "memory.csv"
    arguments = ["--depth", "22", "--image-size", "8", "--spatial-dims", "3", "--all"]
    memory.main([*arguments, "--output", str(output)])
    assert "8x8x8" in capsys.readouterr().out
    rows = results.read(output)
    assert {row["spatial_dims"] for row in rows} == {"3"}
    assert "8x8x8" in pictures.describe(rows[0])
    # those that have no networks of volumes are left out where nobody is named
    names = {row["provider"] for row in rows if row["metric"] == "peak"}
    assert "naive-channels-last" in names
    assert not any(name.startswith("torchvision") for name in names)


def test_files_of_cases_have_names_of_their_own():
    case = Case("densenet_bc", 22, 12, 2, 8)
    labels = {dataclasses.replace(case, spatial_dims=dims).label() for dims in (1, 2, 3)}
    assert len(labels) == 3
    assert case.label() == "bc22-k12-b2-8px-float32-cpu"


def test_what_does_not_fit_is_shown_by_its_prediction(tmp_path, monkeypatch, capsys):
    def measured(name, case, **options):
        return Memory("does not fit", "needs 7.0 GiB by prediction", predicted=7 * GIB)

    monkeypatch.setattr(memory, "memory", measured)
    output = tmp_path / "memory.csv"
    memory.main(["--providers", "naive", "--output", str(output)])
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("naive"))
    assert " 7,168 " in row
    assert row.endswith("predicted: needs 7.0 GiB by prediction")
    rows = [row for row in results.read(output) if row["provider"] == "naive"]
    assert [(row["metric"], row["kind"], row["value"]) for row in rows] == [
        ("peak", "measured", ""),
        ("predicted peak", "formula", str(7 * GIB)),
    ]


def test_an_interrupted_run_keeps_its_rows(tmp_path, monkeypatch, capsys):
    known = iter([Memory("measured", baseline=1, peak=5 * GIB)])

    def measured(*args, **options):
        try:
            return next(known)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(memory, "memory", measured)
    output = tmp_path / "memory.csv"
    arguments = ["--providers", "naive", "checkpoint", "--output", str(output)]
    with pytest.raises(SystemExit) as exit:
        memory.main(arguments)
    assert exit.value.code == 130
    assert str(output) in capsys.readouterr().err
    peaks = [row for row in results.read(output) if row["metric"] == "peak"]
    assert [row["provider"] for row in peaks] == ["naive"]


@pytest.mark.parametrize(
    ("main", "option"),
    [(throughput.main, ["--on", "h100"]), (scaling.main, ["--processes", "8", "--on", "h100"])],
)
def test_a_projection_is_labelled_and_never_drawn(main, option, tmp_path, capsys):
    output = tmp_path / "projection.csv"
    arguments = ["--depth", "22", "--dtype", "bfloat16", *option, "--output", str(output)]
    main(arguments)
    assert "PROJECTION, not a measurement" in capsys.readouterr().out
    rows = results.read(output)
    assert {row["kind"] for row in rows} == {"projection"}
    assert "cpu" not in {row["device"] for row in rows}
    with pytest.raises(ValueError, match="projection"):
        pictures.picture(throughput.draw, [output], tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("text", "says"), [("a,b\n1,2\n", "no column"), ("", "no column"), (None, "no rows")]
)
def test_draw_refuses_other_files(tmp_path, capsys, text, says):
    other = tmp_path / "other.csv"
    columns = [*results.RESULT_COLUMNS, *results.ENVIRONMENT_COLUMNS]
    other.write_text(",".join(columns) + "\n" if text is None else text)
    with pytest.raises(SystemExit):
        draw.main([str(other)])
    said = capsys.readouterr().err.strip()
    assert says in said
    assert len(said.splitlines()) == 1


def test_pictures_of_throughput_and_scaling(tmp_path):
    case = Case("densenet_bc", 22, 6, 2, 8)
    for benchmark, metrics in {
        "throughput": ["step time"],
        "scaling": ["weak step time", "strong step time"],
    }.items():
        path = tmp_path / f"{benchmark}.csv"
        with results.Recorder(path, benchmark, "cpu", 1) as recorder:
            for metric in metrics:
                for processes in (1, 2):
                    for sample in range(3):
                        recorder.add(
                            "naive",
                            case,
                            metric,
                            1.0 + sample / 10,
                            "s",
                            sample=sample,
                            processes=processes,
                        )
        draw.main([str(path), "--output", str(tmp_path / f"{benchmark}.png")])
        assert (tmp_path / f"{benchmark}.png").stat().st_size > 10_000


def test_a_timeline_is_recorded_and_drawn(tmp_path, capsys):
    output = tmp_path / "timeline.csv"
    arguments = ["--depth", "10", "--growth-rate", "4", "--batch-size", "2", "--threads", "1"]
    timeline.main([*arguments, "--points", "50", "--output", str(output)])
    assert "| effdense-features" in capsys.readouterr().out
    assert output.with_suffix(".png").stat().st_size > 10_000
    rows = results.read(output)
    for provider in timeline.DEFAULT:
        own = [row for row in rows if row["provider"] == provider]
        shares = [float(row["value"]) for row in own if row["metric"] == "moment"]
        assert shares == sorted(shares)
        assert 0 <= shares[0] < 50 < shares[-1] <= 100
        # two stretches hold the end of a phase and the beginning of the next
        assert len(shares) <= 50 + 2
        assert {row["detail"] for row in own} == {"forward", "backward", "update"}
        per_moment = [row["metric"] for row in own if row["sample"] == "0"]
        assert per_moment == ["moment", *(f"live {role}" for role in ROLES)]


def test_a_stretch_of_a_timeline_shows_its_highest_moment():
    sizes = {0.0: 1, 1.0: 5, 2.0: 2, 6.0: 3, 10.0: 4}
    moments = [Moment(seconds, "forward", {"features": n}) for seconds, n in sizes.items()]
    assert [moment.total for moment in timeline.thinned(moments, 2)] == [5, 4]


def test_quantiles():
    assert results.quantiles([3.0, 1.0, 2.0]) == pytest.approx((1.4, 2.0, 2.6))
    assert results.quantiles([5.0]) == (5.0, 5.0, 5.0)
    with pytest.raises(ValueError, match="no values"):
        results.quantiles([])


def test_a_table_is_markdown():
    lines = table(["a", "b"], [["x", 1], ["longer", 22]]).splitlines()
    assert lines == ["| a      |  b |", "| :----- | -: |", "| x      |  1 |", "| longer | 22 |"]
