"""A lock file that one process at a time can hold; the kernel releases it when its holder exits or is killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmdist.errors import Stopped
from lmdist.storage.reading import refuse_link


@contextmanager
def exclusive_lock(path: Path, patience_seconds: float) -> Iterator[None]:
    """Hold the lock `path`; raise Stopped where another process still holds it after `patience_seconds`."""
    import fcntl  # not on Windows, where a machine may sample

    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_link(path)
    with path.open("a") as file:
        until = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise Stopped(f"{path.parent} is in use by another job: wait for its end, or take another folder") from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield
