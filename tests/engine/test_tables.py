"""Tables of images: what they say, and what they may not."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from effdense.engine.data.datasets import load
from effdense.engine.data.tables import Part, Table, read_table
from effdense.engine.options import TrainConfig
from effdense.errors import UserError


def table(path: Path, text: str | bytes, **options: Any) -> Table:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_table(TrainConfig(data="csv", table=path, **options).resolved())


def names(part: Part) -> list[str]:
    return [name.decode() for name in part.names]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


CHEXPERT = """image,split,patient,Edema,Fracture
a.png,train,1,1.0,
b.png,train,1,-1,0
c.png,train,2,,
d.png,valid,3,0,1
e.png,test,4,1,1
"""


def test_several_labels_an_image(path: Path) -> None:
    found = table(path, CHEXPERT, label_columns=("Edema", "Fracture"), group_column="patient")
    assert found.classes == ("Edema", "Fracture")
    assert (names(found.train), names(found.val)) == (["a.png", "b.png"], ["d.png"])
    np.testing.assert_array_equal(found.train.labels, [[1, math.nan], [0, 0]])
    assert found.val.labels.tolist() == [[0, 1]]
    assert found.notes == (
        "1 test images are left alone",
        "1 images without any label are left out",
        "1 uncertain labels are taken for zeros",
    )
    for uncertain, value in (("ones", 1.0), ("ignore", math.nan)):
        options: Any = {"label_columns": ("Edema", "Fracture"), "uncertain": uncertain}
        label = float(table(path, CHEXPERT, **options).train.labels[1, 0])
        assert label == value or (math.isnan(label) and math.isnan(value))


def test_as_excel_writes_it(path: Path) -> None:
    """A byte-order mark, CR LF, quoted commas and line ends."""
    text = '\ufeffimage,label,split\r\n"a, b.png","one, two",train\r\n"c\nd.png",x,val\r\n\r\n'
    found = table(path, text)
    assert (names(found.train), names(found.val)) == (["a, b.png"], ["c\nd.png"])
    assert found.classes == ("one, two", "x")


def test_names_in_one_column(path: Path) -> None:
    text = "image,label,split\n1.png,Mass|Edema,train\n2.png,,train\n3.png,Mass,val\n"
    found = table(path, text, task="multilabel")
    assert found.classes == ("Edema", "Mass")
    assert found.train.labels.tolist() == [[1, 1], [0, 0]]
    one = table(path, "image,ill,split\n1.png,1,train\n2.png,0,val\n", label_columns=("ill",))
    assert (one.classes, one.train.labels.tolist()) == (("0", "1"), [1])
    two = table(
        path,
        "image,ill,split\n1.png,1,train\n2.png,0,val\n",
        label_columns=("ill",),
        task="multilabel",
    )
    assert (two.classes, two.train.labels.tolist()) == (("ill",), [[1]])


def test_numbered_classes_are_in_the_order_of_numbers(path: Path) -> None:
    rows = "".join(f"{i}.png,{i},{'val' if i == 3 else 'train'}\n" for i in (10, 9, 3, 2))
    assert table(path, f"image,label,split\n{rows}").classes == ("2", "3", "9", "10")


def test_splits_by_group_are_the_same_for_every_order_and_seed(path: Path) -> None:
    rows = [f"{i}.png,{i % 2},{i // 3}" for i in range(60)]
    head = "image,label,patient\n"
    found = table(path, head + "\n".join(rows), group_column="patient", val_fraction=0.25)
    assert found.notes == (
        "there is no column split: 15 of 60 images are drawn at random to test on, "
        "--val-fraction 0.25",
    )
    tested = set(names(found.val))
    assert len(tested) == 15
    patients = {int(name[:-4]) // 3 for name in tested}
    assert len(patients) == 5
    assert not patients & {int(name[:-4]) // 3 for name in names(found.train)}
    again = table(
        path, head + "\n".join(rows[::-1]), group_column="patient", val_fraction=0.25, seed=3
    )
    assert set(names(again.val)) == tested


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (CHEXPERT, {}, "must have one column label, its header has image, split, patient, Edema"),
        (CHEXPERT, {"label_columns": ("patient",), "image_column": "file"}, "one column file"),
        (
            "image,label,split,p\na,x,train,7\nb,x,val,7\nc,x,val,8\n",
            {"group_column": "p"},
            "1 of 2 ps are in two splits, such as 7",
        ),
        ("image,label,split\na,x,train\na,x,val\n", {}, "1 of 1 images are in two splits"),
        (
            "image,label,split,p\na,x,train,1\nb,y,train,2\na,x,val,3\n",
            {"group_column": "p"},
            "1 of 2 images are in two splits, such as a:",
        ),
        ("image,label,split\nb/a,x,train\n./b//a,x,val\n", {}, "1 of 1 images are in two"),
        (
            "image,label,p\n" + "".join(f"a,x,{i}\n" for i in range(20)),
            {"group_column": "p"},
            "1 of 1 images are in two splits",
        ),
        (
            "image,label,split\na,x,train\nb,x,val\n",
            {"split_column": "spilt"},
            "must have one column spilt, its header has image, label, split: name columns",
        ),
        ("image,label, Split\na,x,train\nb,x,val\n", {}, "must have one column split"),
        ("image,label,split,split\na,x,train,val\nb,x,val,train\n", {}, "one column split"),
        ("image,label,split\na,x,holdout\n", {}, "line 2: split must be train, val or test"),
        ("image,label\na,x\nb\n", {}, "line 3: 1 cells, the header has 2"),
        ("image,label,split\na,x,train\n", {}, "no image with a label in the val split"),
        ("image,label\n", {}, "lists no image"),
        ("", {}, "is empty"),
        ("image,a,b\nx,1,2\n", {"label_columns": ("a", "b")}, "must be 1, 0, -1 or empty, got '2'"),
        (b"image,label\n\xff,x\n", {}, "is not a CSV file in UTF-8"),
        ('image,label\n"a"b,x\n', {}, "is not a CSV file"),
    ],
)
def test_what_a_table_may_not_say(
    text: str | bytes, options: dict[str, Any], said: str, path: Path
) -> None:
    with pytest.raises(UserError) as error:
        table(path, text, **options)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    config = TrainConfig(data="csv", table=tmp_path / "none.csv").resolved()
    with pytest.raises(UserError, match=r"cannot read the table .*No such file"):
        read_table(config)
    with pytest.raises(UserError, match=r"--table must be given with --data csv, and only then$"):
        TrainConfig(data="csv").resolved()
    with pytest.raises(UserError, match="--task must be left out: digits has one class"):
        TrainConfig(task="multilabel").resolved()


READ = """
import sys, time
from pathlib import Path
from effdense.engine.data.tables import read_table
from effdense.engine.options import TrainConfig
from effdense.machine.memory import peak_resident_bytes

columns = tuple(f"finding {i}" for i in range(14))
config = TrainConfig(
    data="csv", table=Path(sys.argv[1]), label_columns=columns, group_column="patient"
).resolved()
began, before = time.process_time(), peak_resident_bytes()
found = read_table(config)
seconds, peak = time.process_time() - began, peak_resident_bytes() - before
print(len(found.train.names), seconds, peak / 2**20)
"""


@pytest.mark.slow
def test_a_million_rows(path: Path) -> None:
    """In a fresh process: one that has run tests may have been as large before."""
    with path.open("w", newline="") as file:
        file.write(",".join(["image", "patient", *(f"finding {i}" for i in range(14))]) + "\n")
        labels = ",1,,0,-1" * 3 + ",0,\n"
        file.writelines(f"folder/image-{i}.png,{i // 4}{labels}" for i in range(1_000_000))
    read = [sys.executable, "-c", READ, str(path)]
    process = subprocess.run(read, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    found, seconds, mebibytes = map(float, process.stdout.split())
    assert found == 800_000
    print(f"{seconds:.1f} s, {mebibytes:.0f} MiB")
    assert seconds < 60
    assert 10 < mebibytes < 1000


def test_the_images_of_a_table(path: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in "abcd":
        pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    rows = "a.png,1,0,train\nb.png,0,,train\nc.png,,1,val\nd.png,1,1,val\n"
    path.write_text(f"image,x,y,split\n{rows}")
    options: Any = {"data": "csv", "table": path, "label_columns": ("x", "y"), "image_size": 16}
    config = TrainConfig(**options, data_dir=tmp_path, num_workers=0).resolved()
    data = load(config, download=False)
    assert (data.classes, data.in_channels, len(data.train)) == (("x", "y"), 3, 2)
    ((images, labels),) = data.test.batches([torch.arange(2)], None, torch.device("cpu"))
    assert images.shape == (2, 3, 16, 16)
    np.testing.assert_array_equal(labels, [[math.nan, 1], [1, 1]])
    elsewhere = TrainConfig(**options, data_dir=tmp_path / "elsewhere").resolved()
    with pytest.raises(UserError, match=r"a.png is not there: .*--data-dir"):
        load(elsewhere, download=False)
