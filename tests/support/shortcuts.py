"""What takes longer than to train a tiny model, once a process: importing this is done before the processes of jobs.py fork.

The parser of recipes is built once, and the picture of the losses, which each run draws twice, is a line of text. A test of one
of them takes the original, and processes that are started as by a user have both.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch._dynamo  # noqa: F401 - the first optimizer of a process imports it

from lmdist import config
from lmdist import train as train  # with what it imports
from lmdist.storage.atomic import write_atomic
from lmdist.training import loop as loop
from lmdist.training import report

config.parser = cache(config.parser)
config.parser()


def no_picture(metrics: Path, picture: Path) -> None:
    """Stand in for lmdist.tracking.plot.plot_losses."""
    write_atomic(picture, "no picture\n")  # an empty file would be uploaded in chunks, which proxies of tests do not read


report.plot_losses = no_picture
