"""Sources: files, folders, patterns, built-in text, and what tells that they changed."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from data_examples import rows
from tiny import sentences

from hylo.data import sources
from hylo.data.folders import files_like
from hylo.data.sections import SourceSection
from hylo.data.sources import open_source, read_documents
from hylo.errors import HyLoError

WriteJsonLines = Callable[..., Path]


def names(source: str) -> list[str]:
    return [document.name for document in read_documents([source])]


def test_files_and_folders(text_folder: Path, tmp_path: Path) -> None:
    documents = read_documents([str(text_folder), str(text_folder / "text00.txt")])
    assert len(documents) == 13
    assert {document.name for document in documents[:12]} == {f"{text_folder.name}/text{i:02}.txt" for i in range(12)}
    assert (documents[-1].name, documents[-1].text) == ("text00.txt", sentences(100))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_text("words")
    (tmp_path / "deep" / "b.bin").write_bytes(b"\xff")
    (tmp_path / "deep" / "c.json").write_text("{}")
    (tmp_path / "empty.txt").write_text(" \n")
    assert [document.text for document in read_documents([str(tmp_path)])] == ["words"]


def test_the_order_is_not_the_alphabet_and_stays(text_folder: Path) -> None:
    read = names(str(text_folder))
    assert read == names(str(text_folder))
    assert read != sorted(read)
    # Of fewer files, it is the same order.
    assert names(str(text_folder / "text0[0-4].txt")) == [name for name in read if Path(name).name < "text05"]


@pytest.mark.parametrize("name", ["missing.txt", "folder", "binary.txt", "empty.txt", "python:nothing", "*.rst"])
def test_bad_sources(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("")
    source = name if name.startswith("python:") else str(tmp_path / name)
    with pytest.raises(HyLoError) as error:
        read_documents([source])
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "a text without a name; expected a file, a folder"),
        ("**.txt", r"'\*\*\.txt' is no pattern of files: .*; expected one such as"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("x" * 5000 + "*", "cannot be read: File name too long|no file is named like"),
    ],
)
def test_what_is_no_name_of_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HyLoError, match=message) as error:
        open_source(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.Ndjson.GZ", "a.NDJSON.zst", "a.Json", "a.JSON.gz"])
def test_kinds_of_tables_however_they_are_written(tmp_path: Path, write_json_lines: WriteJsonLines, name: str) -> None:
    plain = write_json_lines("plain", rows(2)).read_bytes()
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix.lower(), bytes)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(packed(plain))
    for source in (tmp_path / "set" / name, tmp_path / "set"):
        documents = read_documents([str(source)])
        assert [document.text for document in documents] == [row["text"] for row in rows(2)]


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.arrow", "a.jsonl.bz2", "a.txt.gz", "a.npy"])
def test_a_file_of_another_kind_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text,number\nwords,1\n")
    with pytest.raises(
        HyLoError, match=r"is no plain text by its name; expected text, or a table in \.parquet, \.jsonl"
    ):
        read_documents([str(tmp_path / name)])


@pytest.mark.parametrize("name", ["a.md", "a.py", "a.tex", "a.TXT", "LICENSE", "a.c"])
def test_a_file_named_by_itself_is_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("words")
    assert names(str(tmp_path / name)) == [name]


def test_links_to_folders_are_followed(text_folder: Path, tmp_path: Path) -> None:
    """Each folder once, by its own name where it has one; links that lead back end."""
    (tmp_path / "set" / "real").mkdir(parents=True)
    (tmp_path / "aside.txt").write_text("not of the set")
    (tmp_path / "set" / "a.txt").symlink_to(text_folder / "text00.txt")
    (tmp_path / "set" / "real" / "b.txt").write_text("words")
    (tmp_path / "set" / "alias").symlink_to(tmp_path / "set" / "real")
    (tmp_path / "set" / "back").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "set" / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "set" / "more").symlink_to(text_folder)
    (tmp_path / "set" / "again").symlink_to(text_folder)
    expected = {"set/a.txt", "set/real/b.txt", *(f"set/again/text{i:02}.txt" for i in range(12))}
    assert sorted(names(str(tmp_path / "set"))) == sorted(expected)
    assert sorted(names(str(tmp_path / "set" / "**" / "*.txt"))) == sorted(expected)
    assert names(str(tmp_path / "set" / "**" / "again" / "text0[1]*")) == ["set/again/text01.txt"]
    # What is named is followed, however it is reached beside.
    assert len(names(str(tmp_path / "set" / "mor?" / "**" / "*.txt"))) == 12
    assert len(names(str(tmp_path / "set" / "more"))) == 12


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*.txt", ["a.txt", "b/a.txt", "b/c/a.txt", "d/c/.h.txt"]),
        ("b/**/*.txt", ["b/a.txt", "b/c/a.txt"]),
        ("**/c/*.txt", ["b/c/a.txt", "d/c/.h.txt"]),
        ("*/**/a.txt", ["b/a.txt", "b/c/a.txt"]),
        ("**/b/**/a.txt", ["b/a.txt", "b/c/a.txt"]),
        ("*/c/?.txt", ["b/c/a.txt"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    folder = tmp_path / "set"
    for name in ("a.txt", "b/a.txt", "b/c/a.txt", "d/c/.h.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("words")
    assert sorted(files_like(folder / pattern)) == sorted(folder / name for name in expected)
    assert sorted(file for file in folder.glob(pattern) if file.is_file()) == sorted(files_like(folder / pattern))


def test_the_standard_library_is_without_the_topics() -> None:
    found = names("python:stdlib")
    assert "python:stdlib/json/decoder.py" in found
    assert not any("pydoc_data" in name or "site-packages" in name for name in found)
    assert not any("/test/" in name or "/tests/" in name for name in found)
    assert sum(len(document.text) for document in read_documents(["python:topics"])) > 300_000


def test_a_folder_of_tables_may_hold_a_readme(tmp_path: Path, write_json_lines: WriteJsonLines) -> None:
    write_json_lines("set/train.jsonl", rows(2))
    (tmp_path / "set" / "README.md").write_text("what this is")
    (tmp_path / "set" / "dataset_infos.json").write_text("{}")
    assert names(str(tmp_path / "set")) == ["set/train.jsonl#0", "set/train.jsonl#1"]
    (tmp_path / "set" / "notes.txt").write_text("more text")
    with pytest.raises(HyLoError, match=r"holds both set/notes.txt and set/train.jsonl; say which"):
        open_source(str(tmp_path / "set"))
    assert len(names(str(tmp_path / "set/**/*.jsonl"))) == 2


def test_limit_documents(text_folder: Path) -> None:
    section = SourceSection(source=str(text_folder), limit_documents=3)
    assert read_documents([section]) == read_documents([str(text_folder)])[:3]


def test_plain_text_has_no_columns(text_folder: Path) -> None:
    with pytest.raises(HyLoError, match="plain text and has no column 'body'"):
        read_documents([SourceSection(source=str(text_folder), text="body")])


@pytest.mark.parametrize("small", [True, False], ids=["by content", "by size and time"])
def test_a_changed_file_changes_the_fingerprint(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    monkeypatch.setattr(sources, "_DIGEST_BYTES", 2**20 if small else 10)
    file = tmp_path / "a.txt"
    file.write_text(sentences(1))
    before = open_source(str(file)).fingerprint()
    os.utime(file, (1, 1))
    # A copy has other times; a small one is told to be the same.
    assert (open_source(str(file)).fingerprint() == before) is small
    before = open_source(str(file)).fingerprint()
    file.write_text(sentences(2))
    assert open_source(str(file)).fingerprint() != before
    limited = SourceSection(source=str(file), limit_documents=1)
    assert open_source(limited).fingerprint() != open_source(str(file)).fingerprint()
    weighted = SourceSection(source=str(file), weight=2.0)
    assert open_source(weighted).fingerprint() == open_source(str(file)).fingerprint()
