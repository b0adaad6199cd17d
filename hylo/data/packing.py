"""Which pieces of documents share a window: best-fit-decreasing (Fewer Truncations, arXiv 2404.10830).

Documents are cut into pieces of at most a window. From the longest to the shortest, each piece goes into the window
with the least room that it fits in, or into a new one. Pieces of one length are placed together, and the window with
the least room is found among the distinct amounts of room: a million pieces take less than a second.
"""

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Pieces of the documents of one source, in the order of the documents.

    Attributes:
        document: number of the document, `[N]`.
        begin: of the piece, among the tokens of all documents end to end, `[N]`.
        size: tokens, without what starts the piece, `[N]`.
        cut: how many documents were cut.
    """

    document: Ints
    begin: Ints
    size: Ints
    cut: int


def cut(lengths: Ints, length: int) -> Pieces:
    """Cuts documents into pieces of at most `length` tokens; all but the last of each are full."""
    counts = -(-lengths // length)
    document = np.repeat(np.arange(len(lengths)), counts)
    # The number of each piece within its document.
    turn = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.cumsum(lengths) - lengths
    size = np.minimum(lengths[document] - turn * length, length)
    return Pieces(document, begins[document] + turn * length, size, int((counts > 1).sum()))


def best_fit(sizes: Ints, capacity: int) -> Ints:
    """The window of each piece, `[N]`, counted from 0; no window holds more than `capacity` tokens.

    Args:
        sizes: tokens of each piece, `[N]`, from 1 to `capacity`. Among pieces of one size the order decides.

    Raises:
        ValueError: on another size.
    """
    if len(sizes) and not (sizes.min() >= 1 and sizes.max() <= capacity):
        raise ValueError(f"expected pieces of 1 to {capacity} tokens")
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    placed = array("q")
    windows = 0
    room = _Room(capacity)
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            space = room.least(size)
            fits = (capacity if space is None else space) // size
            # Each window takes pieces until no other fits; the last one may take fewer.
            full, rest = divmod(count, fits)
            if space is None:
                taken = array("q", range(windows, windows + full + (rest > 0)))
                windows += len(taken)
                space = capacity
            else:
                taken = room.take(space, full + (rest > 0))
                full = min(full, len(taken))
                rest = rest if full < len(taken) else 0
            if fits == 1:
                placed.extend(taken)
            else:
                for window in taken[:full]:
                    placed.extend([window] * fits)
                placed.extend(list(taken[full:]) * rest)
            room.put(space - fits * size, taken[:full])
            room.put(space - rest * size, taken[full:])
            count -= full * fits + rest
    result = np.empty(len(sizes), np.int64)
    result[order] = np.frombuffer(placed, np.int64) if len(placed) else np.empty(0, np.int64)
    return result


class _Room:
    """Windows by the room that is left in them.

    Which amounts of room there are is kept as bits in words of about sqrt(capacity) bits, and which words have any as
    the bits of one more: the next amount is found in constant time.
    """

    def __init__(self, capacity: int) -> None:
        self._shift = max(6, capacity.bit_length() // 2)
        self._words = [0] * ((capacity >> self._shift) + 1)
        self._any = 0
        self._windows: dict[int, array[int]] = {}

    def least(self, size: int) -> int | None:
        """The least room that `size` tokens fit in; None where there is none."""
        word = size >> self._shift
        above = self._words[word] >> (size & ((1 << self._shift) - 1))
        if above:
            return size + _lowest(above)
        further = self._any >> (word + 1)
        if not further:
            return None
        word += 1 + _lowest(further)
        return (word << self._shift) + _lowest(self._words[word])

    def take(self, space: int, count: int) -> "array[int]":
        """At most `count` windows with so much room."""
        windows = self._windows[space]
        taken = windows[-count:]
        del windows[-count:]
        if not windows:
            del self._windows[space]
            word = space >> self._shift
            self._words[word] ^= 1 << (space & ((1 << self._shift) - 1))
            if not self._words[word]:
                self._any ^= 1 << word
        return taken

    def put(self, space: int, windows: "array[int]") -> None:
        """Windows without room are not kept."""
        if not space or not len(windows):
            return
        if space not in self._windows:
            self._windows[space] = array("q")
            word = space >> self._shift
            self._words[word] |= 1 << (space & ((1 << self._shift) - 1))
            self._any |= 1 << word
        self._windows[space].extend(windows)


def _lowest(bits: int) -> int:
    """The number of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1
