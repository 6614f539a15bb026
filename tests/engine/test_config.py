from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest

from effdense.commands import recipes, train
from effdense.engine import options as options_module
from effdense.engine.options import TrainConfig
from effdense.engine.recipes import RECIPES, Recipe
from effdense.errors import UserError


def parse(options: list[str]) -> TrainConfig:
    return train.parse(options, "train_ddp.py")


def help_text(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    assert not exit_.value.code
    return capsys.readouterr().out


def test_the_paper_s_cifar_recipe() -> None:
    for data in ("cifar10", "cifar100"):
        config = TrainConfig(data=data).resolved()
        assert (config.arch, config.depth, config.growth_rate) == ("densenet_bc", 100, 12)
        assert (config.optimizer, config.momentum, config.weight_decay) == ("sgd", 0.9, 1e-4)
        assert (config.batch_size, config.epochs, config.drop_rate) == (64, 300, 0.0)
        rates = [config.lr_at(epoch / 300) for epoch in (0, 149, 150, 224, 225, 299)]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_svhn_and_imagenet_recipes() -> None:
    svhn = TrainConfig(data="svhn").resolved()
    assert (svhn.epochs, svhn.drop_rate, svhn.augment) == (40, 0.2, "none")
    assert [svhn.lr_at(e / 40) for e in (19, 20, 30)] == pytest.approx([0.1, 0.01, 0.001])
    imagenet = TrainConfig(data="imagefolder").resolved()
    assert (imagenet.arch, imagenet.image_size, imagenet.batch_size) == ("densenet121", 224, 256)
    assert [imagenet.lr_at(e / 90) for e in (29, 30, 59, 60)] == pytest.approx(
        [0.1, 0.01, 0.01, 0.001]
    )


def test_recipes_that_follow_another_option() -> None:
    assert TrainConfig(optimizer="adam").resolved().lr == 1e-3
    assert TrainConfig(optimizer="adam", lr=0.5).resolved().lr == 0.5
    assert TrainConfig(data="cifar10", augment="none").resolved().drop_rate == 0.2
    assert TrainConfig(data="cifar10", augment="none", drop_rate=0.0).resolved().drop_rate == 0.0


def test_cosine_goes_from_the_rate_to_zero() -> None:
    config = TrainConfig(schedule="cosine", lr=0.4).resolved()
    assert [config.lr_at(p) for p in (0, 0.5, 1)] == pytest.approx([0.4, 0.2, 0.0])


def test_the_rate_warms_up_and_follows_the_batch_size() -> None:
    config = TrainConfig(epochs=10, lr=0.4, schedule="multistep", milestones=(0.5,))
    warm = dataclasses.replace(config, warmup_epochs=2.0).resolved()
    assert [warm.lr_at(p) for p in (0, 0.1, 0.2, 0.5)] == pytest.approx([0.04, 0.22, 0.4, 0.04])
    scaled = dataclasses.replace(config, batch_size=512, lr_batch_size=256).resolved()
    assert [scaled.lr_at(p) for p in (0, 0.5)] == pytest.approx([0.8, 0.08])
    with pytest.raises(UserError, match="--warmup-epochs must be a number, at least 0"):
        TrainConfig(warmup_epochs=-1.0).resolved()
    with pytest.raises(UserError, match="--augment must be something else for digits"):
        TrainConfig(augment="trivial-augment").resolved()
    with pytest.raises(UserError, match="--augment must be paper or none for volumes"):
        TrainConfig(data="imagefolder", spatial_dims=3, augment="mixup").resolved()


def test_every_option_is_resolved_and_given_ones_are_kept() -> None:
    for data in RECIPES:
        table = Path("table.csv") if data == "csv" else None
        options: Any = {"data": data, "table": table}
        resolved = dataclasses.asdict(TrainConfig(**options).resolved())
        left_open = {"model", "model_args", "weights", "freeze", "budget", "work_dir", "best_by"}
        left_open |= {"spacing", "crop", "window", "tf32"}
        left_open |= set() if table else {"table"}
        left_open |= set() if resolved["arch"] == "densenet_bc" else {"depth", "growth_rate"}
        assert {k for k, v in resolved.items() if v is None} == left_open
        assert set(resolved) == {field.name for field in dataclasses.fields(TrainConfig)}
    given = TrainConfig(data="cifar10", epochs=7, milestones=(0.1,), growth_rate=3, seed=5)
    resolved = given.resolved()  # type: ignore[assignment]
    for name in ("epochs", "milestones", "growth_rate", "seed"):
        assert getattr(resolved, name) == getattr(given, name)


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "usable_cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert TrainConfig().resolved(world_size=4, local_world_size=4).threads == 3
    assert TrainConfig().resolved(world_size=4, local_world_size=2).threads == 6
    assert TrainConfig().resolved(world_size=16, local_world_size=16).threads == 1
    assert TrainConfig(threads=5).resolved(world_size=4, local_world_size=4).threads == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert TrainConfig().resolved().threads == 2
    assert TrainConfig(threads=5).resolved().threads == 5
    # torchrun's own default is nobody's wish
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert TrainConfig().resolved().threads == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert TrainConfig().resolved(world_size=4, local_world_size=4).threads == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lr", "0"], "--lr must be a positive number, got 0.0"),
        (["--lr", "nan"], "--lr must be a positive number, got nan"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--batch-size", "2"], "--batch-size must be at least 3, one image for each of the 3"),
        (["--momentum", "1"], "--momentum must be in [0, 1)"),
        (["--label-smoothing", "-0.1"], "--label-smoothing must be in [0, 1)"),
        (["--drop-rate", "1.5"], "--drop-rate must be in [0, 1)"),
        (["--weight-decay", "-1"], "--weight-decay must be a number, at least 0"),
        (["--milestones", "0.5", "150"], "--milestones must be fractions between 0 and 1"),
        (["--milestones", "0.5", "1"], "--milestones must be fractions between 0 and 1"),
        (["--image-size", "64"], "--image-size must be left out for digits"),
        (["--download"], "--download must be left out"),
        (["--step-in-backward"], "--step-in-backward does not go with several processes, which"),
        (["--step-in-backward", "--accumulate", "2"], "does not go with --accumulate"),
        (["--step-in-backward", "--clip-grad", "1"], "does not go with --clip-grad"),
        (["--step-in-backward", "--non-finite", "skip"], "does not go with --non-finite skip"),
        (["--step-in-backward", "--dtype", "float16"], "does not go with --dtype float16"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--num-workers", "-1"], "--num-workers must be at least 0"),
        (["--seed", "-1"], "--seed must be at least 0"),
    ],
)
def test_values_that_cannot_be(options: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(options).resolved(world_size=3)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--epoch-count", "3"], "--epoch-count"),
        (["--data", "mnist"], "'mnist'"),
        (["--epochs"], "--epochs"),
        (["--epochs", "many"], "'many'"),
        (["surplus"], "surplus"),
    ],
)
def test_options_that_do_not_exist(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as error:
        parse(options)
    assert said in str(error.value)
    assert "--help" in str(error.value)
    assert not {"\n", "│", "─"} & set(str(error.value))
    for part in ("---", "Perhaps", "full helptext"):
        assert part not in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_help_names_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys)
    options = text[text.index("show this help message") :].replace("│", " ")
    assert all(len(line) <= 80 for line in text.splitlines())
    entries = re.split(r"\n {1,4}(?=--)", options)
    for field in dataclasses.fields(TrainConfig):
        option = f"--{field.name.replace('_', '-')}"
        (entry,) = (e for e in entries if option in e.split("(")[0].split()[:3:2])
        assert "(default:" in entry, entry
        described = entry.split("(default:")[0].split()
        assert len(described) > 3, entry


def test_recipes_are_each_data_set_s_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    recipes.run(recipes.Options())
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.split() == list(RECIPES))
    for field in dataclasses.fields(Recipe):
        (row,) = (r for r in lines if r.startswith(f"  --{field.name.replace('_', '-')} "))
        for name in RECIPES:
            shown = row[header.index(f" {name}") + 1 :].split("  ")[0].split()
            table = Path("table.csv") if name == "csv" else None
            options: Any = {"data": name, "table": table}
            value = getattr(TrainConfig(**options).resolved(), field.name)
            expected = value if isinstance(value, tuple) else (value,)
            for one, item in zip(shown, expected, strict=True):
                if isinstance(item, float):
                    assert float(one) == pytest.approx(item, abs=5e-3)
                else:
                    assert one == ("-" if item is None else str(item))


def test_only_rank_zero_prints_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert help_text(capsys) == ""
