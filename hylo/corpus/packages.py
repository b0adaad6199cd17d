"""Packages, downloaded by their own tools and unpacked. Nothing of them is installed or run."""

import fnmatch
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from hylo.corpus.spec import PackageSource
from hylo.errors import HyLoError

_SECONDS = 900


class MissingPackageError(HyLoError):
    """A package that cannot be had; the message says which, and why."""


@dataclass(frozen=True)
class Archive:
    """A package as it was downloaded.

    Attributes:
        version: which may be another than was asked for, where that one is no longer to be had.
    """

    path: Path
    version: str

    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(source: PackageSource, cache: Path) -> Archive:
    """The archive of a source's package: of its version, else of the version that is offered.

    Args:
        cache: folder of archives; what is in it is not downloaded again.

    Raises:
        MissingPackageError: where it cannot be had.
    """
    assert source.reference is not None
    kind, name, version = source.reference
    folder = cache / kind
    found = _cached(kind, name, folder)
    exact = [archive for archive in found if archive.version == version]
    if not exact:
        for wanted in (version, None):
            try:
                _download(kind, name, wanted, folder)
                break
            except MissingPackageError:
                if wanted is None and not found:
                    raise
    found = _cached(kind, name, folder)
    if not found:
        raise MissingPackageError(f"{source.package} cannot be had: nothing was downloaded")
    return next((archive for archive in found if archive.version == version), found[-1])


def _cached(kind: str, name: str, folder: Path) -> list[Archive]:
    return [archive for path in sorted(folder.glob("*")) if (archive := _named(kind, name, path)) is not None]


def _named(kind: str, name: str, path: Path) -> Archive | None:
    """An archive of that package, told by the file's name."""
    if kind == "debian" and path.suffix == ".deb":
        found = path.name.split("_")
        return Archive(path, unquote(found[1])) if found[0] == name else None
    if kind == "pypi" and path.suffix == ".whl":
        found = path.name.split("-")
        return Archive(path, found[1]) if _normal(found[0]) == _normal(name) else None
    if kind == "npm" and path.suffix == ".tgz":
        plain = name.removeprefix("@").replace("/", "-")
        match = re.fullmatch(rf"{re.escape(plain)}-(\d.*)\.tgz", path.name)
        return Archive(path, match[1]) if match else None
    return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _command(kind: str, name: str, version: str | None) -> list[str]:
    if kind == "debian":
        return ["apt-get", "download", "-q", f"{name}={version}" if version else name]
    if kind == "pypi":
        # Wheels alone: a source distribution runs its own code to be downloaded.
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", "."]
        return [sys.executable, "-m", "pip", "download", *options, f"{name}=={version}" if version else name]
    return ["npm", "pack", "--silent", "--ignore-scripts", f"{name}@{version}" if version else name]


def _download(kind: str, name: str, version: str | None, folder: Path) -> None:
    """Into `folder`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    command = _command(kind, name, version)
    where = f"{kind}:{name}"
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as work:
        try:
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=_SECONDS)
        except FileNotFoundError:
            raise MissingPackageError(f"{where} cannot be had: {command[0]} is not installed") from None
        except subprocess.TimeoutExpired:
            raise MissingPackageError(f"{where} cannot be had: no answer in {_SECONDS} s") from None
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            raise MissingPackageError(f"{where} cannot be had: {lines[-1][:200]}")
        for file in Path(work).iterdir():
            file.replace(folder / file.name)


def unpack(archive: Archive, folder: Path, wanted: Sequence[str], skipped: Sequence[str]) -> dict[str, Path]:
    """Unpacks into an empty folder and returns the files that are wanted, by their names in the package, sorted.

    Raises HyLoError where the archive is damaged.
    """
    chosen = _chooser(wanted, skipped)
    try:
        if archive.path.suffix == ".deb":
            done = subprocess.run(["dpkg-deb", "-x", archive.path, folder], capture_output=True, text=True)
            if done.returncode:
                raise HyLoError(f"{archive.path} cannot be unpacked: {done.stderr.strip()[:200]}")
        elif archive.path.suffix == ".whl":
            with zipfile.ZipFile(archive.path) as wheel:
                wheel.extractall(folder, [name for name in wheel.namelist() if chosen(name)])
        else:
            with tarfile.open(archive.path) as tarball:
                tarball.extractall(folder, filter="data")
    except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise HyLoError(f"{archive.path} cannot be unpacked: {error}") from None
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: files[name] for name in sorted(files) if not files[name].is_symlink() and chosen(name)}


def _chooser(wanted: Sequence[str], skipped: Sequence[str]) -> Callable[[str], bool]:
    """fnmatch's patterns, in which * crosses folders."""
    yes = [re.compile(fnmatch.translate(pattern)) for pattern in wanted]
    no = [re.compile(fnmatch.translate(pattern)) for pattern in skipped]

    def chosen(name: str) -> bool:
        return any(one.match(name) for one in yes) and not any(one.match(name) for one in no)

    return chosen
