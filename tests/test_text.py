"""Text: sources, the held-out split, and windows."""

import re
from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer, sentences
from tokenizers.processors import TemplateProcessing

from hylo.errors import HyLoError
from hylo.text import Document, Windows, hold_out, make_windows, read_documents, without_overlap


def runs_of_13_words(documents: list[Document]) -> set[str]:
    """An independent count: overlapping runs of 13 words, lower case, punctuation left out."""
    runs = set()
    for document in documents:
        words = re.sub(r"[\W]+", " ", document.text.lower()).split()
        runs |= {" ".join(words[i : i + 13]) for i in range(len(words) - 12)}
    return runs


def test_sources_are_read(text_folder: Path, tmp_path: Path) -> None:
    documents = read_documents([str(text_folder), str(text_folder / "text00.txt")])
    assert [Path(document.name).name for document in documents[:2]] == ["text00.txt", "text01.txt"]
    assert len(documents) == 13
    assert documents[0].text == documents[-1].text == sentences(100)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_text("words")
    (tmp_path / "deep" / "b.bin").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text(" \n")
    assert [document.text for document in read_documents([str(tmp_path)])] == ["words"]


@pytest.mark.parametrize("name", ["missing.txt", "folder", "binary.txt", "empty.txt", "python:nothing"])
def test_bad_sources(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("")
    source = name if name.startswith("python:") else str(tmp_path / name)
    with pytest.raises(HyLoError, match=name):
        read_documents([source])


def test_the_standard_library_is_without_the_topics() -> None:
    documents = read_documents(["python:stdlib"])
    names = {document.name for document in documents}
    assert "python:stdlib/json/decoder.py" in names
    assert not any("pydoc_data" in name or "site-packages" in name for name in names)
    assert not any("/test/" in name or "/tests/" in name for name in names)
    topics = read_documents(["python:topics"])
    assert sum(len(document.text) for document in topics) > 300_000


def test_held_out_is_told_by_text_where_names_agree() -> None:
    training, held_out = [Document("a.txt", sentences(1))], [Document("a.txt", sentences(2))]
    assert without_overlap(training, held_out) == training


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


def test_held_out_shares_no_run_of_13_words(text_folder: Path) -> None:
    documents = read_documents([str(text_folder)])
    first = documents[0].text
    # A copy within another document, one that starts and ends inside paragraphs, and one across a paragraph's end.
    words = first.split()
    documents.append(
        Document("quotes", f"{sentences(200)}\n\nAs they say, {' '.join(words[5:40])}; yes.\n\n{sentences(201)}")
    )
    documents.append(Document("broken", f"{sentences(202)}\n\n{' '.join(words[:7])}\n\n{' '.join(words[7:15])}"))
    held_out = [documents[0], documents[3]]
    assert runs_of_13_words(held_out) & runs_of_13_words(documents[-2:])
    training = without_overlap(documents, held_out)
    assert not runs_of_13_words(held_out) & runs_of_13_words(training)
    # What is not shared stays.
    by_name = {document.name: document.text for document in training}
    assert documents[0].name not in by_name
    assert by_name[documents[5].name] == documents[5].text
    assert sentences(200).strip() in by_name["quotes"]
    assert sentences(201).strip() in by_name["quotes"]


def test_a_removed_paragraph_joins_no_run(text_folder: Path) -> None:
    """What stands on both sides of a removed paragraph may make a held-out run once it is gone."""
    words = [f"w{i}" for i in range(13)]
    other = [f"x{i}" for i in range(13)]
    held_out = [Document("held out", " ".join(words) + "\n\n" + " ".join(other))]
    sneaky = Document("sneaky", "\n\n".join([" ".join(words[:6]), " ".join(other), " ".join(words[6:])]))
    training = without_overlap([*held_out, sneaky, Document("rest", sentences(1))], held_out)
    assert not runs_of_13_words(held_out) & runs_of_13_words(training)


def test_the_real_split_is_disjoint() -> None:
    documents = read_documents(["python:topics"])
    held_out = hold_out(documents, 0.1)
    training = without_overlap(documents, held_out)
    assert 0.05 * len(documents) < len(held_out) < 0.2 * len(documents)
    assert not {d.name for d in held_out} & {d.name for d in training}
    assert not runs_of_13_words(held_out) & runs_of_13_words(training)
    assert hold_out(documents, 0.1) == held_out


def test_the_split_does_not_depend_on_other_documents(text_folder: Path) -> None:
    documents = read_documents([str(text_folder)])
    held_out = hold_out(documents, 0.4)
    assert 0 < len(held_out) < len(documents)
    assert [d for d in hold_out(documents[::2], 0.4) if d in held_out] == [d for d in documents[::2] if d in held_out]


def test_at_least_one_document_is_held_out(text_folder: Path) -> None:
    documents = read_documents([str(text_folder)])
    assert len(hold_out(documents, 1e-9)) == 1
    with pytest.raises(HyLoError, match="no text is left"):
        without_overlap(documents[:1], hold_out(documents[:1], 0.1))


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


def test_batches_hold_every_window_in_order() -> None:
    windows = Windows([[i, i + 1] for i in range(5)], 2)
    batches = windows.batches(2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == windows.windows
