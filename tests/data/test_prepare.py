"""The one door: from a recipe's section to windows."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_examples import chats, rows
from tiny import sentences

from hylo.data.batches import collate, targets
from hylo.data.documents import Document
from hylo.data.encode import Encoder
from hylo.data.prepare import Corpus
from hylo.data.sections import DataSection
from hylo.data.sources import read_documents
from hylo.data.store import StoreWriter, default_cache
from hylo.data.tokens import describe
from hylo.errors import HyLoError

WriteJsonLines = Callable[..., Path]


def corpus(tokenizer: Any, cache: Path, *train: Any, **section: Any) -> Corpus:
    return Corpus(DataSection.model_validate({"train": list(train)} | section), lambda: tokenizer, cache=cache)


def all_pieces(windows: Any) -> list[list[int]]:
    return sorted(piece for i in range(len(windows)) for piece in windows.pieces(i))


def test_from_a_folder_to_windows(text_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    data = corpus(tokenizer, tmp_path, str(text_folder))
    data.check()
    windows = data.prepare(tokens=None, length=64, seed=0)
    held_out = {document.name for document in data.evaluation}
    training = [document for document in read_documents([str(text_folder)]) if document.name not in held_out]
    assert len(held_out) >= 1
    assert windows.documents == len(training) == 12 - len(held_out)
    expected = []
    for document in training:
        ids = tokenizer(document.text)["input_ids"]
        expected += [ids[at : at + 64] for at in range(0, len(ids), 64)]
    assert all_pieces(windows) == sorted(expected)
    assert windows.truncated == len(training)
    [report] = windows.sources
    assert (report.source, report.documents, report.held_out) == (str(text_folder), len(training), len(held_out))
    assert len(data.prepare(tokens=6_400, length=64, seed=0)) == 100


def test_a_second_run_tokenises_nothing(
    text_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = corpus(tokenizer, tmp_path, str(text_folder)).prepare(tokens=2_000, length=64, seed=0)
    written = sorted(tmp_path.rglob("*"))

    def refused(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(StoreWriter, "_write", refused)
    # Weights, lengths, seeds and packing are of windows, not of tokens.
    again = corpus(tokenizer, tmp_path, {"source": str(text_folder), "weight": 2}, packing=False)
    assert all_pieces(corpus(tokenizer, tmp_path, str(text_folder)).prepare(tokens=2_000, length=64, seed=0)) == (
        all_pieces(first)
    )
    assert len(again.prepare(tokens=2_000, length=32, seed=5)) == 63
    assert sorted(tmp_path.rglob("*")) == written


def test_what_changes_the_tokens_changes_the_store(tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.txt").write_text(sentences(i))
    cache = tmp_path / "cache"

    def stores(**section: Any) -> set[str]:
        corpus(tokenizer, cache, str(text), **section).prepare(tokens=None, length=64, seed=0)
        return {path.name for path in cache.iterdir()}

    seen = [stores(), stores(end_of_text=True), stores(holdout=0.7), stores(loss="assistant")]
    (text / "3.txt").write_text(sentences(30))
    seen.append(stores())
    assert [len(names) for names in seen] == [1, 2, 3, 4, 5]


def test_the_digest_tells_that_the_data_changed(tmp_path: Path, text_folder: Path) -> None:
    file, other = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text(sentences(1))
    other.write_text(sentences(2))

    def digest() -> str:
        data = corpus(None, tmp_path, str(text_folder), str(file), eval=[str(other)])
        # Neither needs the tokenizer.
        assert data.evaluation
        return data.digest

    before = digest()
    assert digest() == before
    file.write_text(sentences(3))
    changed = digest()
    other.write_text(sentences(4))
    assert len({before, changed, digest()}) == 3


def test_evaluation_text_of_its_own(tokenizer: Any, tmp_path: Path, text_folder: Path) -> None:
    quoting = tmp_path / "quoting.txt"
    quoting.write_text(f"{sentences(900)}\n\n{sentences(100)}")
    data = corpus(tokenizer, tmp_path, str(quoting), eval=[str(text_folder / "text00.txt")])
    [document] = data.evaluation
    assert document.text == sentences(100)
    windows = data.prepare(tokens=None, length=4096, seed=0)
    # What is in both is trained on no more: here, all that stood after the paragraphs of its own.
    assert [tokenizer.decode(piece).strip() for piece in all_pieces(windows)] == [sentences(900).strip()]


def test_each_file_a_source(tokenizer: Any, tmp_path: Path, text_folder: Path) -> None:
    """One of them is held out whole: nothing is left of that source, and the others go on."""
    files = [str(file) for file in sorted(text_folder.iterdir())]
    data = corpus(tokenizer, tmp_path, *files)
    windows = data.prepare(tokens=2_000, length=64, seed=0)
    empty = [report.source for report in windows.sources if not report.documents]
    assert {Path(source).name for source in empty} == {document.name for document in data.evaluation}
    with pytest.raises(HyLoError, match="no text is left to train on once the evaluation text is held out"):
        corpus(tokenizer, tmp_path, files[0]).prepare(tokens=2_000, length=64, seed=0)


def test_chats_and_text_with_weights(smollm2_tokenizer: Any, tmp_path: Path, write_json_lines: WriteJsonLines) -> None:
    """Half of the tokens each; of chats the answers count, of text everything."""
    chat = write_json_lines("chat.jsonl.gz", chats(60))
    text = write_json_lines("text.jsonl", rows(60))
    train = ({"source": str(chat), "weight": 1}, {"source": str(text), "weight": 1})
    data = corpus(smollm2_tokenizer, tmp_path / "cache", *train, loss="assistant")
    data.check()
    windows = data.prepare(tokens=30_000, length=256, seed=0)
    used = [report.used_tokens for report in windows.sources]
    assert used[0] / sum(used) == pytest.approx(0.5, abs=0.03)
    answers = {row["messages"][turn]["content"] + "<|im_end|>" for row in chats(60) for turn in (1, 3)}
    decode = smollm2_tokenizer.decode
    begins_of_chats = texts = found = 0
    for i in range(len(windows)):
        batch = collate([windows[i]])
        labels, offsets = batch["labels"][0], batch["cu_seqlens"].tolist()
        for number, piece in enumerate(windows.pieces(i)):
            part = labels[offsets[number] : offsets[number] + len(piece)].tolist()
            if not decode(piece).startswith("<|im_start|>system"):
                texts += part[1:] == piece[1:]
                continue
            begins_of_chats += 1
            runs = "".join("\0" if label == -100 else decode([label]) for label in part)
            whole = [run for run in runs.split("\0") if run.endswith("<|im_end|>")]
            assert set(whole) <= answers
            found += len(whole)
        assert (targets(batch["labels"]) != -100).sum() == (batch["labels"] != -100).sum()
    assert begins_of_chats > 50
    assert found > 1.5 * begins_of_chats
    assert texts > 50


def test_all_of_a_chat_counts_by_default(
    smollm2_tokenizer: Any, tmp_path: Path, write_json_lines: WriteJsonLines
) -> None:
    chat = write_json_lines("chat.jsonl", chats(10))
    windows = corpus(smollm2_tokenizer, tmp_path, str(chat)).prepare(tokens=None, length=512, seed=0)
    for i in range(len(windows)):
        item = windows[i]
        uncounted = int((item["labels"] == -100).sum())
        # First tokens and padding.
        pieces = windows.pieces(i)
        assert uncounted == len(pieces) + 512 - sum(map(len, pieces))


def test_chats_are_held_out_and_evaluated(
    smollm2_tokenizer: Any, tmp_path: Path, write_json_lines: WriteJsonLines
) -> None:
    from hylo.data.windows import make_windows

    data = corpus(smollm2_tokenizer, tmp_path, str(write_json_lines("chat.jsonl", chats(40))), holdout=0.2)
    assert 2 < len(data.evaluation) < 16
    windows = make_windows(data.evaluation, smollm2_tokenizer, 64)
    assert smollm2_tokenizer.decode(windows.windows[0]).startswith("<|im_start|>system\nYou are a helpful AI")
    training = data.prepare(tokens=None, length=64, seed=0)
    assert training.sources[0].documents == 40 - len(data.evaluation)


def test_without_packing_and_for_calibration(text_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    single = corpus(tokenizer, tmp_path, str(text_folder), packing=False).prepare(tokens=1_000, length=50, seed=3)
    assert [len(single.pieces(i)) for i in range(len(single))] == [1] * 20
    windows = corpus(tokenizer, tmp_path, str(text_folder)).calibration(tokens=1_000, length=50, seed=3)
    assert windows.windows == [single.pieces(i)[0] for i in range(20)]
    assert windows[0]["attention_mask"].sum() == len(windows.windows[0])
    assert windows.documents == single.documents > 5


@pytest.mark.parametrize("kind", ["text", "cache", "tokens"])
def test_ids_beyond_the_model(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    """Refused before the first window, wherever the tokens come from; a token that no text uses is none of them."""
    tokenizer.add_tokens(["<new>"])
    texts = tmp_path / "texts"
    texts.mkdir()
    documents = [Document(f"{i}.txt", f"{'<new> ' if i % 2 else ''}{sentences(i)}") for i in range(6)]
    for document in documents:
        (texts / document.name).write_text(document.text)
    held_out = {"eval": [str(texts / "0.txt")]}
    source = str(texts)
    if kind == "tokens":
        source = f"tokens:{tmp_path / 'store'}"
        encoder = Encoder(tokenizer)
        StoreWriter(tmp_path / "store", "store", lambda: documents, lambda document: document, encoder).open()
        describe(tmp_path / "store", encoder)
    if kind == "cache":
        corpus(tokenizer, tmp_path / "cache", source, **held_out).prepare(tokens=None, length=64, seed=0)

    def prepare(train: str, vocabulary: int) -> Any:
        section = DataSection.model_validate({"train": [train]} | held_out)
        data = Corpus(section, lambda: tokenizer, cache=tmp_path / "cache", load_vocabulary=lambda: vocabulary)
        return data.prepare(tokens=None, length=64, seed=0)

    assert len(prepare(source, 301)) > 5
    assert prepare(str(texts / "2.txt"), 300).tokens > 64
    with pytest.raises(HyLoError, match=r"id 300\b.*config\.vocab_size is 300; expected ids below that"):
        prepare(source, 300)


@pytest.mark.parametrize("section", [{}, {"loss": "assistant"}])
def test_bad_chats_are_told_by_the_check(
    tokenizer: Any, tmp_path: Path, write_json_lines: WriteJsonLines, section: dict[str, Any]
) -> None:
    chat = write_json_lines("chat.jsonl", chats(10))
    with pytest.raises(HyLoError, match="tokenizer has no chat template"):
        corpus(tokenizer, tmp_path, str(chat), **section).check()
    with pytest.raises(HyLoError, match=r"missing\.txt' does not exist"):
        corpus(tokenizer, tmp_path, str(tmp_path / "missing.txt")).check()


def test_chats_without_answers(smollm2_tokenizer: Any, tmp_path: Path, write_json_lines: WriteJsonLines) -> None:
    questions = [{"messages": row["messages"][:1]} for row in chats(20)]
    data = corpus(smollm2_tokenizer, tmp_path, str(write_json_lines("chat.jsonl", questions)), loss="assistant")
    with pytest.raises(HyLoError, match="no training document can be used"):
        data.prepare(tokens=1_000, length=64, seed=0)


def test_order_is_the_same_in_another_process(text_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    """Python's own hashes differ from process to process; here neither the cache nor they are shared."""
    program = (
        "import sys, pathlib; sys.path.insert(0, 'tests')\n"
        "from tiny import make_tokenizer\n"
        "from hylo.data.prepare import Corpus\n"
        "from hylo.data.sections import DataSection\n"
        "section = DataSection(train=[sys.argv[1]])\n"
        "data = Corpus(section, make_tokenizer, cache=pathlib.Path(sys.argv[2]))\n"
        "windows = data.prepare(tokens=4000, length=64, seed=7)\n"
        "print(data.digest, [windows[i]['input_ids'].tolist() for i in range(len(windows))])\n"
    )
    data = corpus(tokenizer, tmp_path / "ours", str(text_folder))
    windows = data.prepare(tokens=4000, length=64, seed=7)
    ours = f"{data.digest} {[windows[i]['input_ids'].tolist() for i in range(len(windows))]}\n"
    environment = os.environ | {"PYTHONHASHSEED": "5"}
    theirs = subprocess.run(
        [sys.executable, "-c", program, str(text_folder), str(tmp_path / "theirs")],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert theirs.stdout == ours


def test_the_cache_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("HYLO_CACHE")
    assert default_cache() == Path.home() / ".cache" / "hylo"
