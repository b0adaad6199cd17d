"""Windows of one document each."""

from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer, sentences
from tokenizers.processors import TemplateProcessing

from hylo.data import encode
from hylo.data.documents import Document
from hylo.data.sources import read_documents
from hylo.data.windows import Windows, make_windows
from hylo.errors import HyLoError


def test_every_window_starts_as_the_tokenizer_starts_a_text() -> None:
    tokenizer = make_tokenizer()
    documents = [Document("a", sentences(1)), Document("b", sentences(2))]
    bare = make_windows(documents, tokenizer, 16)
    first = tokenizer.vocab_size - 1
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    assert tokenizer("bado")["input_ids"][0] == first
    windows = make_windows(documents, tokenizer, 17)
    assert [window[0] for window in windows.windows] == [first] * len(windows)
    assert [window[1:] for window in windows.windows] == bare.windows
    with pytest.raises(HyLoError, match="a window of 1 tokens; expected more than the 1 that start every text"):
        make_windows(documents, tokenizer, 1)


def test_windows_never_cross_documents(text_folder: Path) -> None:
    documents = read_documents([str(text_folder)])
    tokenizer = make_tokenizer()
    windows = make_windows(documents, tokenizer, 50)
    encoded = [tokenizer(document.text)["input_ids"] for document in documents]
    starts = {tuple(ids[start : start + 50]) for ids in encoded for start in range(0, len(ids), 50)}
    assert all(tuple(window) in starts for window in windows.windows)
    # All but the ends that fill less than half a window.
    assert {tuple(window) for window in windows.windows} == {start for start in starts if len(start) >= 25}
    assert windows.tokens == sum(map(len, windows.windows))


def test_a_long_text_is_tokenised_as_far_as_windows_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, which give the same windows."""
    documents, tokenizer = [Document("a", sentences(1, 200)), Document("b", sentences(2, 30))], make_tokenizer()
    whole = make_windows(documents, tokenizer, 50).windows
    few = make_windows(documents, tokenizer, 50, limit_tokens=200).windows
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 400)
    assert make_windows(documents, tokenizer, 50).windows == whole
    sizes: list[int] = []
    ids = encode.Encoder._ids
    monkeypatch.setattr(
        encode.Encoder, "_ids", lambda self, texts: (sizes.extend(map(len, texts)), ids(self, texts))[1]
    )
    assert make_windows(documents, tokenizer, 50, limit_tokens=200).windows == few
    assert sum(sizes) < 3000 < len(documents[0].text)


def test_order_is_fixed_by_the_seed(text_folder: Path) -> None:
    documents = read_documents([str(text_folder)])
    tokenizer = make_tokenizer()
    ours, same, other = (make_windows(documents, tokenizer, 50, seed=seed).windows for seed in (1, 1, 2))
    assert ours == same
    assert ours != other
    assert sorted(ours) == sorted(other)


def test_a_small_budget_sees_many_documents(text_folder: Path) -> None:
    documents = read_documents([str(text_folder)])
    tokenizer = make_tokenizer()
    windows = make_windows(documents, tokenizer, 20, limit_tokens=205)
    assert windows.tokens == 200
    firsts = {tuple(tokenizer(document.text)["input_ids"][:20]) for document in documents}
    assert len({tuple(window) for window in windows.windows} & firsts) == 10


def test_text_too_short_for_a_window() -> None:
    with pytest.raises(HyLoError, match="window of 1000"):
        make_windows([Document("short", "a few words")], make_tokenizer(), 1000)


def test_ids_beyond_the_model_are_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    documents = [Document("a", sentences(1)), Document("b", f"<new> {sentences(2)}")]
    assert make_windows(documents[:1], tokenizer, 16, vocabulary=300).windows
    with pytest.raises(HyLoError, match=r"b: the tokenizer gives '<new>' the id 300, .*config\.vocab_size is 300"):
        make_windows(documents, tokenizer, 16, vocabulary=300)


def test_labels_and_masks() -> None:
    windows = Windows([[5, 6, 7, 8], [9, 10]], 4)
    assert len(windows) == 2
    full, short = windows[0], windows[1]
    assert full["input_ids"].tolist() == [5, 6, 7, 8]
    assert full["attention_mask"].tolist() == [1, 1, 1, 1]
    assert full["labels"].tolist() == [-100, 6, 7, 8]
    assert short["input_ids"][:2].tolist() == [9, 10]
    assert short["attention_mask"].tolist() == [1, 1, 0, 0]
    assert short["labels"].tolist() == [-100, 10, -100, -100]
    assert (windows.tokens, windows.fill) == (6, 0.75)


def test_batches_hold_every_window_in_order() -> None:
    windows = Windows([[i, i + 1] for i in range(5)], 2)
    batches = windows.batches(2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == windows.windows
