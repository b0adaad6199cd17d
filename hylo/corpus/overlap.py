"""What texts share: runs of 13 words, hashed. Of two copies the first is kept, and what evaluation has is taken out.

Runs are told as in `hylo.data.held_out`: lower case, punctuation left out. A hash is the same in every process.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from hylo.errors import HyLoError

RUN_WORDS = 13
_WORD = re.compile(r"\w+")
_PARAGRAPH_END = re.compile(r"(\n\s*\n)")
# Multiplier of the hash of a run: odd, and without pattern.
_MIX = np.uint64(0x9E3779B97F4A7C15)
Hashes = NDArray[np.uint64]


@cache
def _word_hash() -> Callable[[bytes], int]:
    try:
        from xxhash import xxh3_64_intdigest
    except ImportError:
        raise HyLoError("telling copies needs xxhash; install it with: pip install 'hylo[corpus]'") from None
    return xxh3_64_intdigest


class Passage:
    """A text, its words and their runs."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words: list[str] = _WORD.findall(text.lower())

    @cached_property
    def runs(self) -> Hashes:
        """A hash of each run of 13 words, `[words - 12]`."""
        count = len(self.words) - RUN_WORDS + 1
        if count <= 0:
            return np.empty(0, np.uint64)
        words = "\0".join(self.words).encode(errors="replace").split(b"\0")
        hashes = np.fromiter(map(_word_hash(), words), np.uint64, len(words))
        runs = np.zeros(count, np.uint64)
        for at in range(RUN_WORDS):
            runs = runs * _MIX + hashes[at : at + count]
        return runs

    def covered(self, found: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which words lie in one of the runs that `found` tells, `[words]`."""
        edges = np.zeros(len(self.words) + 1, np.int64)
        starts = np.flatnonzero(found)
        np.add.at(edges, starts, 1)
        np.add.at(edges, starts + RUN_WORDS, -1)
        return np.cumsum(edges[:-1]) > 0

    def without(self, found: NDArray[np.bool_], share: float) -> str:
        """The text without the paragraphs of which such runs cover more than `share` of the words."""
        if not found.any():
            return self.text
        pieces = _PARAGRAPH_END.split(self.text)
        sizes = np.array([len(_WORD.findall(piece.lower())) for piece in pieces])
        covered = np.concatenate([[0], np.cumsum(self.covered(found))])
        ends = np.cumsum(sizes)
        inside = covered[ends] - covered[ends - sizes]
        kept = [piece for piece, size, hit in zip(pieces, sizes, inside, strict=True) if hit <= share * size]
        return re.sub(r"\n\s*\n\s*\n+", "\n\n", "".join(kept))


class SeenRuns:
    """Runs that were seen before: a bit for each class of hashes.

    A run that was not seen is taken for seen as often as classes are taken: with 32 bits, which fill half a gibibyte,
    about 4 % at 170 million runs.

    Args:
        bits: of the class of a hash; from 24 to 32.
    """

    @classmethod
    def of(cls, characters: int) -> "SeenRuns":
        """With room for text of so many characters: 16 classes or more a word, as far as 32 bits reach."""
        return cls(min(32, max(24, (characters * 4).bit_length())))

    def __init__(self, bits: int) -> None:
        self._shift = np.uint64(64 - bits)
        self._bits = np.zeros(2 ** (bits - 3), np.uint8)

    def _places(self, runs: Hashes) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        places = runs >> self._shift
        return places >> np.uint64(3), np.uint8(1) << (places & np.uint64(7)).astype(np.uint8)

    def known(self, runs: Hashes) -> NDArray[np.bool_]:
        """Which of a text's runs were seen before it, or earlier in it."""
        byte, bit = self._places(runs)
        known: NDArray[np.bool_] = (self._bits[byte] & bit) > 0
        first = np.zeros(len(runs), bool)
        first[np.unique(runs, return_index=True)[1]] = True
        return known | ~first

    def add(self, runs: Hashes) -> None:
        byte, bit = self._places(runs)
        np.bitwise_or.at(self._bits, byte, bit)


@dataclass(frozen=True)
class Labelled:
    """Texts under a name, such as the documents of a benchmark."""

    name: str
    texts: Sequence[str]


class RunIndex:
    """The runs of texts that training text may not have."""

    def __init__(self, sets: Sequence[Labelled]) -> None:
        self.names = [one.name for one in sets]
        hashes = [[Passage(text).runs for text in one.texts] for one in sets]
        every = [np.concatenate([*runs, np.empty(0, np.uint64)]) for runs in hashes]
        joined = np.concatenate([*every, np.empty(0, np.uint64)])
        owner = np.repeat(np.arange(len(sets)), [len(runs) for runs in every])
        self._runs, first = np.unique(joined, return_index=True)
        self._owner = owner[first]
        # Most runs are told to be absent by one look into a table, before the search.
        self._table = np.zeros(2**24, bool)
        self._table[self._runs >> np.uint64(40)] = True

    def __len__(self) -> int:
        return len(self._runs)

    def found(self, runs: Hashes) -> tuple[NDArray[np.bool_], Mapping[str, int]]:
        """Which runs are here, and how many of each set (a run that two sets have counts for the first)."""
        found = np.zeros(len(runs), bool)
        maybe = np.flatnonzero(self._table[runs >> np.uint64(40)])
        if not maybe.size:
            return found, {}
        at = np.searchsorted(self._runs, runs[maybe]).clip(max=len(self._runs) - 1)
        hit = self._runs[at] == runs[maybe]
        found[maybe[hit]] = True
        counts = np.bincount(self._owner[at[hit]], minlength=len(self.names))
        return found, {name: int(count) for name, count in zip(self.names, counts, strict=True) if count}

    def clean(self, passage: Passage) -> tuple[str, dict[str, int]]:
        """The text without the paragraphs that a run of these touches, and how many runs of each set were found."""
        counted: dict[str, int] = {}
        while True:
            found, counts = self.found(passage.runs)
            for name, count in counts.items():
                counted[name] = counted.get(name, 0) + count
            if not counts:
                return passage.text, counted
            # What stood on both sides of a removed paragraph may make a run that was none before.
            passage = Passage(passage.without(found, 0.0))
