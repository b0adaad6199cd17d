"""Rows of JSON and Parquet files and of Hugging Face datasets, read one after another, and documents made of them."""

import glob
import gzip
import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from hylo.data.documents import Document, as_unicode
from hylo.data.sections import SourceSection
from hylo.errors import HyLoError

TEXT_COLUMNS = ("text", "content")
CHAT_COLUMNS = ("messages", "conversations")
# ShareGPT's names of who speaks, and the usual ones.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "observation": "tool",
    "function": "tool",
    "tool": "tool",
}
# Of a Parquet file, read at a time: by default as many as its first row group has, which may be none.
BATCH_ROWS = 1000
Rows = Iterator[Mapping[str, Any]]


def require_datasets() -> Any:
    """The package `datasets`. Raises HyLoError where it is not installed."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise HyLoError(
            "reading Parquet files, saved and hf: datasets needs datasets; install it with: pip install 'hylo[train]'"
        ) from None
    # What it logs as an error it raises as well, and that is told in one line.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def first_line(error: BaseException) -> str:
    """What is at the bottom of an error of another library, in one line."""
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return lines[0][:300] if lines else type(cause).__name__


def read_json_rows(file: Path) -> Rows:
    """Rows of a file of JSON lines, or of one JSON list; compressed where the name ends in .gz or .zst.

    Line by line and not through `datasets`, which takes the columns of the first 10 MB for those of the whole file.

    Raises HyLoError, with the line, on what is no JSON object.
    """
    return told(lambda: _json_rows(file), f"{file} cannot be read")


def _json_rows(file: Path) -> Rows:
    with _opened(file) as lines:
        numbered = enumerate(lines, start=1)
        begin, first = next(((at, line) for at, line in numbered if line.strip()), (1, ""))
        if first.lstrip().startswith("["):
            for index, row in enumerate(_parsed(first + lines.read(), str(file))):
                yield _checked(row, f"{file}[{index}]")
            return
        for at, line in itertools.chain([(begin, first)], numbered):
            if line.strip():
                yield _checked(_parsed(line, f"{file}:{at}"), f"{file}:{at}")


def _opened(file: Path) -> TextIO:
    # A mark of byte order may stand first.
    encoding = "utf-8-sig"
    packed = file.suffix.lower()
    if packed == ".gz":
        return cast(TextIO, gzip.open(file, "rt", encoding=encoding))
    if packed == ".zst":
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError:
            message = "reading .zst needs zstandard; install it with: pip install 'hylo[train]'"
            raise HyLoError(f"{file}: {message}") from None
        return cast(TextIO, zstandard.open(file, "rt", encoding=encoding))
    return file.open(encoding=encoding)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise HyLoError(f"{where} is no JSON: {error.msg}; expected an object a line, or one list of them") from None


def _checked(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise HyLoError(f"{where} is a {type(row).__name__}; expected a JSON object")
    return row


def read_parquet_rows(file: Path, columns: Sequence[str | None]) -> Rows:
    """Rows of a Parquet file, through `datasets`.

    Args:
        columns: named in the recipe; the others are not read. All are where none is named.

    Raises:
        HyLoError: where the file is not readable.
    """
    datasets = require_datasets()
    wanted = [column for column in columns if column is not None]

    def opened() -> Rows:
        # What is named there is a pattern.
        named = [glob.escape(str(file))]
        rows = datasets.load_dataset("parquet", data_files=named, split="train", streaming=True, batch_size=BATCH_ROWS)
        return iter(rows.select_columns(wanted) if wanted and set(wanted) <= set(rows.column_names or ()) else rows)

    return told(opened, f"{file} cannot be read")


def told(opened: Callable[[], Rows], what: str) -> Rows:
    """The rows that `opened()` gives; whatever goes wrong on the way is a HyLoError of one line that begins `what`."""
    try:
        rows = opened()
        while True:
            # What the reader of the rows raises is not caught here.
            row = next(rows, None)
            if row is None:
                return
            yield row
    # What a reader of files and networks may raise has no common class.
    except Exception as error:
        if isinstance(error, HyLoError):
            raise
        raise HyLoError(f"{what}: {first_line(error)}") from None


def documents_of(rows: Rows, section: SourceSection, where: str) -> Iterator[Document]:
    """Documents named `where#ROW`; rows without text are left out, and halves of surrogate pairs replaced.

    Raises HyLoError where the columns are not there, or a row holds something else than text or messages.
    """
    column: str | None = None
    chat = False
    for number, row in enumerate(rows):
        if column is None:
            column, chat = choose_column(list(row), section, where)
        name, value = f"{where}#{number}", _as_unicode(row.get(column))
        if value is None or (isinstance(value, list | str) and len(value) == 0):
            continue
        if chat:
            messages = read_messages(value, name, column)
            yield Document(name, _said(messages), messages)
        elif not isinstance(value, str):
            raise HyLoError(f"{name}: column {column!r} holds a {type(value).__name__}; expected text")
        elif value.strip():
            yield Document(name, value)


def _as_unicode(value: Any) -> Any:
    """All texts of a row's value."""
    if isinstance(value, str):
        return as_unicode(value)
    if isinstance(value, list):
        return [_as_unicode(part) for part in value]
    if isinstance(value, dict):
        return {_as_unicode(key): _as_unicode(part) for key, part in value.items()}
    return value


def choose_column(columns: Sequence[str], section: SourceSection, where: str) -> tuple[str, bool]:
    """The column to read, and whether it holds chats. Raises HyLoError, naming the columns there are."""
    listed = ", ".join(columns)
    named = section.text or section.messages
    if named is not None:
        if named not in columns:
            raise HyLoError(f"{where} has no column {named!r}; expected one of {listed}")
        return named, section.messages is not None
    found = [column for column in (*TEXT_COLUMNS, *CHAT_COLUMNS) if column in columns]
    if len(found) > 1:
        raise HyLoError(f"{where} has columns {' and '.join(found)}; say which with text: or messages:")
    if not found:
        raise HyLoError(f"{where} has columns {listed}; say with text: or messages: which holds the text or the chat")
    return found[0], found[0] in CHAT_COLUMNS


def read_messages(value: Any, name: str, column: str) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, of rows that name them so or `from` and `value` (ShareGPT).

    Raises HyLoError, naming the row, on anything else.
    """
    if not isinstance(value, list):
        raise HyLoError(f"{name}: column {column!r} holds a {type(value).__name__}; expected a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise HyLoError(f"{name}: a message is a {type(message).__name__}; expected role and content")
        # Tables give every message all keys that one has.
        message = {key: part for key, part in message.items() if part is not None}
        if "role" not in message and "from" in message:
            message = {"role": message["from"], "content": message.get("value", "")}
        if not isinstance(message.get("role"), str):
            raise HyLoError(f"{name}: a message has keys {', '.join(message) or 'none'}; expected role and content")
        if message["role"] not in _ROLES:
            raise HyLoError(f"{name}: unknown role {message['role']!r}; expected one of {', '.join(_ROLES)}")
        messages.append(message | {"role": _ROLES[message["role"]]})
    return messages


def _said(messages: Sequence[Mapping[str, Any]]) -> str:
    """What is said, a paragraph a message, without system prompts."""
    parts = []
    for message in messages:
        content = message.get("content", "")
        if message["role"] in ("system", "developer"):
            continue
        if isinstance(content, list):
            # A part without text, such as an image, has the key in a table all the same.
            content = "\n".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        parts.append(str(content))
    return "\n\n".join(parts)
