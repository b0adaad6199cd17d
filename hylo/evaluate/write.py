"""Pages and cards, so that what exists is whole."""

import os
from contextlib import suppress
from pathlib import Path

from hylo.files import naming, partial_of


def write_text(path: Path, text: str) -> None:
    """Writes text to a temporary name, and moves it to `path` when it is on the disk.

    Raises OSError, which names `path`, where it cannot be written; what was there stays.
    """
    work = partial_of(path)
    try:
        with naming(path), work.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        work.replace(path)
    except BaseException:
        with suppress(OSError):
            work.unlink()
        raise
