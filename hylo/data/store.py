"""Tokens on disk: each source is tokenised once, into memory-mapped arrays that later runs find.

A store is a folder, by name a hash over everything that makes its tokens: the source, the tokenizer, what is held out,
and the settings. It holds shards, each written to a temporary name and moved when it is whole:

    00000/ids.npy       [tokens] uint16, or uint32 where the vocabulary is larger: documents end to end
    00000/offsets.npy   [documents + 1] int64: where each begins
    00000/counted.npy   [tokens] bool: what the loss is to predict; not there where that is all
    00000/shard.json    how many documents were read and left out up to here, and whether the source ends here

A source is read as far as it is needed, and further by the next shard when more is asked for.
"""

import contextlib
import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hylo.data.documents import Document
from hylo.data.encode import Encoded, Encoder
from hylo.errors import HyLoError
from hylo.files import atomic_directory, read_json, sync_tree, write_json
from hylo.progress import bar

# Part of every key: raise it when the same source would give other files.
FORMAT = 3
# Of a shard, about: what a killed run has to do again at most.
SHARD_TOKENS = 2**26
# Documents go to the tokenizer this many together, or this many characters.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2**20
# A source is read until it gave so many documents (or its end), however long the first are: a small budget of tokens
# is then no single book.
_LEAST_DOCUMENTS = 64
_SHARD_FILE = "shard.json"


def default_cache() -> Path:
    """`$HYLO_CACHE`, or ~/.cache/hylo."""
    return Path(os.environ.get("HYLO_CACHE") or Path.home() / ".cache" / "hylo")


@dataclass(frozen=True)
class ShardInfo:
    """What `shard.json` says.

    Attributes:
        documents, tokens: in this shard.
        read: documents of the source read up to its end, from the first.
        held_out: of those, left out for what they share with evaluation text.
        unusable: of those, left out for having no tokens, none that the loss is to predict, or a turn of a chat that
            begins or ends inside a token.
        complete: the source ends here.
        start: ids that start every piece of a document; None while there is no document.
    """

    documents: int = 0
    tokens: int = 0
    read: int = 0
    held_out: int = 0
    unusable: int = 0
    complete: bool = False
    start: list[int] | None = None


class _Shard:
    """One shard's arrays, mapped when they are first read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.info = ShardInfo(**read_json(folder / _SHARD_FILE))
        except (TypeError, HyLoError):
            raise HyLoError(f"{folder} is no whole shard of tokens; remove {folder.parent} to make it again") from None
        self._arrays: dict[str, NDArray[Any] | None] = {}

    def array(self, name: str) -> NDArray[Any] | None:
        """None where there is none of that name. Raises HyLoError where it is not of the size that was written."""
        if name not in self._arrays:
            file = self.folder / f"{name}.npy"
            expected = self.info.documents + 1 if name == "offsets" else self.info.tokens
            array: NDArray[Any] | None = None
            if file.exists() or name != "counted":
                try:
                    # An empty file cannot be mapped.
                    array = np.load(file, mmap_mode="r" if expected else None, allow_pickle=False)
                except (OSError, ValueError, EOFError):
                    array = None
                if array is None or array.shape != (expected,):
                    raise HyLoError(f"{file} is damaged; remove {self.folder.parent} to make it again")
            self._arrays[name] = array
        return self._arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        # Pickled, a mapped array would be written out whole.
        return self.__dict__ | {"_arrays": {}}


def find_shards(folder: Path) -> list[_Shard]:
    """The shards of a store, in order. Raises HyLoError where one is damaged."""
    return [_Shard(shard) for shard in sorted(folder.glob("[0-9]*"))]


class TokenStore:
    """A source's documents as tokens, as far as they were asked for.

    Small to pickle: what reads it in another process maps the files again.

    Args:
        shards: in order.
        limit: tokens that are wanted; None for all there are. What is given depends on it and the source alone, not on
            what else was tokenised before: the fewest documents, 64 at least, that hold so many.
    """

    def __init__(self, shards: list[_Shard], limit: int | None = None) -> None:
        self._shards = shards
        lengths = [np.diff(_required(shard, "offsets")) for shard in shards]
        every = np.concatenate([*lengths, np.empty(0, np.int64)])
        wanted = len(every) if limit is None else _enough(every, limit)
        self.lengths: NDArray[np.int64] = every[:wanted]
        """Tokens of each document, `[documents]`."""
        self._begins = np.cumsum([0, *(shard.info.tokens for shard in shards)])

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Without what starts each piece of a document."""
        return int(self.lengths.sum())

    @property
    def start(self) -> list[int]:
        """Ids that start every piece of a document: what the first shard with documents says."""
        return next((shard.info.start for shard in self._shards if shard.info.documents), None) or []

    @property
    def info(self) -> ShardInfo:
        """Of the last shard: how much of the source was read for what there is."""
        return self._shards[-1].info

    def read(self, begin: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """Ids `[size]` from the `begin`-th token of all documents end to end, and which the loss is to predict.

        They must be of one document.
        """
        at = int(np.searchsorted(self._begins, begin, side="right")) - 1
        shard, begin = self._shards[at], begin - int(self._begins[at])
        ids = _required(shard, "ids")[begin : begin + size].astype(np.int64)
        counted = shard.array("counted")
        return ids, None if counted is None else np.array(counted[begin : begin + size])

    def predicted(self, begin: NDArray[np.int64], size: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which spans of tokens, `[N]`, hold one that the loss is to predict; all where it is to predict every token.

        Args:
            begin: as for `read`, growing.
            size: of each; no span reaches into the next one.
        """
        result = np.ones(len(begin), np.bool_)
        shards = np.searchsorted(self._begins, begin, side="right") - 1
        for at, shard in enumerate(self._shards):
            counted = shard.array("counted")
            if counted is None:
                continue
            result[shards == at] = False
            chosen = np.flatnonzero((shards == at) & (size > 0))
            if not len(chosen):
                continue
            begins = begin[chosen] - self._begins[at]
            bounds = np.stack([begins, begins + size[chosen]], axis=1).ravel()
            # The last span may reach to the end, which is no place to begin at.
            bounds = bounds[:-1] if bounds[-1] == len(counted) else bounds
            result[chosen] = np.logical_or.reduceat(counted, bounds)[::2]
        return result


class MemoryStore(TokenStore):
    """The same from documents of ids that are at hand, all of which count.

    Args:
        documents: ids `[T]` of each.
    """

    def __init__(self, documents: Sequence[NDArray[Any]]) -> None:
        self.lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
        self._ids = np.concatenate([*documents, np.empty(0, np.int64)]).astype(np.int64)
        self._info = ShardInfo(len(self.lengths), len(self._ids), read=len(self.lengths), complete=True)

    @property
    def start(self) -> list[int]:
        return []

    @property
    def info(self) -> ShardInfo:
        return self._info

    def read(self, begin: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        return self._ids[begin : begin + size], None

    def predicted(self, begin: NDArray[np.int64], size: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.ones(len(begin), np.bool_)


def _required(shard: _Shard, name: str) -> NDArray[Any]:
    array = shard.array(name)
    assert array is not None
    return array


def _worth(lengths: NDArray[np.int64] | int, limit: int) -> Any:
    """What documents count towards a limit of tokens."""
    return np.minimum(lengths, max(1, limit // _LEAST_DOCUMENTS))


def _enough(lengths: NDArray[np.int64], limit: int) -> int:
    """How many documents it takes to hold `limit` tokens; all where that is not enough."""
    return min(len(lengths), int(np.searchsorted(np.cumsum(_worth(lengths, limit)), limit)) + 1)


@dataclass(frozen=True)
class StoreWriter:
    """Tokenises a source into a store.

    Attributes:
        folder: of the store.
        source: its name, for the progress bar and errors.
        documents: gives the source's documents from the first.
        training: what of a document may be trained on, or None.
        encoder: to tokens.
    """

    folder: Path
    source: str
    documents: Callable[[], Iterable[Document]]
    training: Callable[[Document], Document | None]
    encoder: Encoder

    def open(self, limit: int | None = None) -> TokenStore:
        """The store with at least `limit` tokens, or all that the source has; tokenises what is not there yet.

        Several processes may ask at once: one of them does it, and the others wait.

        Raises HyLoError where the source cannot be read, or the store not written.
        """
        shards = self._found()
        if not self._suffices(shards, limit):
            with self._locked():
                shards = self._found()
                if not self._suffices(shards, limit):
                    self._write(shards, limit)
                    shards = self._found()
        return TokenStore(shards, limit)

    def _found(self) -> list[_Shard]:
        return find_shards(self.folder)

    def _suffices(self, shards: list[_Shard], limit: int | None) -> bool:
        if shards and shards[-1].info.complete:
            return True
        return limit is not None and _held(shards, limit) >= limit

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with the folder, until the end of the block or of the process."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise HyLoError(f"cannot write to {self.folder}: {error.strerror}") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # What a killed process had begun.
            for leftover in self.folder.glob(".*.partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield

    def _write(self, shards: list[_Shard], limit: int | None) -> None:
        """Writes shards until there is enough."""
        before = shards[-1].info if shards else ShardInfo()
        documents = itertools.islice(self.documents(), before.read, None)
        reading = _Reading(documents, self.training, self.encoder, before)
        dtype = np.uint16 if self.encoder.largest_id < 2**16 else np.uint32
        with bar(f"tokenise {self.source}", limit or 0, "tokens") as shown:
            budget = _Budget(limit, 0 if limit is None else _held(shards, limit), shown.advance)
            for number in itertools.count(len(shards)):
                if reading.complete or budget.spent:
                    break
                with atomic_directory(self.folder / f"{number:05}") as work:
                    try:
                        info = _write_shard(work, reading, budget, dtype)
                        write_json(work / _SHARD_FILE, asdict(info))
                        sync_tree(work)
                    except OSError as error:
                        raise HyLoError(f"cannot write tokens to {self.folder}: {error.strerror}") from None
        sync_tree(self.folder, recursive=False)


def _held(shards: list[_Shard], limit: int) -> int:
    """What the documents of shards count towards a limit."""
    return sum(int(_worth(np.diff(_required(shard, "offsets")), limit).sum()) for shard in shards)


@dataclass
class _Budget:
    """How much of a limit is there."""

    limit: int | None
    held: int
    advance: Callable[[float], None]

    def __post_init__(self) -> None:
        self.advance(self.held)

    def add(self, tokens: int) -> None:
        worth = tokens if self.limit is None else int(_worth(tokens, self.limit))
        self.held += worth
        self.advance(worth)

    @property
    def spent(self) -> bool:
        return self.limit is not None and self.held >= self.limit


class _Reading:
    """A source on its way to tokens, a batch at a time, and the counts of `ShardInfo` so far."""

    def __init__(
        self,
        documents: Iterator[Document],
        training: Callable[[Document], Document | None],
        encoder: Encoder,
        before: ShardInfo,
    ) -> None:
        self._documents, self._training, self._encoder = documents, training, encoder
        self.read, self.held_out, self.unusable = before.read, before.held_out, before.unusable
        self.complete, self.start = before.complete, before.start

    def next_batch(self) -> list[Encoded]:
        """Sets `complete` with the last one."""
        read, characters, kept = 0, 0, []
        while read < _BATCH_DOCUMENTS and characters < _BATCH_CHARACTERS:
            document = next(self._documents, None)
            if document is None:
                self.complete = True
                break
            read += 1
            characters += len(document.text)
            training = self._training(document)
            if training is not None:
                kept.append(training)
        self.read += read
        self.held_out += read - len(kept)
        if not kept:
            return []
        if self.start is None:
            self.start = self._encoder.start(kept[0])
        encoded = [one for one in self._encoder.encode(kept, self.start) if one is not None]
        self.unusable += len(kept) - len(encoded)
        return encoded


def _write_shard(work: Path, reading: _Reading, budget: _Budget, dtype: type[np.unsignedinteger]) -> ShardInfo:
    """Fills a folder until the shard is full, the budget spent, or the source at its end."""
    offsets = [0]
    with contextlib.ExitStack() as stack:
        ids = stack.enter_context(_GrowingArray(work / "ids.npy", dtype))
        counted: _GrowingArray | None = None
        while offsets[-1] < SHARD_TOKENS and not budget.spent and not reading.complete:
            for encoded in reading.next_batch():
                ids.extend(encoded.ids)
                if encoded.counted is not None:
                    if counted is None:
                        counted = stack.enter_context(_GrowingArray(work / "counted.npy", np.bool_))
                    counted.extend(encoded.counted)
                offsets.append(offsets[-1] + len(encoded.ids))
                budget.add(len(encoded.ids))
    np.save(work / "offsets.npy", np.array(offsets, np.int64))
    return ShardInfo(
        documents=len(offsets) - 1,
        tokens=offsets[-1],
        read=reading.read,
        held_out=reading.held_out,
        unusable=reading.unusable,
        complete=reading.complete,
        start=reading.start,
    )


class _GrowingArray:
    """A one-dimensional .npy file whose length is known when it is closed."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self._file: BinaryIO = path.open("wb")
        self._dtype, self._length = np.dtype(dtype), 0
        self._header()

    def _header(self) -> None:
        """numpy leaves room in it for any length."""
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def extend(self, values: list[Any]) -> None:
        self._file.write(np.array(values, self._dtype).tobytes())
        self._length += len(values)

    def __enter__(self) -> "_GrowingArray":
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.seek(0)
            self._header()
