"""A document: a text or a chat, and a name that stays the same from run to run."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Document:
    """A text or a chat.

    Attributes:
        name: stays the same from run to run.
        text: the text; of a chat, what its users, assistants and tools say, without roles and system prompts. By this
            text evaluation is kept apart from training: a system prompt that all chats share is no contamination.
        messages: of a chat, each with `role` and `content`; None of a text.
    """

    name: str
    text: str
    messages: Sequence[Mapping[str, Any]] | None = field(default=None, hash=False)


_SURROGATE = re.compile("[\ud800-\udfff]")


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: half of a surrogate pair, which JSON may escape alone, is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_unicode(text: str) -> str:
    """With U+FFFD for each half of a surrogate pair, which no tokenizer takes."""
    return text if is_unicode(text) else _SURROGATE.sub("\ufffd", text)


def unit_hash(name: str, salt: str = "") -> float:
    """From 0 to 1, evenly over names, and the same on every machine."""
    return int.from_bytes(hashlib.sha256((salt + name).encode(errors="replace")).digest()[:8], "big") / 2**64


def text_digest(documents: Iterable[Document]) -> str:
    """A hash of names and texts, to tell whether they changed."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.text}\0".encode(errors="replace"))
    return digest.hexdigest()
