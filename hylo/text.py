"""Text for distillation and evaluation: sources, the held-out split, and windows of tokens.

A window never crosses a document. Documents are held out whole, by a hash of their name, and what they share with the
training text is removed from the training text.
"""

import hashlib
import itertools
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hylo.errors import HyLoError
from hylo.files import expand_user

_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py"}
# Contamination is told by runs of this many words, as in GPT-3 (arXiv 2005.14165, appendix C).
_SHINGLE_WORDS = 13


@dataclass(frozen=True)
class Document:
    """A text and a name that stays the same from run to run."""

    name: str
    text: str


def _python_topics() -> Iterator[Document]:
    """Python's language reference, as `help()` shows it: half a megabyte of technical English."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"python:topics/{name}", topics[name])


def _python_stdlib() -> Iterator[Document]:
    """The sources of the standard library, without its tests and without the text of `python:topics`."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "turtledemo", "ensurepip"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not skipped.intersection(relative.parts[:-1]):
            yield Document(f"python:stdlib/{relative}", path.read_text(encoding="utf-8", errors="replace"))


# Text that is in every Python installation.
BUILTIN_SOURCES: dict[str, Callable[[], Iterator[Document]]] = {
    "python:topics": _python_topics,
    "python:stdlib": _python_stdlib,
}


def read_documents(sources: Sequence[str]) -> list[Document]:
    """Documents of built-in sources, files and folders (.txt, .md, .rst, .py; one document a file).

    Raises HyLoError on a source that does not exist, is not text, or holds none.
    """
    documents: list[Document] = []
    for source in sources:
        if source in BUILTIN_SOURCES:
            documents.extend(BUILTIN_SOURCES[source]())
            continue
        path = expand_user(source)
        if not path.exists():
            raise HyLoError(
                f"text {source!r} does not exist; expected a file, a folder or {', '.join(BUILTIN_SOURCES)}"
            )
        files = sorted(p for p in path.rglob("*") if p.suffix in _TEXT_SUFFIXES) if path.is_dir() else [path]
        if not files:
            raise HyLoError(f"{source} holds no text; expected files ending in {', '.join(sorted(_TEXT_SUFFIXES))}")
        for file in files:
            try:
                # Named from the source down, so that the split stays when a folder moves.
                name = str(Path(path.name) / file.relative_to(path)) if path.is_dir() else file.name
                documents.append(Document(name, file.read_text(encoding="utf-8")))
            except (OSError, UnicodeDecodeError) as error:
                raise HyLoError(f"{file} is not readable text: {error}") from None
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise HyLoError(f"no text in {', '.join(sources)}")
    return documents


def hold_out(documents: Sequence[Document], share: float) -> list[Document]:
    """The documents to evaluate on: those whose name hashes below `share`, at least one."""
    held_out = [document for document in documents if _unit_hash(document.name) < share]
    return held_out or [min(documents, key=lambda document: _unit_hash(document.name))]


def without_overlap(documents: Sequence[Document], held_out: Sequence[Document]) -> list[Document]:
    """The documents to train on: those not held out, without the paragraphs that share 13 words in a row with them.

    Raises HyLoError where nothing is left.
    """
    kept_out = set(held_out)
    seen = {shingle for document in held_out for shingle in _shingles(document.text)}
    training = [
        Document(document.name, _without(document.text, seen)) for document in documents if document not in kept_out
    ]
    training = [document for document in training if document.text.strip()]
    if not training:
        raise HyLoError("no text is left to train on once the evaluation text is held out; give more than one document")
    return training


def _unit_hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _shingles(text: str) -> Iterator[int]:
    words = _words(text)
    for i in range(len(words) - _SHINGLE_WORDS + 1):
        yield hash(tuple(words[i : i + _SHINGLE_WORDS]))


def _without(text: str, seen: set[int]) -> str:
    """The text without the paragraphs that a run of words in `seen` touches, across paragraph ends as well."""
    paragraphs = re.split(r"(\n\s*\n)", text)
    owner = [i for i, paragraph in enumerate(paragraphs) for _ in _words(paragraph)]
    bad: set[int] = set()
    for start, shingle in enumerate(_shingles(text)):
        if shingle in seen:
            bad.update(owner[start : start + _SHINGLE_WORDS])
    kept = "".join(paragraph for i, paragraph in enumerate(paragraphs) if i not in bad)
    # What stood on both sides of a removed paragraph may make a run that was none before.
    return _without(kept, seen) if bad else kept


def text_digest(documents: Iterable[Document]) -> str:
    """A hash of names and texts, to tell whether they changed."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.text}\0".encode(errors="replace"))
    return digest.hexdigest()


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Token windows of one length, each from one document; the ends of documents are padded.

    Items hold `input_ids` `[T]`, `attention_mask` `[T]` with zeros where padding, and `labels` `[T]`: the input ids,
    -100 where the position does not count in the loss. The first position does not: it has seen one token.
    """

    def __init__(self, windows: list[list[int]], length: int, documents: int = 1) -> None:
        self.windows, self.length, self.documents = windows, length, documents

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.tensor(self.windows[index])
        padding = self.length - len(ids)
        labels = ids.clone()
        labels[0] = -100
        pad = torch.nn.functional.pad
        return {
            # Whatever the padding id, nothing reads it: the mask says so.
            "input_ids": pad(ids, (0, padding)),
            "attention_mask": pad(torch.ones_like(ids), (0, padding)),
            "labels": pad(labels, (0, padding), value=-100),
        }

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(len(window) for window in self.windows)

    @property
    def fill(self) -> float:
        """The share of real tokens among all positions."""
        return self.tokens / (len(self) * self.length)

    def batches(self, batch_size: int) -> list[dict[str, Tensor]]:
        """All windows in order, stacked `batch_size` at a time."""
        items = [self[i] for i in range(len(self))]
        groups = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
        return [{key: torch.stack([item[key] for item in group]) for key in group[0]} for group in groups]


def make_windows(
    documents: Sequence[Document], tokenizer: Any, length: int, *, limit_tokens: int | None = None, seed: int = 0
) -> Windows:
    """Cuts documents to windows, in an order that `seed` fixes.

    At most `limit_tokens` of them, padding counted, but one window at least.
    The end of a document is kept where it fills at least half a window.

    Raises HyLoError where no document is that long.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    limit = None if limit_tokens is None else max(1, limit_tokens // length)
    start = _first_ids(tokenizer)
    piece_length = length - len(start)
    if piece_length < 1:
        raise HyLoError(f"a window of {length} tokens; expected more than the {len(start)} that start every text")
    windows: list[list[int]] = []
    used: set[int] = set()
    cut: dict[int, list[list[int]]] = {}
    # The first window of each document, then the second of each, ...: a small budget sees many documents.
    for turn in itertools.count():
        before = len(windows)
        for i in order:
            if i not in cut:
                ids = tokenizer(documents[i].text, add_special_tokens=False)["input_ids"]
                pieces = [ids[at : at + piece_length] for at in range(0, len(ids), piece_length)]
                cut[i] = [start + piece for piece in pieces if 2 * (len(start) + len(piece)) >= length]
            if turn < len(cut[i]):
                windows.append(cut[i][turn])
                used.add(i)
                if len(windows) == limit:
                    return Windows(windows, length, len(used))
        if len(windows) == before:
            break
    if not windows:
        raise HyLoError(f"no document is long enough for a window of {length} tokens; choose a smaller length")
    return Windows(windows, length, len(used))


def _first_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, such as Llama 3's beginning of text: every window starts so."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return whole[: whole.index(bare[0])] if bare and bare[0] in whole else []
