"""Documents to ids: what starts and ends a text, and what the tokenizer is told by."""

from typing import Any

import pytest
from tiny import make_tokenizer, sentences
from tokenizers.processors import TemplateProcessing

from hylo.data import encode
from hylo.data.documents import Document
from hylo.data.encode import Encoder
from hylo.errors import HyLoError

TEXT = Document("a", sentences(1))
CHAT = Document("b", "", [{"role": "user", "content": "bado"}, {"role": "assistant", "content": "gelu"}])


def with_first(tokenizer: Any) -> Any:
    """Puts its first special token before every text, as Llama 3's does."""
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def test_texts_are_what_the_tokenizer_gives(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer)
    assert encoder.start(TEXT) == []
    expected = tokenizer(TEXT.text)["input_ids"]
    encoded = encoder.encode([TEXT, Document("empty", "")], [])
    assert encoded[0].ids == expected
    assert (encoded[0].counted, encoded[1]) == (None, None)
    ended = Encoder(tokenizer, end_of_text=True).encode([TEXT], [])
    assert ended[0].ids == [*expected, tokenizer.eos_token_id]


def test_a_long_text_is_tokenised_in_pieces(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut before white space, which is where a tokenizer begins anew; somewhere where there is none."""
    texts = [sentences(1), "mila", "x" * 1000, sentences(2) + "y" * 250]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 100)
    for text in texts:
        pieces = list(encode.text_pieces(text))
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= 100 for piece in pieces)
    encoded = [one.ids for one in Encoder(tokenizer).encode([Document("a", text) for text in texts], [])]
    assert encoded[:2] == expected[:2]
    assert [tokenizer.decode(ids) for ids in encoded] == texts


def test_an_id_beyond_the_model_is_refused_where_a_text_has_it(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.add_tokens(["<new>"])
    used = Document("used", f"{sentences(2)} <new>")
    refused = r"used: the tokenizer gives '<new>' the id 300, and the model's config\.vocab_size is 300"
    encoder = Encoder(tokenizer, vocabulary=300)
    assert encoder.encode([TEXT], []) == Encoder(tokenizer).encode([TEXT], [])
    assert Encoder(tokenizer, vocabulary=301).encode([used], []) == Encoder(tokenizer).encode([used], [])
    for length in (100, 2**20):
        monkeypatch.setattr(encode, "PIECE_CHARACTERS", length)
        with pytest.raises(HyLoError, match=refused):
            encoder.encode([TEXT, used], [])
        with pytest.raises(HyLoError, match=refused):
            list(encoder.pieces(used, []))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": "bado"}, {"role": "assistant", "content": "gelu<new>"}]
    for loss in ("all", "assistant"):
        with pytest.raises(HyLoError, match=refused):
            Encoder(tokenizer, loss, vocabulary=300).encode([Document("used", "", chat)], [])
    # What stands before and after every text is as much of it.
    tokenizer.eos_token = "<new>"
    with pytest.raises(HyLoError, match="a: the tokenizer gives '<new>' the id 300"):
        Encoder(tokenizer, end_of_text=True, vocabulary=300).encode([TEXT], [])
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<new> $A", special_tokens=[("<new>", 300)])
    with pytest.raises(HyLoError, match="a: the tokenizer gives '<new>' the id 300"):
        Encoder(tokenizer, vocabulary=300).start(TEXT)


def test_what_starts_a_text_is_no_token_of_it(tokenizer: Any) -> None:
    bare = Encoder(tokenizer).encode([TEXT], [])[0].ids
    encoder = Encoder(with_first(tokenizer))
    assert encoder.start(TEXT) == [0]
    assert encoder.encode([TEXT], [0])[0].ids == bare


@pytest.mark.parametrize("loss", ["all", "assistant"])
@pytest.mark.parametrize("first", ["<s>", ""])
def test_what_starts_a_chat_is_written_once(tokenizer: Any, loss: Any, first: str) -> None:
    """A chat template writes what starts a text itself, or does not."""
    with_first(tokenizer).chat_template = (
        f"{first}{{% for m in messages %}}{{% if m.role == 'assistant' %}}{{% generation %}}{{{{ m.content }}}}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    encoder = Encoder(tokenizer, loss)
    start = encoder.start(CHAT)
    assert start == ([0] if first else [])
    [encoded] = encoder.encode([CHAT], start)
    assert encoded.ids == tokenizer("badogelu", add_special_tokens=False)["input_ids"]
    if loss == "assistant":
        said = tokenizer.decode([i for i, counts in zip(encoded.ids, encoded.counted, strict=True) if counts])
        assert said == "gelu"


def test_a_chat_without_an_answer_is_of_no_use(smollm2_tokenizer: Any) -> None:
    question = Document("a", "", [{"role": "user", "content": "Hi"}])
    assert Encoder(smollm2_tokenizer, "assistant").encode([question], []) == [None]
    assert Encoder(smollm2_tokenizer).encode([question], []) != [None]


def test_no_end_of_text_to_put() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(HyLoError, match="no end-of-sequence token"):
        Encoder(tokenizer, end_of_text=True)


def test_the_digest_is_over_all_that_makes_ids(smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Encoder(smollm2_tokenizer).digest()
    # Truncation is a state of the tokenizer that calls leave behind.
    smollm2_tokenizer("some text", truncation=True, max_length=2)
    assert Encoder(smollm2_tokenizer).digest() == before
    digests = {
        before,
        Encoder(smollm2_tokenizer, "assistant").digest(),
        Encoder(smollm2_tokenizer, end_of_text=True).digest(),
        Encoder(make_tokenizer()).digest(),
        Encoder(with_first(make_tokenizer())).digest(),
    }
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", "{{ messages }}")
    digests.add(Encoder(smollm2_tokenizer).digest())
    assert len(digests) == 6
