"""Rows of JSON lines, Parquet files and Hugging Face datasets."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard
from data_examples import chats, rows
from pyarrow import parquet

from hylo.data.encode import Encoder
from hylo.data.sections import SourceSection
from hylo.data.sources import open_source, read_documents
from hylo.errors import HyLoError

WriteJsonLines = Callable[..., Path]


def write_parquet(path: Path, values: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(values).to_parquet(str(path))
    return path


@pytest.fixture
def hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that `datasets` finds as it finds one on the hub: here, a folder below the working directory."""
    write_parquet(tmp_path / "owner" / "name" / "train.parquet", rows(5))
    write_parquet(tmp_path / "owner" / "name" / "validation.parquet", rows(3, 100))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return "hf:owner/name"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.parquet"])
def test_every_kind_of_file(tmp_path: Path, write_json_lines: WriteJsonLines, name: str) -> None:
    expected = rows(4)
    if name.endswith(".parquet"):
        path = write_parquet(tmp_path / name, expected)
    elif ".json." in name + ".":
        path = write_json_lines(name, [expected])
    elif name.endswith(".zst"):
        plain = write_json_lines("plain", expected)
        path = tmp_path / name
        path.write_bytes(zstandard.compress(plain.read_bytes()))
    else:
        path = write_json_lines(name, expected)
    documents = read_documents([str(path)])
    assert [document.text for document in documents] == [row["text"] for row in expected]
    assert [document.name for document in documents] == [f"{name}#{i}" for i in range(4)]


@pytest.mark.parametrize("name", ["part[12]", "part*", "part?", ".part"])
def test_a_parquet_file_is_no_pattern(tmp_path: Path, name: str) -> None:
    for number in (1, 2):
        write_parquet(tmp_path / "set" / f"part{number}.parquet", rows(1, number))
    path = write_parquet(tmp_path / "set" / f"{name}.parquet", rows(1, 9))
    assert [document.text for document in read_documents([str(path)])] == [rows(1, 9)[0]["text"]]


def test_a_parquet_file_or_row_group_without_rows(tmp_path: Path) -> None:
    full = write_parquet(tmp_path / "set" / "full.parquet", rows(3))
    table = parquet.read_table(full)
    parquet.write_table(table.slice(0, 0), tmp_path / "set" / "empty.parquet")
    with parquet.ParquetWriter(tmp_path / "groups.parquet", table.schema) as writer:
        for group in (table.slice(0, 0), table.slice(0, 2), table.slice(2)):
            writer.write_table(group)
    for source in (tmp_path / "set", tmp_path / "groups.parquet"):
        assert [document.text for document in read_documents([str(source)])] == [row["text"] for row in rows(3)]
    with pytest.raises(HyLoError, match=r"no text in .*empty\.parquet"):
        read_documents([str(tmp_path / "set" / "empty.parquet")])


def test_columns_are_guessed_or_named(write_json_lines: WriteJsonLines, tmp_path: Path) -> None:
    content = write_json_lines("content.jsonl", [{"id": 1, "content": "words"}])
    assert read_documents([str(content)])[0].text == "words"
    other = write_parquet(tmp_path / "other.parquet", [{"id": 1, "body": "words"}])
    with pytest.raises(HyLoError, match="has columns id, body; say with text: or messages:"):
        read_documents([str(other)])
    assert read_documents([SourceSection(source=str(other), text="body")])[0].text == "words"
    with pytest.raises(HyLoError, match="has no column 'title'; expected one of id, body"):
        read_documents([SourceSection(source=str(other), text="title")])
    both = write_json_lines("both.jsonl", [{"text": "a", "messages": []}])
    with pytest.raises(HyLoError, match="has columns text and messages; say which"):
        read_documents([str(both)])


def test_rows_without_text_keep_their_number(write_json_lines: WriteJsonLines) -> None:
    path = write_json_lines("a.jsonl", [{"text": "one"}, {"text": None}, {"text": " "}, {"id": 3}, {"text": "five"}])
    assert [document.name for document in read_documents([str(path)])] == ["a.jsonl#0", "a.jsonl#4"]


def test_a_key_that_comes_late(tmp_path: Path) -> None:
    """Real files have optional keys; `datasets` takes those of the first 10 MB for all there are."""
    path = tmp_path / "late.jsonl"
    line = json.dumps({"text": "x " * 500}) + "\n"
    path.write_text(line * 11_000 + json.dumps({"text": "last", "extra": 1}) + "\n")
    *_, last = open_source(str(path)).documents()
    assert last.text == "last"


def test_reading_is_lazy(write_json_lines: WriteJsonLines, tmp_path: Path) -> None:
    """What comes before a broken line is given before it is reached."""
    path = write_json_lines("a.jsonl", rows(3))
    with path.open("a") as file:
        file.write("{no json\n")
    documents = open_source(str(path)).documents()
    assert len(list(itertools.islice(documents, 3))) == 3
    with pytest.raises(HyLoError, match=r"a\.jsonl:4 is no JSON"):
        next(documents)


def test_half_a_surrogate_pair_is_replaced(
    tokenizer: Any, smollm2_tokenizer: Any, write_json_lines: WriteJsonLines
) -> None:
    """JSON may escape one alone; UTF-8 and tokenizers have none."""
    said = [{"role": "user", "content": "a \ud83d b"}, {"role": "assistant", "content": [{"text": "\udc4d"}]}]
    [text] = read_documents([str(write_json_lines("a.jsonl", [{"text": "one \ud83d two \ud83d\ude00"}]))])
    assert text.text == "one \ufffd two \U0001f600"
    assert Encoder(tokenizer).encode([text], [])[0] is not None
    [chat] = read_documents([str(write_json_lines("b.jsonl", [{"messages": said[:1]}]))])
    assert Encoder(smollm2_tokenizer).encode([chat], [])[0] is not None
    [parts] = read_documents([str(write_json_lines("c.jsonl", [{"messages": said}]))])
    assert parts.text == "a \ufffd b\n\n\ufffd"
    assert parts.messages is not None
    assert parts.messages[1]["content"] == [{"text": "\ufffd"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"[1, 2]\n", r"a\.jsonl\[0\] is a int; expected a JSON object"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl#0: column 'text' holds a int; expected text"),
        ("a.jsonl", b"\xff\xfe", "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "cannot be read: Not a gzipped file"),
        ("a.jsonl.zst", b"no zstandard", "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_broken_files_are_told_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HyLoError, match=message) as error:
        read_documents([str(tmp_path / name)])
    assert "\n" not in str(error.value)


def test_share_gpt_rows(write_json_lines: WriteJsonLines) -> None:
    conversation = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello"},
    ]
    [document] = read_documents([str(write_json_lines("a.jsonl", [{"conversations": conversation}]))])
    assert document.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    # System prompts are shared by chats: nothing to tell them apart by.
    assert document.text == "hi\n\nhello"


def test_chats_of_a_parquet_file_are_those_of_its_rows(tmp_path: Path) -> None:
    """Tables give all messages all keys; those without a value are not the row's own."""
    values = chats(2)
    values[0]["messages"][1]["name"] = "a name"
    documents = read_documents([str(write_parquet(tmp_path / "a.parquet", values))])
    assert [list(document.messages or ()) for document in documents] == [row["messages"] for row in values]


def test_parts_of_a_message_without_text(tmp_path: Path) -> None:
    """A table gives an image the keys of the texts beside it."""
    content = [{"type": "text", "text": "what is this?"}, {"type": "image", "text": None}]
    path = write_parquet(tmp_path / "a.parquet", [{"messages": [{"role": "user", "content": content}]}])
    assert read_documents([str(path)])[0].text == "what is this?\n"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hi", "column 'messages' holds a str; expected a list of messages"),
        (["hi"], "a message is a str; expected role and content"),
        ([{"content": "hi"}], "a message has keys content; expected role and content"),
        ([{"role": "narrator", "content": "hi"}], "unknown role 'narrator'; expected one of human, user"),
    ],
)
def test_bad_messages_name_their_row(write_json_lines: WriteJsonLines, value: Any, message: str) -> None:
    path = write_json_lines("a.jsonl", [*chats(1), {"messages": value}])
    with pytest.raises(HyLoError, match=message) as error:
        read_documents([str(path)])
    assert str(error.value).startswith("a.jsonl#1: ")


def test_texts_and_chats_are_two_sources(write_json_lines: WriteJsonLines, tmp_path: Path) -> None:
    write_json_lines("set/a.jsonl", rows(1))
    write_json_lines("set/b.jsonl", chats(1))
    with pytest.raises(HyLoError, match="holds texts and chats; name them as two sources"):
        read_documents([str(tmp_path / "set")])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_by_name(hub_dataset: str, streaming: bool) -> None:
    source = SourceSection(source=hub_dataset, streaming=streaming)
    documents = read_documents([source])
    assert [document.text for document in documents] == [row["text"] for row in rows(5)]
    assert [document.name for document in documents] == [f"hf:owner/name/train#{i}" for i in range(5)]
    other = SourceSection(source=hub_dataset, streaming=streaming, split="validation")
    assert [document.text for document in read_documents([other])] == [row["text"] for row in rows(3, 100)]
    first = SourceSection(source=hub_dataset, streaming=streaming, limit_documents=2)
    assert read_documents([first]) == documents[:2]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_by_name_with_a_shard_without_rows(hub_dataset: str, streaming: bool, tmp_path: Path) -> None:
    folder = tmp_path / "owner" / "name"
    table = parquet.read_table(folder / "train.parquet")
    (folder / "train.parquet").unlink()
    for number, shard in enumerate((table.slice(0, 0), table.slice(0, 2), table.slice(0, 0), table.slice(2))):
        parquet.write_table(shard, folder / f"train-{number:05}-of-00004.parquet")
    parquet.write_table(table.slice(0, 0), folder / "validation.parquet")
    source = SourceSection(source=hub_dataset, streaming=streaming)
    assert [document.text for document in read_documents([source])] == [row["text"] for row in rows(5)]
    with pytest.raises(HyLoError, match="no text in hf:owner/name") as error:
        read_documents([SourceSection(source=hub_dataset, streaming=streaming, split="validation")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_changed_dataset_has_another_fingerprint(hub_dataset: str, streaming: bool, tmp_path: Path) -> None:
    source = SourceSection(source=hub_dataset, streaming=streaming)
    before = open_source(source).fingerprint()
    assert open_source(source).fingerprint() == before
    other = SourceSection(source=hub_dataset, streaming=streaming, split="validation")
    assert open_source(other).fingerprint() != before
    write_parquet(tmp_path / "owner" / "name" / "train.parquet", rows(6))
    assert open_source(source).fingerprint() != before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split": "nothing"}, "(?i)split.*nothing"),
        ({"config": "nothing"}, "BuilderConfig 'nothing' not found"),
        ({"source": "hf:owner/name/nothing"}, "BuilderConfig 'nothing' not found"),
        ({"source": "hf:owner/other"}, "hf:owner/other could not be had from the hub"),
        ({"source": "hf:a/b/c/d"}, "expected hf:NAME"),
        ({"source": "hf:"}, "expected hf:NAME"),
        ({"source": "hf:owner/name/a", "config": "b"}, "names config 'a', and config: says 'b'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_the_hub_does_not_have(hub_dataset: str, values: dict[str, Any], message: str, streaming: bool) -> None:
    """`HF_HUB_OFFLINE` is set: a dataset that is not there fails at once."""
    section = SourceSection.model_validate({"source": hub_dataset, "streaming": streaming} | values)
    with pytest.raises(HyLoError, match=message) as error:
        read_documents([section])
    assert "\n" not in str(error.value)


def save(values: list[dict[str, Any]], folder: Path, **options: Any) -> str:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(values).save_to_disk(str(folder), **options)
    return str(folder)


def test_a_dataset_that_was_saved(tmp_path: Path) -> None:
    source = save(rows(6), tmp_path / "saved", num_shards=2)
    documents = read_documents([source])
    assert [document.text for document in documents] == [row["text"] for row in rows(6)]
    assert documents[-1].name == "saved#5"
    said = read_documents([save(chats(2), tmp_path / "chats")])[1].messages
    assert said is not None
    assert said[1] == chats(2)[1]["messages"][1]
    # Columns and limits as of any table.
    named = SourceSection(source=source, text="text", limit_documents=2)
    assert [document.name for document in read_documents([named])] == ["saved#0", "saved#1"]
    with pytest.raises(HyLoError, match="saved has no column 'body'; expected one of text, number"):
        read_documents([SourceSection(source=source, text="body")])


def test_what_tells_that_a_saved_dataset_changed(tmp_path: Path) -> None:
    digests = [
        open_source(save(rows(3, first), tmp_path / str(i) / "saved")).digest() for i, first in enumerate((0, 9))
    ]
    assert digests[0] != digests[1]
    assert digests[0] == open_source(str(tmp_path / "0" / "saved")).digest()


def test_a_saved_dataset_of_several_splits(tmp_path: Path) -> None:
    split = datasets.Dataset.from_list(rows(2))
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(HyLoError, match=r"saved is a dataset of splits test, train; name one, as .*/saved/test"):
        open_source(str(tmp_path / "saved"))
    assert len(read_documents([str(tmp_path / "saved" / "train")])) == 2


def test_a_saved_dataset_without_a_whole_split(tmp_path: Path) -> None:
    datasets.DatasetDict({}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(HyLoError, match="saved is a dataset of splits, and holds none that is whole"):
        open_source(str(tmp_path / "saved"))


def test_a_saved_dataset_that_is_damaged(tmp_path: Path) -> None:
    source = save(rows(2), tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(b"\xff" * 100)
    with pytest.raises(HyLoError, match="saved cannot be read: ") as error:
        read_documents([source])
    assert "\n" not in str(error.value)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", rows(1))
    saved = save(rows(1), tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (str(path), saved, "hf:owner/name"):
        with pytest.raises(HyLoError, match=r"install it with: pip install 'hylo\[train\]'"):
            read_documents([source])
