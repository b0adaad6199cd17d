"""Rows of JSON in compressed files, which are whole or not there."""

import importlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hylo.data.tables import read_json_rows
from hylo.errors import HyLoError

SUFFIX = ".jsonl.zst"


class RowWriter:
    """Writes rows; `rows` says how many."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream, self.rows = stream, 0

    def write(self, row: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows += 1


@contextmanager
def writing(path: Path) -> Iterator[RowWriter]:
    """A writer of a .jsonl.zst file that becomes `path` when the block ends well.

    Raises HyLoError where zstandard is not installed or the file cannot be written.
    """
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise HyLoError("writing a corpus needs zstandard; install it with: pip install 'hylo[corpus]'") from None
    work = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with work.open("wb") as file:
            compressed = zstandard.ZstdCompressor(level=6).stream_writer(file, closefd=False)
            with io.TextIOWrapper(compressed, encoding="utf-8", errors="replace") as stream:
                yield RowWriter(stream)
        work.replace(path)
    except OSError as error:
        raise HyLoError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        work.unlink(missing_ok=True)


def reading(path: Path) -> Iterator[Mapping[str, Any]]:
    """Raises HyLoError where the file is missing or damaged."""
    return read_json_rows(path)
