"""``recipes``: the defaults that each data set brings."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.recipes import recipe_table

DATA_SETS = """\
digits        the 1,797 handwritten digits that scikit-learn ships
cifar10       fetched by --download, as cifar100 and svhn are
imagefolder   images in DATA_DIR/train/CLASS/ and DATA_DIR/val/CLASS/
webdataset    shards DATA_DIR/train/NAME-NUMBER.tar and DATA_DIR/val/... of KEY.jpg and KEY.cls
              (the label's number); names of the classes in DATA_DIR/classes.txt where that is
csv           images in DATA_DIR that a --table lists, with their labels
fake          noise that can be learnt, for trials

Standard augmentation: digits, shifts by up to 1 pixel; cifar10, cifar100 and fake, shifts by up to
4 pixels and mirroring; svhn, the shifts alone; imagefolder, webdataset and csv, random resized
crops and mirroring; volumes, crops and mirroring along each axis. trivial-augment does one more
thing to each picture, drawn at random; mixup mixes each with another of its batch.
"""


@dataclass(frozen=True)
class Options:
    """List the data sets of train, and the defaults that each brings."""


def run(options: Options) -> None:
    print(f"{DATA_SETS}\n{recipe_table()}")
