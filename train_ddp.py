"""Train a DenseNet on one process or on many.

    python train_ddp.py [OPTIONS]
    torchrun --nproc_per_node N train_ddp.py [OPTIONS]

``--help`` lists the options. Everything is in :mod:`effdense.engine`.
"""

from effdense.commands.train import main

if __name__ == "__main__":
    main("train_ddp.py")
