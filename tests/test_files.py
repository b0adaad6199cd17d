"""Writing folders and JSON: whole or not at all."""

import errno
import json
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hylo.errors import HyLoError
from hylo.files import atomic_directory, expand_user, read_json, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "deep" / "out") as work:
        (work / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "x"
    assert names(tmp_path / "deep") == ["out"]
    # Others may read it, as a folder made in the ordinary way.
    assert (tmp_path / "deep" / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaves_nothing_on_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_directory(tmp_path / "out") as work:
        (work / "file").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_refuses_what_exists(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(HyLoError, match="already exists"), atomic_directory(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert names(tmp_path / "out") == ["old"]


def test_overwrite_replaces_the_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    with atomic_directory(tmp_path / "out", overwrite=True) as work:
        (work / "new").write_text("y")
        assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("leads_to", ["deep/real", "deep/missing"])
def test_a_link_is_written_through(tmp_path: Path, leads_to: str) -> None:
    (tmp_path / "deep" / "real").mkdir(parents=True)
    (tmp_path / "deep" / "real" / "old").write_text("x")
    (tmp_path / "link").symlink_to(leads_to)
    with atomic_directory(tmp_path / "link", overwrite=True) as work:
        (work / "new").write_text("y")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / leads_to) == ["new"]
    assert names(tmp_path) == ["deep", "link"]
    assert set(names(tmp_path / "deep")) == {"real", Path(leads_to).name}


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(HyLoError, match=r"cannot write to .*/link: "), atomic_directory(tmp_path / "link"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["link"]


def test_overwrite_keeps_the_old_on_an_exception(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(HyLoError, match="is a file"), atomic_directory(tmp_path / "out", overwrite=True):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").read_text() == "x"


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HyLoError, match="cannot write"), atomic_directory(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")


def test_json(tmp_path: Path) -> None:
    file = tmp_path / "value.json"
    write_json(file, {"a": [1, None]})
    assert read_json(file) == {"a": [1, None]}
    assert names(tmp_path) == ["value.json"]
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": [1, None]}
    with pytest.raises(HyLoError, match="does not exist"):
        read_json(tmp_path / "missing.json")
    for content in (b"{", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(HyLoError, match="not readable JSON"):
            read_json(file)


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """The system's own limit on a file's size, as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_json_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "value.json"
    write_json(file, [1])
    with small_files(1024), pytest.raises(OSError, match=rf"{re.escape(str(file))}") as error:
        write_json(file, list(range(1000)))
    assert error.value.errno == errno.EFBIG
    assert names(tmp_path) == ["value.json"]
    assert read_json(file) == [1]
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert names(tmp_path) == ["value.json"]


def test_an_error_of_writing_names_what_is_written(tmp_path: Path) -> None:
    with (
        small_files(1024),
        pytest.raises(OSError, match=r"File too large: '.*/out'"),
        atomic_directory(tmp_path / "out") as work,
        (work / "file").open("w") as file,
    ):
        file.write("x" * 5000)
    assert names(tmp_path) == []
    # One that names a file keeps it.
    with pytest.raises(FileNotFoundError, match="nothing"), atomic_directory(tmp_path / "out") as work:
        (work / "nothing").read_text()


def test_a_path_with_a_null_character() -> None:
    with pytest.raises(HyLoError, match="no path"):
        expand_user("a\0b")
