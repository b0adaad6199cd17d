"""Sources: what a recipe names, opened. Each gives its documents one after another, however many there are."""

import glob
import hashlib
import itertools
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hylo.data.documents import Document, is_unicode, text_digest, unit_hash
from hylo.data.folders import files_below, files_like, folder_of_pattern
from hylo.data.sections import SourceSection
from hylo.data.tables import (
    BATCH_ROWS,
    Rows,
    documents_of,
    first_line,
    read_json_rows,
    read_parquet_rows,
    require_datasets,
    told,
)
from hylo.data.tokens import PREFIX as TOKENS
from hylo.data.tokens import TokenFolder
from hylo.errors import HyLoError
from hylo.files import expand_user

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_JSON_LINES = (".jsonl", ".ndjson")
_PACKED = ("", ".gz", ".zst")
_TABLE_SUFFIXES = (".parquet", *(lines + packed for lines in _JSON_LINES for packed in _PACKED))
_JSON_SUFFIXES = (".json", ".json.gz", ".json.zst")
# What is read as text where it is named alone may end in anything but these: tables, archives, documents and arrays.
_NO_TEXT_SUFFIXES = (
    *(".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx", ".db", ".sqlite", ".jsonlines"),
    *(".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z"),
    *(".pdf", ".doc", ".docx", ".odt", ".epub"),
    *(".npy", ".npz", ".pt", ".pkl", ".bin", ".safetensors", ".gguf", ".h5"),
)
# What may lie beside the tables of a dataset and is no text of it.
_BESIDE_TABLES = ("readme", "license")
# Up to here a source is told by its content; a larger one by names, sizes and times of change.
_DIGEST_BYTES = 256 * 2**20


def _python_topics() -> Iterator[Document]:
    """Python's language reference, as `help()` shows it: half a megabyte of technical English."""
    from pydoc_data.topics import topics

    for name in _scattered(topics):
        yield Document(f"python:topics/{name}", topics[name])


def _python_stdlib() -> Iterator[Document]:
    """The sources of the standard library, without its tests and without the text of `python:topics`."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "turtledemo", "ensurepip"}
    files = {str(path.relative_to(root)): path for path in root.rglob("*.py")}
    for relative in _scattered(files):
        if not skipped.intersection(Path(relative).parts[:-1]):
            yield Document(f"python:stdlib/{relative}", files[relative].read_text(encoding="utf-8", errors="replace"))


# Text that is in every Python installation.
BUILTIN_SOURCES: dict[str, Callable[[], Iterator[Document]]] = {
    "python:topics": _python_topics,
    "python:stdlib": _python_stdlib,
}


def _scattered(names: Iterable[str]) -> list[str]:
    """In an order that is the same everywhere, and has nothing to do with the alphabet or with what is held out.

    Those who stop early have then seen something of everything.
    """
    return sorted(names, key=lambda name: (unit_hash(name, salt="order"), name))


@dataclass(frozen=True)
class OpenSource:
    """A source that is there.

    Attributes:
        section: what the recipe says of it.
        read: gives all its documents, from the first again each time. Raises HyLoError on what it cannot read.
        digest: tells whether its documents changed, without reading more than 256 MiB. Raises HyLoError likewise.
    """

    section: SourceSection
    read: Callable[[], Iterator[Document]]
    digest: Callable[[], str]

    @property
    def name(self) -> str:
        return self.section.source

    @property
    def tokens(self) -> TokenFolder | None:
        """Where the source is tokens, and no text."""
        return TokenFolder(self.name) if self.name.startswith(TOKENS) else None

    def documents(self) -> Iterator[Document]:
        """As many as the recipe wants; those without text are left out."""
        documents = (document for document in self.read() if document.text.strip() or document.messages)
        return itertools.islice(documents, self.section.limit_documents)

    def fingerprint(self) -> str:
        """A hash over the source and how it is read, not over its weight."""
        settings = self.section.model_dump(exclude={"source", "weight", "streaming"})
        return hashlib.sha256(json.dumps([settings, self.digest()]).encode()).hexdigest()


def open_source(source: str | SourceSection) -> OpenSource:
    """Raises HyLoError where there is no such source, or it holds no text."""
    if source == "":
        raise HyLoError(f"a text without a name; expected a file, a folder, hf:NAME or {', '.join(BUILTIN_SOURCES)}")
    if isinstance(source, str) and not is_unicode(source):
        raise HyLoError(f"a text called {source!r}; expected a name that UTF-8 can hold")
    section = SourceSection(source=source) if isinstance(source, str) else source
    name = section.source
    if name in BUILTIN_SOURCES:
        return OpenSource(section, BUILTIN_SOURCES[name], lambda: text_digest(BUILTIN_SOURCES[name]()))
    if name.startswith("hf:"):
        hub = _HubDataset.named(section)
        return OpenSource(section, hub.read, hub.digest)
    if name.startswith(TOKENS):
        folder = TokenFolder(name)
        folder.stores()
        return OpenSource(section, lambda: _no_text(name), folder.digest)
    path = expand_user(name)
    try:
        if _is_saved(path):
            saved = _SavedDataset(section, path)
            return OpenSource(section, saved.read, saved.digest)
        files = _find_files(name)
    # A name may be longer than a file's can be, or of a folder that is not to be entered.
    except OSError as error:
        raise HyLoError(f"text {name[:200]!r} cannot be read: {error.strerror}") from None
    return OpenSource(section, lambda: _read_files(files, section), lambda: _files_digest(files))


def read_documents(sources: Sequence[str | SourceSection]) -> list[Document]:
    """All documents of the sources, in memory: for texts of evaluation, not for what is larger than memory.

    Raises HyLoError on a source that does not exist, is not readable, or holds no text.
    """
    return list(iterate_documents(sources))


def iterate_documents(sources: Sequence[str | SourceSection]) -> Iterator[Document]:
    """The same, one after another: what does not exist is told before the first, what cannot be read in its turn."""
    for opened in [open_source(source) for source in sources]:
        documents = opened.documents()
        first = next(documents, None)
        if first is None:
            raise HyLoError(f"no text in {opened.name}")
        yield first
        yield from documents


def _no_text(name: str) -> Iterator[Document]:
    raise HyLoError(f"{name} holds tokens and no text; expected a source of text here")


# Files.


def _find_files(source: str) -> dict[str, Path]:
    """Files by the names that their documents get, from the source down: the split stays when a folder moves.

    Raises HyLoError where there is none, or those that there are hold something else than text or tables.
    """
    path = expand_user(source)
    if path.is_dir():
        found = {str(Path(path.name) / file.relative_to(path)): file for file in files_below(path)}
    elif path.exists():
        if _ends(path.name, _NO_TEXT_SUFFIXES) and not _ends(path.name, (*_TABLE_SUFFIXES, *_JSON_SUFFIXES)):
            tables = ", ".join((*_TABLE_SUFFIXES, *_JSON_SUFFIXES))
            raise HyLoError(f"{path} is no plain text by its name; expected text, or a table in {tables}")
        return {path.name: path}
    elif glob.has_magic(source):
        folder = folder_of_pattern(path)
        try:
            files = files_like(path)
        except ValueError as error:
            raise HyLoError(
                f"{source!r} is no pattern of files: {error}; expected one such as 'text/**/*.txt'"
            ) from None
        found = {str(Path(folder.name) / file.relative_to(folder)): file for file in files}
        if not found:
            raise HyLoError(f"no file is named like {source!r}")
    else:
        builtin = ", ".join(BUILTIN_SOURCES)
        raise HyLoError(f"text {source!r} does not exist; expected a file, a folder, hf:NAME or {builtin}")
    return _of_one_kind(found, source)


def _ends(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes)


def _of_one_kind(files: dict[str, Path], source: str) -> dict[str, Path]:
    """Those that are read: texts, or else tables. Raises HyLoError where both are there, or neither."""
    tables = {name: file for name, file in files.items() if _ends(name, _TABLE_SUFFIXES)}
    texts = {name: file for name, file in files.items() if _ends(name, _TEXT_SUFFIXES)}
    if tables:
        # The JSON files beside tables are what tools keep of them.
        texts = {name: file for name, file in texts.items() if not file.name.lower().startswith(_BESIDE_TABLES)}
        if texts:
            pattern = f"{source}/**/*{Path(min(tables)).suffix}"
            raise HyLoError(f"{source} holds both {min(texts)} and {min(tables)}; say which are meant, as {pattern!r}")
    found = tables or texts or {name: file for name, file in files.items() if _ends(name, _JSON_SUFFIXES)}
    if not found:
        expected = ", ".join((*_TEXT_SUFFIXES, *_TABLE_SUFFIXES, *_JSON_SUFFIXES))
        raise HyLoError(f"{source} holds no text; expected files ending in {expected}")
    return found


def _read_files(files: dict[str, Path], section: SourceSection) -> Iterator[Document]:
    chats: bool | None = None
    for name in _scattered(files):
        file = files[name]
        if not _ends(name, (*_TABLE_SUFFIXES, *_JSON_SUFFIXES)):
            if section.text or section.messages:
                raise HyLoError(f"{file} is plain text and has no column {section.text or section.messages!r}")
            yield Document(name, _read_text(file))
            continue
        for document in _read_table(name, file, section):
            if chats is not None and chats != (document.messages is not None):
                raise HyLoError(f"{section.source} holds texts and chats; name them as two sources")
            chats = document.messages is not None
            yield document


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HyLoError(f"{file} is not readable text: {error}") from None


def _read_table(name: str, file: Path, section: SourceSection) -> Iterator[Document]:
    if _ends(name, (".parquet",)):
        return documents_of(read_parquet_rows(file, [section.text, section.messages]), section, name)
    return documents_of(read_json_rows(file), section, name)


def _files_digest(files: dict[str, Path]) -> str:
    try:
        stats = {name: file.stat() for name, file in files.items()}
        by_content = sum(stat.st_size for stat in stats.values()) <= _DIGEST_BYTES
        digest = hashlib.sha256()
        for name in sorted(files):
            told_by = files[name].read_bytes() if by_content else str(stats[name].st_mtime_ns).encode()
            digest.update(f"{name}\0{stats[name].st_size}\0".encode(errors="replace"))
            digest.update(hashlib.sha256(told_by).digest())
    except OSError as error:
        raise HyLoError(f"{error.filename} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


# Datasets of Hugging Face, as `save_to_disk` left them.


def _is_saved(path: Path) -> bool:
    """Raises HyLoError where there are several splits, or the package that reads them is not installed."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
        if not splits:
            raise HyLoError(f"{path} is a dataset of splits, and holds none that is whole")
        raise HyLoError(f"{path} is a dataset of splits {', '.join(splits)}; name one, as {path}/{splits[0]}")
    if not all((path / name).is_file() for name in ("state.json", "dataset_info.json")):
        return False
    require_datasets()
    return True


@dataclass(frozen=True)
class _SavedDataset:
    section: SourceSection
    folder: Path

    def read(self) -> Iterator[Document]:
        rows = told(self._rows, f"{self.folder} cannot be read")
        return documents_of(rows, self.section, self.folder.name)

    def _rows(self) -> Rows:
        rows = require_datasets().load_from_disk(str(self.folder))
        wanted = [column for column in (self.section.text, self.section.messages) if column is not None]
        return iter(rows.select_columns(wanted) if wanted and set(wanted) <= set(rows.column_names) else rows)

    def digest(self) -> str:
        return _files_digest({path.name: path for path in self.folder.iterdir() if path.is_file()})


# The hub.


@dataclass(frozen=True)
class _HubDataset:
    """A dataset of the Hugging Face hub, downloaded to the cache of `datasets`, or streamed."""

    section: SourceSection
    name: str
    config: str | None

    @classmethod
    def named(cls, section: SourceSection) -> "_HubDataset":
        """Of `hf:NAME`, `hf:OWNER/NAME` or `hf:OWNER/NAME/CONFIG`."""
        parts = section.source.removeprefix("hf:").split("/")
        if not all(parts) or len(parts) > 3:
            raise HyLoError(f"{section.source}: expected hf:NAME, hf:OWNER/NAME or hf:OWNER/NAME/CONFIG")
        if len(parts) == 3 and section.config is not None:
            raise HyLoError(f"{section.source} names config {parts[2]!r}, and config: says {section.config!r}")
        require_datasets()
        return cls(section, "/".join(parts[:2]), parts[2] if len(parts) == 3 else section.config)

    @contextmanager
    def _had(self) -> Iterator[None]:
        try:
            yield
        # What networks, caches and loaders raise has no common class.
        except Exception as error:
            raise HyLoError(f"{self.section.source} could not be had from the hub: {first_line(error)}") from None

    def _builder(self) -> Any:
        builder = require_datasets().load_dataset_builder(self.name, self.config, revision=self.section.revision)
        if builder.name == "parquet" and builder.config.batch_size is None:
            # Not as an option, by which the dataset would be another one in the cache.
            builder.config.batch_size = BATCH_ROWS
        return builder

    def _dataset(self) -> Any:
        """As `datasets.load_dataset` does. Raises HyLoError where it cannot be had, or has no rows."""
        split = self.section.split
        with self._had():
            builder = self._builder()
            if self.section.streaming:
                return builder.as_streaming_dataset(split=split)
            builder.download_and_prepare()
            rows = (builder.info.splits or {}).get(split.partition("[")[0])
            if rows is None or rows.num_examples:
                return builder.as_dataset(split=split)
        raise HyLoError(f"no text in {self.section.source}: {split} has no rows")

    def read(self) -> Iterator[Document]:
        dataset = self._dataset()
        rows = told(lambda: iter(dataset), f"{self.section.source} could not be read")
        place = "/".join(part for part in (self.name, self.config, self.section.split) if part)
        return documents_of(rows, self.section, f"hf:{place}")

    def digest(self) -> str:
        """Downloaded, the fingerprint of the dataset; streamed, its files with the revision that they are of."""
        if not self.section.streaming:
            return str(self._dataset()._fingerprint)
        with self._had():
            builder = self._builder()
        files = (builder.config.data_files or {}).get(self.section.split.partition("[")[0])
        told_by = [self.name, self.config, self.section.split, builder.hash]
        told_by += [] if files is None else [list(files), [list(pair) for pair in files.origin_metadata]]
        return hashlib.sha256(json.dumps(told_by).encode()).hexdigest()
