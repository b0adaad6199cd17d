"""One process at a time in a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from hylo.errors import HyLoError

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes that ask out of a folder. However the process ends, the system lets go of the lock.

    Raises HyLoError where another process is in it.
    """
    path = folder / LOCK_FILE
    with _taken(path):
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _taken(path: Path) -> TextIO:
    while True:
        try:
            file = path.open("w")
        except OSError as error:
            raise HyLoError(f"cannot write to {path.parent}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise HyLoError(f"another run is at work in {path.parent}; wait for it or choose another output") from None
        except OSError:
            # A file system without locks.
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        # The one before took the file with it.
        file.close()
