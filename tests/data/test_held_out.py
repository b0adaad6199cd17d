"""The held-out split, and what it shares with training text."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from data_examples import chats
from tiny import sentences

from hylo.data.documents import Document
from hylo.data.held_out import HeldOut, evaluation_of, held_out_of, hold_out, without_overlap
from hylo.data.sources import open_source, read_documents
from hylo.errors import HyLoError


def runs_of_13_words(documents: list[Document]) -> set[str]:
    """An independent count: overlapping runs of 13 words, lower case, punctuation left out."""
    runs = set()
    for document in documents:
        words = re.sub(r"[\W]+", " ", document.text.lower()).split()
        runs |= {" ".join(words[i : i + 13]) for i in range(len(words) - 12)}
    return runs


def test_held_out_is_told_by_text_where_names_agree() -> None:
    training, held_out = [Document("a.txt", sentences(1))], [Document("a.txt", sentences(2))]
    assert without_overlap(training, held_out) == training
    assert without_overlap([*training, *held_out], held_out) == training


def test_held_out_shares_no_run_of_13_words(text_folder: Path) -> None:
    documents = sorted(read_documents([str(text_folder)]), key=lambda document: document.name)
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


def test_twelve_words_are_no_contamination() -> None:
    words = [f"w{i}" for i in range(13)]
    judge = HeldOut([Document("held out", " ".join(words))])
    quote = Document("twelve", " ".join([*words[:12], "other"]))
    assert judge.training(quote) == quote
    assert judge.training(Document("thirteen", f"some {' '.join(words)} more")) is None


def test_a_removed_paragraph_joins_no_run() -> None:
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
    assert len(training) > 0.7 * len(documents)


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
    source = open_source(str(text_folder))
    assert held_out_of([source], 1e-9, 1000).documents == hold_out(documents, 1e-9)


def test_sources_are_split_as_their_documents_are(text_folder: Path) -> None:
    source = open_source(str(text_folder))
    documents = list(source.documents())
    judge = held_out_of([source], 0.4, 1000)
    assert judge.documents == hold_out(documents, 0.4)
    assert [kept for document in documents if (kept := judge.training(document))] == without_overlap(
        documents, judge.documents
    )


def test_of_a_large_source_the_beginning_is_held_out(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what hashes below the share further on is not trained on either."""
    monkeypatch.setattr("hylo.data.held_out._LEAST_CHARACTERS", 1)
    source = open_source(str(text_folder))
    whole = hold_out(list(source.documents()), 0.5)
    judge = held_out_of([source], 0.5, 1)
    assert judge.documents == whole[:1]
    assert len(whole) > 2
    assert not any(judge.training(document) for document in whole)
    documents = list(source.documents())
    few = evaluation_of([source], len(documents[0].text) // 8 + 1)
    assert few.documents == documents[:2]


def test_a_source_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ")
    for read in (lambda s: held_out_of(s, 0.1, 1), lambda s: evaluation_of(s, 1)):
        with pytest.raises(HyLoError, match="no text in"):
            read([open_source(str(tmp_path / "a.txt"))])


def test_a_chat_that_shares_text_is_left_out_whole(write_json_lines: Callable[..., Path]) -> None:
    values = chats(3)
    system = {"role": "system", "content": sentences(5, 4)}
    values = [{"messages": [system, *row["messages"]]} for row in values]
    # One sentence of the first chat, quoted in the second.
    values[1]["messages"][-1] = {"role": "assistant", "content": f"yes: {values[0]['messages'][2]['content'] * 2}"}
    first, second, third = read_documents([str(write_json_lines("a.jsonl", values))])
    assert runs_of_13_words([first]) & runs_of_13_words([second])
    judge = HeldOut([first])
    assert judge.training(second) is None
    # The system prompt that all share is no reason.
    assert judge.training(third) == third


def test_the_digest_tells_what_is_held_out() -> None:
    one = HeldOut([Document("a", "text")], 0.1)
    assert one.digest() == HeldOut([Document("a", "text")], 0.1).digest()
    others = [HeldOut([Document("a", "text!")], 0.1), HeldOut([Document("a", "text")], 0.2), HeldOut([], 0.1)]
    assert one.digest() not in {other.digest() for other in others}
