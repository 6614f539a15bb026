"""``train``: what ``train_ddp.py`` does."""

from __future__ import annotations

from ..engine.options import TrainConfig as Options
from ..engine.recipes import recipe_table
from . import front_end

DESCRIPTION = """Train a DenseNet: in one process with "python train_ddp.py", in N with
"torchrun --nproc_per_node N train_ddp.py".

Data sets: digits, the 1,797 handwritten digits that scikit-learn ships; cifar10, cifar100 and
svhn, which --download fetches; imagefolder, images in DATA_DIR/train/CLASS/ and
DATA_DIR/val/CLASS/; webdataset, shards DATA_DIR/train/NAME-NUMBER.tar and DATA_DIR/val/... of
KEY.jpg and KEY.cls (the label's number), names of the classes in DATA_DIR/classes.txt where that
is there; fake, noise that can be learnt.

Standard augmentation: digits, shifts by up to 1 pixel; cifar10, cifar100 and fake, shifts by up
to 4 pixels and mirroring; svhn, the shifts alone; imagefolder and webdataset, random resized
crops and mirroring.

Defaults that depend on the data set:
"""
DESCRIPTION += recipe_table()


def main(program: str) -> None:
    """What a script called ``program`` does."""
    front_end.main(Options, run, program=program, description=DESCRIPTION)


def run(options: Options) -> None:
    # after the options: a mistyped one is answered at once
    from ..engine import training

    training.run(options)
