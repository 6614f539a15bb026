"""Train a DenseNet on one process or on many.

    python train_ddp.py [OPTIONS]
    torchrun --nproc_per_node N train_ddp.py [OPTIONS]

``--help`` lists the options. Everything is in :mod:`effdense.engine`.
"""

import sys

from effdense.engine.config import parse_command_line
from effdense.errors import one_line_errors


def main() -> None:
    with one_line_errors():
        options = parse_command_line(sys.argv[1:])
        # after the options: a mistyped one is answered at once
        from effdense.engine.training import run

        run(options)


if __name__ == "__main__":
    main()
