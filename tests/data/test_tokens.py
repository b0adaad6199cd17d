"""Token stores that were made elsewhere, taken together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import sentences
from tokenizers.processors import TemplateProcessing

from hylo.data.documents import Document
from hylo.data.encode import Encoder
from hylo.data.store import StoreWriter
from hylo.data.tokens import TokenFolder, describe
from hylo.errors import HyLoError

TEXT = Document("text", sentences(1))
CHAT = Document("chat", "", [{"role": "user", "content": "bado"}, {"role": "assistant", "content": "gelu"}])


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    """Of a tokenizer that begins a text with a token that its chat template does not write."""
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return Encoder(tokenizer)


@pytest.fixture
def write(tmp_path: Path, encoder: Encoder) -> Callable[..., None]:
    def write_store(name: str, *documents: Document) -> None:
        StoreWriter(tmp_path / name, name, lambda: documents, lambda document: document, encoder).open()
        describe(tmp_path / name, encoder)

    return write_store


def test_what_starts_a_text_is_kept_beside_a_store_without_documents(
    write: Callable[..., None], tmp_path: Path, encoder: Encoder
) -> None:
    write("a", TEXT)
    write("b")
    store = TokenFolder(f"tokens:{tmp_path}").open(encoder)
    assert (store.documents, store.start) == (1, [0])


def test_stores_whose_documents_start_differently_are_refused(
    write: Callable[..., None], tmp_path: Path, encoder: Encoder
) -> None:
    write("texts", TEXT)
    write("chats", CHAT)
    with pytest.raises(HyLoError, match=r"\[\] in .*chats and with \[0\] in .*texts; name these as two sources"):
        TokenFolder(f"tokens:{tmp_path}").open(encoder)
    assert TokenFolder(f"tokens:{tmp_path / 'chats'}").open(encoder).start == []


def test_linked_folders_are_read_once(write: Callable[..., None], tmp_path: Path, encoder: Encoder) -> None:
    write("elsewhere/a", TEXT)
    write("tokens/b", Document("other", sentences(2)))
    for name, target in (("linked", "elsewhere"), ("again", "elsewhere/a"), ("back", "tokens"), ("same", "tokens/b")):
        (tmp_path / "tokens" / name).symlink_to(tmp_path / target)
    tokens = TokenFolder(f"tokens:{tmp_path / 'tokens'}")
    assert tokens.open(encoder).documents == 2
    before = tokens.digest()
    (tmp_path / "elsewhere" / "a" / "00000" / "more").write_text("words")
    assert tokens.digest() != before
