"""Tokens on disk: tokenised once, as far as needed, and whole or not there."""

import itertools
import os
import pickle
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_tokenizer, sentences

from hylo.data import store as store_module
from hylo.data.documents import Document
from hylo.data.encode import Encoder
from hylo.data.store import StoreWriter, TokenStore
from hylo.errors import HyLoError


def documents(count: int | None = None) -> Iterator[Document]:
    """Short texts; without end where no count is given."""
    for i in itertools.count() if count is None else range(count):
        yield Document(f"#{i}", sentences(i, 1 + i % 4))


class Counting:
    """Gives documents, and counts those that were taken."""

    def __init__(self, count: int | None = None) -> None:
        self.count, self.taken = count, 0

    def __call__(self) -> Iterable[Document]:
        for document in documents(self.count):
            self.taken += 1
            yield document


class CountingTokenizer:
    """A tokenizer, and how many texts it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.texts = tokenizer, 0

    def __call__(self, texts: Any, **options: Any) -> Any:
        self.texts += len(texts) if isinstance(texts, list) else 0
        return self._tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def writer(folder: Path, read: Callable[[], Iterable[Document]], **options: Any) -> StoreWriter:
    encoder = options.pop("encoder", None) or Encoder(options.pop("tokenizer", None) or make_tokenizer())
    return StoreWriter(folder, "numbers", read, options.pop("training", lambda document: document), encoder)


def texts_of(store: TokenStore) -> list[list[int]]:
    begins = np.cumsum(store.lengths) - store.lengths
    return [store.read(int(b), int(n))[0].tolist() for b, n in zip(begins, store.lengths, strict=True)]


def expected_of(count: int) -> list[list[int]]:
    return make_tokenizer()([document.text for document in documents(count)])["input_ids"]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_BATCH_DOCUMENTS", 5)


def test_a_store_holds_every_token(tmp_path: Path) -> None:
    store = writer(tmp_path / "store", Counting(100)).open()
    assert texts_of(store) == expected_of(100)
    assert store.tokens == sum(map(len, expected_of(100)))
    assert store.documents == 100
    assert np.load(tmp_path / "store" / "00000" / "ids.npy").dtype == np.uint16
    assert np.load(tmp_path / "store" / "00000" / "offsets.npy").dtype == np.int64


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(2**16)])
    last = Document("last", f"bado <{2**16 - 1}>")
    store = writer(tmp_path / "store", lambda: [last], tokenizer=tokenizer).open()
    assert texts_of(store) == [tokenizer(last.text)["input_ids"]]
    assert store.read(0, store.tokens)[0].max() == len(tokenizer) - 1 >= 2**16
    assert np.load(tmp_path / "store" / "00000" / "ids.npy").dtype == np.uint32


def test_a_second_run_reads_and_tokenises_nothing(tmp_path: Path) -> None:
    tokenizer = CountingTokenizer(make_tokenizer())
    first, second = Counting(100), Counting(100)
    store = writer(tmp_path / "store", first, tokenizer=tokenizer).open()
    assert (first.taken, tokenizer.texts) == (100, 100)
    again = writer(tmp_path / "store", second, tokenizer=tokenizer).open()
    limited = writer(tmp_path / "store", second, tokenizer=tokenizer).open(200)
    assert (second.taken, tokenizer.texts) == (0, 100)
    assert texts_of(again) == texts_of(store)
    assert texts_of(limited) == texts_of(store)[: limited.documents]


@pytest.mark.usefixtures("small_batches")
def test_an_endless_source_is_read_as_far_as_needed(tmp_path: Path) -> None:
    read = Counting()
    store = writer(tmp_path / "store", read).open(20_000)
    assert 20_000 <= store.tokens < 22_000
    assert read.taken - store.documents < 10
    assert texts_of(store) == expected_of(store.documents)


@pytest.mark.usefixtures("small_batches")
def test_what_is_given_does_not_depend_on_what_is_there(tmp_path: Path) -> None:
    fresh = writer(tmp_path / "fresh", Counting()).open(3_000)
    assert writer(tmp_path / "store", Counting()).open(9_000).documents > fresh.documents
    assert texts_of(writer(tmp_path / "store", Counting()).open(3_000)) == texts_of(fresh)


@pytest.mark.usefixtures("small_batches")
def test_more_is_tokenised_when_more_is_asked_for(tmp_path: Path) -> None:
    tokenizer = CountingTokenizer(make_tokenizer())
    first = writer(tmp_path / "store", Counting(), tokenizer=tokenizer).open(3_000)
    before = tokenizer.texts
    longer = writer(tmp_path / "store", Counting(), tokenizer=tokenizer).open(9_000)
    assert sorted(path.name for path in (tmp_path / "store").glob("[0-9]*")) == ["00000", "00001"]
    assert longer.tokens >= 9_000
    assert tokenizer.texts - longer.documents < 10
    assert before < tokenizer.texts
    assert texts_of(longer) == expected_of(longer.documents)
    assert texts_of(longer)[: first.documents] == texts_of(first)


@pytest.mark.usefixtures("small_batches")
def test_a_small_budget_is_no_single_book(tmp_path: Path) -> None:
    book = Document("book", sentences(1, 500))
    store = writer(tmp_path / "store", lambda: itertools.chain([book], documents())).open(2_000)
    assert store.lengths[0] > 2_000
    assert store.documents >= 64


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    """Of seven, three for what they share with evaluation text, and one that has no tokens."""
    read = [Document(f"#{i}", sentences(i, 1)) for i in range(6)] + [Document("empty", "")]
    kept = {"#0", "#2", "#4", "empty"}
    store = writer(tmp_path / "store", lambda: read, training=lambda d: d if d.name in kept else None).open()
    assert (store.documents, store.info.read, store.info.held_out, store.info.unusable) == (3, 7, 3, 1)
    assert store.info.complete


def test_a_source_with_nothing_to_train_on(tmp_path: Path) -> None:
    for _ in range(2):
        store = writer(tmp_path / "store", Counting(3), training=lambda document: None).open(100)
        assert (store.documents, store.tokens, store.start, store.info.held_out) == (0, 0, [], 3)


def test_a_run_that_fails_leaves_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_BATCH_DOCUMENTS", 5)
    monkeypatch.setattr(store_module, "SHARD_TOKENS", 500)

    def breaks() -> Iterator[Document]:
        yield from documents(73)
        raise HyLoError("the network is gone")

    with pytest.raises(HyLoError, match="the network is gone"):
        writer(tmp_path / "store", breaks).open()
    whole = sorted(path.name for path in (tmp_path / "store").iterdir() if path.name != ".lock")
    assert len(whole) > 2
    assert all(name.isdigit() for name in whole)
    tokenizer = CountingTokenizer(make_tokenizer())
    store = writer(tmp_path / "store", Counting(100), tokenizer=tokenizer).open()
    assert texts_of(store) == expected_of(100)
    # Nothing of what was whole was done again.
    assert 27 <= tokenizer.texts <= 100 - 5 * len(whole)


def in_a_process(act: Callable[[], None]) -> int:
    """Runs a function in a forked process; what `os.waitpid` says of its end."""
    child = os.fork()
    if not child:
        try:
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.usefixtures("small_batches")
def test_a_killed_writer_leaves_no_half_store(tmp_path: Path) -> None:
    def killed() -> Iterator[Document]:
        yield from documents(50)
        os.kill(os.getpid(), signal.SIGKILL)

    status = in_a_process(lambda: writer(tmp_path / "store", killed).open() and None)
    assert os.WTERMSIG(status) == signal.SIGKILL
    left = [path.name for path in (tmp_path / "store").iterdir()]
    assert not [name for name in left if name.isdigit()]
    assert [name for name in left if ".partial-" in name]
    assert texts_of(writer(tmp_path / "store", Counting(60)).open()) == expected_of(60)
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [".lock", "00000"]


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_of_two_processes_one_tokenises(tmp_path: Path) -> None:
    """The other waits, and finds it done."""
    taken = tmp_path / "taken"

    def slow() -> Iterator[Document]:
        for document in documents(20):
            with taken.open("a") as file:
                file.write("x")
            # Long enough for the other to come.
            signal.sigtimedwait([], 0.005)
            yield document

    def open_it() -> None:
        assert writer(tmp_path / "store", slow).open().documents == 20

    child = os.fork()
    if not child:
        status = in_a_process(open_it)
        os._exit(os.waitstatus_to_exitcode(status))
    open_it()
    assert os.waitpid(child, 0)[1] == 0
    assert len(taken.read_text()) == 20


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""

    def no_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(HyLoError, match=r"cannot write tokens to .*File too large"):
            writer(tmp_path / "store", Counting(2000)).open()

    assert in_a_process(no_room) == 0
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HyLoError, match="cannot write to"):
        writer(tmp_path / "file" / "store", Counting(3)).open()


@pytest.mark.parametrize("name", ["ids.npy", "offsets.npy", "shard.json"])
def test_a_damaged_store_is_told(tmp_path: Path, name: str) -> None:
    writer(tmp_path / "store", Counting(30)).open()
    file = tmp_path / "store" / "00000" / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(HyLoError, match=rf"remove {tmp_path / 'store'} to make it again"):
        texts_of(writer(tmp_path / "store", Counting(30)).open())


def test_a_store_is_small_to_pickle(tmp_path: Path) -> None:
    store = writer(tmp_path / "store", Counting(200)).open()
    texts_of(store)
    pickled = pickle.dumps(store)
    # Its documents' lengths, and not their tokens.
    assert len(pickled) < 8 * store.documents + 2_000 < 2 * store.tokens
    assert texts_of(pickle.loads(pickled)) == texts_of(store)
