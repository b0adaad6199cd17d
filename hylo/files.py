"""Writing files so that what exists is whole: to a temporary name first, then moved."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hylo.errors import HyLoError


def expand_user(path: str | Path) -> Path:
    """With ~ spelled out. Raises HyLoError where that user does not exist, or no path can be so named."""
    if "\0" in str(path):
        raise HyLoError(f"{str(path)!r} is no path: it holds a null character")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise HyLoError(f"{path} does not exist") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, as those of writing and flushing do not, gets this name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new directory beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    Where `path` is a link, it stays one, and what it leads to is written.

    Raises HyLoError where `path` exists and `overwrite` is false, before anything is written. An OSError of the block
    that names no file names `path`.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise HyLoError(f"{path} already exists; choose another output or pass --overwrite")
    if path.exists() and not path.is_dir():
        raise HyLoError(f"{path} is a file; expected a directory to write")
    try:
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except RuntimeError:
        raise HyLoError(f"cannot write to {path}: it is a link that leads to itself") from None
    except OSError as error:
        raise HyLoError(f"cannot write to {path.parent}: {error.strerror}") from None
    try:
        work.chmod(0o755)
        with naming(path):
            yield work
        if target.exists():
            old = work.with_name(work.name.replace(".partial-", ".old-"))
            target.replace(old)
            work.replace(target)
            shutil.rmtree(old)
        else:
            work.replace(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def sync_tree(folder: Path, *, recursive: bool = True) -> None:
    """Waits until a folder, and everything in it, is on the disk and would outlive the machine's power."""
    for path in [folder, *(folder.rglob("*") if recursive else ())]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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


def write_json(path: Path, value: Any) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def partial_of(path: Path) -> Path:
    """Where `write_text` writes first: what a killed process leaves."""
    return path.with_name(f".{path.name}.partial")


def read_json(path: Path) -> Any:
    """Raises HyLoError where the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise HyLoError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HyLoError(f"{path} is not readable JSON: {error}") from None
