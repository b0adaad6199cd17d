"""Files below a folder or like a pattern, through links to folders, and whether those of a run would be among them."""

import glob
import os
from collections import deque
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path

_ANY_DEPTH = "**"


def files_below(folder: Path) -> list[Path]:
    """Files at any depth.

    Links to folders are followed. A folder that is reached twice is read once, by its own name where that lies below;
    one that holds `folder` is not read: the link leads back.
    """
    return _walk(folder)[0]


def folders_read(folder: Path) -> list[Path]:
    """The folders all of which `files_below` reads: itself, and what links lead to; with their real names."""
    return _walk(folder)[1]


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    root = Path(os.path.realpath(folder))
    entered = set(root.parents)
    files: list[Path] = []
    tops: list[Path] = []
    # Links wait until all that is reached without them has been.
    waiting = deque([folder])
    while waiting:
        top = waiting.popleft()
        real_top = Path(os.path.realpath(top))
        if real_top in entered:
            continue
        tops.append(real_top)
        for name, folders, names in os.walk(top):
            current = Path(name)
            real = real_top / current.relative_to(top)
            if real in entered:
                folders.clear()
                continue
            entered.add(real)
            folders.sort()
            waiting += [path for below in folders if (path := current / below).is_symlink()]
            files += [path for file in names if (path := current / file).is_file()]
    return files, tops


def folder_of_pattern(path: Path) -> Path:
    """What everything like a pattern lies in."""
    return Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))


def is_recursive(path: Path) -> bool:
    """Whether a pattern has a `**`."""
    return _ANY_DEPTH in path.parts


def roots_of_pattern(path: Path) -> list[Path]:
    """The folders below which a pattern with a `**` looks at any depth."""
    folder = folder_of_pattern(path)
    before = list(takewhile(lambda part: part != _ANY_DEPTH, path.relative_to(folder).parts))
    found = folder.glob(str(Path(*before))) if before else [folder]
    return sorted(root for root in found if root.is_dir())


def files_like(path: Path) -> list[Path]:
    """Files like a pattern; links to folders are followed as in `files_below`.

    Raises ValueError where it is no pattern.
    """
    folder = folder_of_pattern(path)
    if not is_recursive(path) or any(_ANY_DEPTH in part and part != _ANY_DEPTH for part in path.parts):
        return [file for file in folder.glob(str(path.relative_to(folder))) if file.is_file()]
    pattern = path.parts[path.parts.index(_ANY_DEPTH) :]
    return [
        file
        for root in roots_of_pattern(path)
        for file in files_below(root)
        if _is_like(file.relative_to(root).parts, pattern)
    ]


def _is_like(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == _ANY_DEPTH:
        return _is_like(parts, pattern[1:]) or (bool(parts) and _is_like(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _is_like(parts[1:], pattern[1:])


def reaches_into(path: Path, folder: Path, files: Sequence[str], folders: Sequence[str]) -> bool:
    """Whether a pattern may be like a file of a folder that holds such files and folders by name.

    Of what lies in those folders nothing is known: any file may.
    """
    base = folder_of_pattern(path)
    pattern = [*map(glob.escape, base.resolve().parts), *path.relative_to(base).parts]
    inside = folder.resolve().parts
    if _ANY_DEPTH in pattern:
        # Of the folders below which it looks at any depth: whether the folder is in one, or may hold one.
        pattern = pattern[: pattern.index(_ANY_DEPTH)]
        if len(pattern) <= len(inside):
            return all(map(fnmatchcase, inside, pattern))
        names = folders
    elif len(pattern) <= len(inside):
        return False
    else:
        names = files if len(pattern) == len(inside) + 1 else folders
    found = all(map(fnmatchcase, inside, pattern)) and any(fnmatchcase(name, pattern[len(inside)]) for name in names)
    return found or _links_into(path, folder.resolve(), files, folders)


def _links_into(path: Path, folder: Path, files: Sequence[str], folders: Sequence[str]) -> bool:
    """Whether a pattern without a `**` looks into `folder`, or into one of its folders, by another name."""
    base = folder_of_pattern(path)
    *before, last = path.relative_to(base).parts or ("",)
    if _ANY_DEPTH in before or not before:
        return False
    for found in base.glob(str(Path(*before))):
        real = found.resolve()
        if real == folder and any(fnmatchcase(name, last) for name in files):
            return True
        if real.is_relative_to(folder) and real != folder and real.relative_to(folder).parts[0] in folders:
            return True
    return False
