"""Chats as tokens: rendered by the tokenizer's chat template, with what the assistant wrote told apart."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hylo.data.documents import Document
from hylo.errors import HyLoError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Templates that write today's date (Llama 3's, for one) would render another text every day. 26 July 2024 is the date
# that Llama 3.1's writes where it knows none. A template's own macro hides the function of that name.
_DATE = {"%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%e": "26", "%-d": "26", "%B": "July", "%b": "Jul"}
_DATE |= {"%A": "Friday", "%a": "Fri", "%H": "00", "%M": "00", "%S": "00"}
_FIXED_DATE = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f".replace('{code}', '{value}')" for code, value in _DATE.items())
    + " }}{% endmacro %}{{ '' }}"
)


class ChatTemplate:
    """A tokenizer's chat template, in which it is always the same day.

    Args:
        source: of the chats, for the error.

    Raises:
        HyLoError: where the tokenizer has none.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.tokenizer = tokenizer
        try:
            template = str(tokenizer.get_chat_template())
        except ValueError:
            raise HyLoError(
                f"{source} holds chats, and the base's tokenizer has no chat template; give a base that has one, "
                "or name a column of plain text with text:"
            ) from None
        self.marks_turns = bool(_GENERATION.search(template))
        self._template = _FIXED_DATE + template if "strftime_now" in template else template

    def render(self, name: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """The text of a chat. Raises HyLoError, naming the chat, where the template does not take it."""
        return str(self._apply(name, messages, tokenize=False, add_generation_prompt=add_generation_prompt))

    def encode_marked(self, name: str, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
        """The tokens of a chat, and which of them the template marks as its assistant's. Raises as `render`."""
        encoded = self._apply(
            name,
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            # A chat may be longer than the model's context.
            tokenizer_kwargs={"verbose": False},
        )
        return list(encoded["input_ids"]), [bool(counts) for counts in encoded["assistant_masks"]]

    def _apply(self, name: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self._template, **options)
        # A template is a program of whoever made the model: it may raise anything.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise HyLoError(f"{name}: the chat template does not take this chat: {reason}") from None


class AssistantTokens:
    """Finds which tokens of a chat its assistant wrote, its end of turn included.

    Where the template marks them (`{% generation %}`), by its marks. Elsewhere by prefixes: an assistant's turn is what
    the chat up to it has beyond the chat before it with the prompt for an answer. That holds where each of these texts
    begins the whole chat, as text and as tokens; both are checked.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template, self.tokenizer = template, template.tokenizer
        self._special = set(self.tokenizer.all_special_ids)

    def encode(self, documents: Sequence[Document]) -> list[tuple[list[int], list[bool]] | None]:
        """Token ids of each chat, and which count; None where a turn begins or ends inside a token.

        Raises HyLoError where the template does not take a chat, or writes earlier turns otherwise than it did.
        """
        if self.template.marks_turns:
            return [self.template.encode_marked(document.name, document.messages or ()) for document in documents]
        return self._by_prefixes(documents)

    def _by_prefixes(self, documents: Sequence[Document]) -> list[tuple[list[int], list[bool]] | None]:
        # All texts of all chats in one call: the whole chat, then begin and end of each turn of the assistant.
        texts = [text for document in documents for text in self._texts(document)]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        results: list[tuple[list[int], list[bool]] | None] = []
        for document in documents:
            ids = next(encoded)
            counted, whole = [False] * len(ids), True
            for _ in _turns(document):
                begin, end = next(encoded), next(encoded)
                whole = whole and ids[: len(begin)] == begin and ids[: len(end)] == end
                for at in range(len(begin), self._end_of_turn(ids, len(begin), len(end))):
                    counted[at] = True
            results.append((ids, counted) if whole else None)
        return results

    def _texts(self, document: Document) -> list[str]:
        messages = document.messages or ()
        whole = self.template.render(document.name, messages)
        texts = [whole]
        for turn in _turns(document):
            before = self.template.render(document.name, messages[:turn], add_generation_prompt=True)
            after = self.template.render(document.name, messages[: turn + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise HyLoError(
                    f"{document.name}: the chat template writes message {turn} in another way when others follow, so "
                    "the assistant's turns cannot be found; use loss: all, or a template with {% generation %}"
                )
            texts += [before, after]
        return texts

    def _end_of_turn(self, ids: list[int], begin: int, end: int) -> int:
        """Without the whitespace that a template puts after the token that ends a turn: nobody generates it."""
        last = next((at for at in range(end - 1, begin - 1, -1) if ids[at] in self._special), None)
        if last is None or self.tokenizer.decode(ids[last + 1 : end]).strip():
            return end
        return last + 1


def _turns(document: Document) -> list[int]:
    """The messages of the assistant."""
    return [i for i, message in enumerate(document.messages or ()) if message["role"] == "assistant"]
