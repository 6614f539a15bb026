"""The training engine under ``train_ddp.py``.

``training`` is a run from its options to its weights: read it first. ``config`` says what a run
is, ``data`` what it reads, ``networks`` and ``trainer`` what learns, ``distributed`` how its
processes work together, ``resumption`` how it survives them, ``checkpoint`` what it survives by,
``progress`` what it shows, ``records`` what it writes and ``plots`` how that is drawn.
"""
