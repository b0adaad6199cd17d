"""Documents to token ids."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hylo.data.chat import AssistantTokens, ChatTemplate
from hylo.data.documents import Document
from hylo.errors import HyLoError

# Of a text that goes to the tokenizer in one piece: what it keeps of each token is many times the text.
PIECE_CHARACTERS = 2**20


def text_pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most PIECE_CHARACTERS, cut before white space where there is some."""
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        places = (text.rfind(space, begin + 1, begin + PIECE_CHARACTERS) for space in (" ", "\n"))
        end = next((place for place in places if place > 0), begin + PIECE_CHARACTERS)
        yield text[begin:end]
        begin = end
    yield text[begin:]


@dataclass(frozen=True)
class Encoded:
    """A document's tokens, without what starts every text.

    Attributes:
        ids: at least one.
        counted: which of them the loss is to predict; None for all.
    """

    ids: list[int]
    counted: list[bool] | None = None


class Encoder:
    """Tokenises documents: texts as they are, chats through the tokenizer's chat template.

    Args:
        tokenizer: of the base, a fast one.
        loss: on `all` tokens, or in chats on those of the `assistant` alone.
        end_of_text: put the end-of-sequence token after plain texts.
        vocabulary: the model's `config.vocab_size`: whatever text has an id beyond it is refused. A tokenizer may have
            such ids as long as no text uses them. None for no check.

    Raises:
        HyLoError: where `end_of_text` is asked for and the tokenizer has no such token.
    """

    def __init__(
        self,
        tokenizer: Any,
        loss: Literal["all", "assistant"] = "all",
        end_of_text: bool = False,
        vocabulary: int | None = None,
    ) -> None:
        if end_of_text and tokenizer.eos_token_id is None:
            raise HyLoError("end_of_text: the base's tokenizer has no end-of-sequence token")
        self.tokenizer, self.loss = tokenizer, loss
        self._end = [tokenizer.eos_token_id] if end_of_text else []
        self._first = first_ids(tokenizer)
        self._chat_template: ChatTemplate | None = None
        self.vocabulary = vocabulary
        self.may_exceed = vocabulary is not None and self.largest_id >= vocabulary
        """Whether the tokenizer has ids that the model has no embedding for."""

    def start(self, document: Document) -> list[int]:
        """What starts every piece of such a document: what the tokenizer puts before a text, such as Llama 3's
        beginning of text; of a chat, the same if its template writes it.

        Raises HyLoError where the document is a chat and there is no chat template, or as `encode` on an id.
        """
        if document.messages is not None:
            ids = self._ids([self._template(document.name).render(document.name, document.messages)])[0]
            if ids[: len(self._first)] != self._first:
                return []
        self._check(self._first, document)
        return self._first

    def encode(self, documents: Sequence[Document], start: Sequence[int]) -> list[Encoded | None]:
        """Tokens of each document; None where it has none, or none that the loss is to predict.

        Args:
            documents: all texts or all chats.
            start: what `start` said of the first of them.

        Raises:
            HyLoError: where the chat template does not take a chat, or an id is beyond the vocabulary.
        """
        results = self._encode(documents, start)
        for document, encoded in zip(documents, results, strict=True):
            self._check(encoded.ids if encoded is not None else [], document)
        return results

    def _check(self, ids: Sequence[int], document: Document) -> None:
        if not self.may_exceed or self.vocabulary is None or max(ids, default=0) < self.vocabulary:
            return
        largest = max(ids)
        raise HyLoError(
            f"{document.name}: the tokenizer gives {self.tokenizer.convert_ids_to_tokens(largest)!r} the id {largest}, "
            f"and the model's config.vocab_size is {self.vocabulary}; expected ids below that"
        )

    def _encode(self, documents: Sequence[Document], start: Sequence[int]) -> list[Encoded | None]:
        if not documents:
            return []
        if documents[0].messages is None:
            encoded = self._text_ids([document.text for document in documents])
            return [Encoded([*ids, *self._end]) if ids else None for ids in encoded]
        results: list[Encoded | None] = []
        for document, chat in zip(documents, self._chats(documents), strict=True):
            if chat is None:
                results.append(None)
                continue
            if chat.ids[: len(start)] != list(start):
                raise HyLoError(f"{document.name}: the chat template starts this chat unlike the first one")
            ids = chat.ids[len(start) :]
            counted = None if chat.counted is None else chat.counted[len(start) :]
            results.append(Encoded(ids, counted) if ids and (counted is None or any(counted)) else None)
        return results

    def pieces(self, document: Document, start: Sequence[int]) -> Iterator[list[int]]:
        """The same tokens of one document, of a long text piece by piece. Raises as `encode`."""
        if document.messages is not None:
            yield from (encoded.ids for encoded in self.encode([document], start) if encoded is not None)
            return
        for ids in itertools.chain((self._ids([piece])[0] for piece in text_pieces(document.text)), [self._end]):
            self._check(ids, document)
            yield ids

    def _text_ids(self, texts: list[str]) -> list[list[int]]:
        """Short texts together, long ones in pieces."""
        short = [text for text in texts if len(text) <= PIECE_CHARACTERS]
        together = iter(self._ids(short) if short else [])
        return [
            next(together)
            if len(text) <= PIECE_CHARACTERS
            else [token for piece in text_pieces(text) for token in self._ids([piece])[0]]
            for text in texts
        ]

    def _chats(self, documents: Sequence[Document]) -> list[Encoded | None]:
        template = self._template(documents[0].name)
        if self.loss == "all":
            texts = [template.render(document.name, document.messages or ()) for document in documents]
            return [Encoded(ids) for ids in self._ids(texts)]
        return [None if chat is None else Encoded(*chat) for chat in AssistantTokens(template).encode(documents)]

    def _template(self, source: str) -> ChatTemplate:
        if self._chat_template is None:
            self._chat_template = ChatTemplate(self.tokenizer, source)
        return self._chat_template

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # Not verbose: a document may be longer than the model's context.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def digest(self) -> str:
        """A hash of all that makes ids of texts: the tokenizer by its content, its template, and the settings."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content: Any = sorted(tokenizer.get_vocab().items())
        if backend is not None:
            content = json.loads(backend.to_str())
            # Set by whoever called it last.
            content.pop("truncation", None)
            content.pop("padding", None)
        told_by = [content, getattr(tokenizer, "chat_template", None), self._first, self._end, self.loss]
        return hashlib.sha256(json.dumps(told_by).encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """What tokens made elsewhere must agree on; the vocabulary by its content, which library versions share."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return {
            "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "start": self._first,
            "end_of_text": bool(self._end),
            "loss": self.loss,
        }

    @property
    def largest_id(self) -> int:
        return max(self.tokenizer.get_vocab().values())


def first_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, such as Llama 3's beginning of text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return list(whole[: whole.index(bare[0])]) if bare and bare[0] in whole else []
