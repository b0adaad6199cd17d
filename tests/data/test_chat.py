"""Chats as tokens, and which of them the assistant wrote."""

import re
from typing import Any

import pytest
from data_examples import chats
from tiny import make_tokenizer

from hylo.data.chat import AssistantTokens, ChatTemplate
from hylo.data.documents import Document
from hylo.data.encode import Encoder
from hylo.errors import HyLoError

# SmolLM2's own, with the assistant's turns marked.
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
)


def chat(*contents: str, system: str | None = None) -> Document:
    """The user begins, and they take turns."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return Document("chats.jsonl#7", "", messages)


CHATS = [
    chat("Hi", "Hello there."),
    chat("Count.", "one, two\n\nthree", "Go on", " four  ", "And?", "```python\nprint('five')\n```\n"),
    chat("Grüße 😀", "日本語 and 😀!", system="You translate."),
    chat("What ends a turn?", "A token such as <|im_end|> does."),
    *[Document(f"#{i}", "", row["messages"]) for i, row in enumerate(chats(3))],
]


@pytest.mark.parametrize("document", CHATS, ids=range(len(CHATS)))
def test_smollm2_token_by_token(smollm2_tokenizer: Any, document: Document) -> None:
    """Against the characters of the rendered text: what stands between an assistant's header and its end of turn."""
    [encoded] = AssistantTokens(ChatTemplate(smollm2_tokenizer, "chats")).encode([document])
    assert encoded is not None
    ids, counted = encoded
    text = ChatTemplate(smollm2_tokenizer, "chats").render("chat", document.messages)
    whole = smollm2_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert ids == whole["input_ids"]
    if document.messages[0]["role"] != "system":
        assert "You are a helpful AI assistant named SmolLM" in smollm2_tokenizer.decode(ids)

    expected = [False] * len(ids)
    at = 0
    for message in document.messages:
        begin = text.index(f"<|im_start|>{message['role']}\n", at) + len(f"<|im_start|>{message['role']}\n")
        at = begin + len(message["content"] + "<|im_end|>")
        if message["role"] == "assistant":
            for i, (first, last) in enumerate(whole["offset_mapping"]):
                expected[i] = expected[i] or (begin <= first and last <= at)
    assert counted == expected

    # And decoded, run by run.
    runs: list[list[int]] = []
    for i, counts in enumerate(counted):
        if counts and (i == 0 or not counted[i - 1]):
            runs.append([])
        if counts:
            runs[-1].append(ids[i])
    said = [message["content"] for message in document.messages if message["role"] == "assistant"]
    assert [smollm2_tokenizer.decode(run) for run in runs] == [f"{content}<|im_end|>" for content in said]


def test_the_end_of_a_turn_counts_though_it_is_the_padding(smollm2_tokenizer: Any) -> None:
    assert smollm2_tokenizer.pad_token_id == smollm2_tokenizer.eos_token_id
    [encoded] = AssistantTokens(ChatTemplate(smollm2_tokenizer, "chats")).encode([chat("Hi", "Hello", "Bye", "Ciao")])
    assert encoded is not None
    ends = [counts for token, counts in zip(*encoded, strict=True) if token == smollm2_tokenizer.eos_token_id]
    # Of the system prompt, then of user and assistant in turn.
    assert ends == [False, False, True, False, True]


def test_templates_that_mark_turns(smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [chat("Hi", "Hello there.", "Go on", "one, two\n\nthree", system="be brief")]
    by_prefixes = AssistantTokens(ChatTemplate(smollm2_tokenizer, "chats"))
    expected = by_prefixes.encode(documents)
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", MARKED)
    by_marks = AssistantTokens(ChatTemplate(smollm2_tokenizer, "chats"))
    assert (by_prefixes.template.marks_turns, by_marks.template.marks_turns) == (False, True)
    assert by_marks.encode(documents) == expected
    assert any(expected[0][1])


def test_a_turn_that_begins_inside_a_token_is_told(smollm2_tokenizer: Any) -> None:
    """The newline after the header and that of the answer are one token, which no prompt ends with."""
    good, bad = chat("Hi", "Hello"), chat("Hi", "\n\nHello")
    assert "\n\n\n" in ChatTemplate(smollm2_tokenizer, "chats").render("chat", bad.messages)
    encoded = AssistantTokens(ChatTemplate(smollm2_tokenizer, "chats")).encode([good, bad, good])
    assert [one is None for one in encoded] == [False, True, False]


def test_a_template_that_rewrites_earlier_turns(smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As templates of reasoning models do, which drop what was thought before."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
        "{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", template)
    assistant = AssistantTokens(ChatTemplate(smollm2_tokenizer, "chats"))
    assert assistant.encode([chat("Hi", "<think>hm</think>Hello")]) != [None]
    with pytest.raises(HyLoError, match=r"chats.jsonl#7: the chat template writes message 1 in another way") as error:
        assistant.encode([chat("Hi", "<think>hm</think>Hello", "Bye", "Ciao")])
    assert "\n" not in str(error.value)


def test_no_template() -> None:
    encoder = Encoder(make_tokenizer())
    with pytest.raises(HyLoError, match=r"chats\.jsonl#7 holds chats, and the base's tokenizer has no chat template"):
        encoder.start(chat("Hi", "Hello"))


def test_what_a_template_does_not_take(smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Document("chats.jsonl#7", "", [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    with pytest.raises(HyLoError, match=r"chats\.jsonl#7: the chat template does not take this chat: ") as error:
        Encoder(smollm2_tokenizer).encode([parts], [])
    assert "\n" not in str(error.value)
    refuses = "{{ raise_exception('Roles must alternate!') }}{% generation %}{% endgeneration %}"
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", refuses)
    for loss in ("all", "assistant"):
        with pytest.raises(HyLoError, match="does not take this chat: Roles must alternate!"):
            Encoder(smollm2_tokenizer, loss).encode([chat("Hi", "Hello")], [])


def test_a_template_with_todays_date_is_the_same_every_day(
    smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Llama 3's writes it."""
    template = (
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}Today: {{ date_string }}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", template)
    assert ChatTemplate(smollm2_tokenizer, "chats").render("chat", chat("Hi").messages) == "Today: 26 Jul 2024Hi"
    [encoded] = AssistantTokens(ChatTemplate(smollm2_tokenizer, "chats")).encode([chat("Hi", "Hello")])
    assert encoded is not None
    assert re.match("Today: 26 Jul 2024", smollm2_tokenizer.decode(encoded[0]))
