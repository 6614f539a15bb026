"""The training engine under ``train_ddp.py``.

``config`` says what a run is, ``data`` what it reads, ``distributed`` how its processes work
together, ``training`` is the loop, ``records`` what it writes and ``plots`` how that is drawn.
"""
