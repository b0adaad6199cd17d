"""Which pieces of which sources make a stage's windows, and in what order: fixed by a seed.

A source is an endless sequence of epochs; in each, all its pieces come once, in another order. Rounds take from every
source in proportion to its share, so that the source that is gone over most often is gone over once a round. The pieces
of a round are packed together, and its windows shuffled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hylo.data.packing import Ints, best_fit, cut
from hylo.data.store import TokenStore
from hylo.errors import HyLoError


@dataclass(frozen=True)
class Part:
    """A source of a mixture.

    Attributes:
        name: of the source.
        store: its tokens.
        weight: share of the tokens, relative to other sources; None where all sources count by their size.
    """

    name: str
    store: TokenStore
    weight: float | None = None


@dataclass(frozen=True)
class SourceReport:
    """What a source gives to windows.

    Attributes:
        source: its name.
        documents, tokens: that there are to take from: as much of a large source as was tokenised for this.
        used_tokens: in the windows; repetitions, and what starts each piece, are counted.
        epochs: how often the source is gone over.
        held_out, unusable: documents left out, as far as the source was read: for being evaluated on or sharing text
            with what is; for having no token that the loss is to predict.
        unusable_tokens: left out of the documents there are: pieces of those longer than a window that hold no token
            that the loss is to predict.
    """

    source: str
    documents: int
    tokens: int
    used_tokens: int
    epochs: float
    held_out: int
    unusable: int
    unusable_tokens: int


@dataclass(frozen=True)
class WindowPlan:
    """Windows as pieces of documents, in order: those of window i are `offsets[i]` to `offsets[i + 1]`.

    Attributes:
        length: tokens a window.
        source, document, begin, size: of each piece, `[N]`; see `packing.Pieces`.
        offsets: `[windows + 1]`.
        sources: what they are made of.
        truncated: documents that are longer than a window, and so were cut.
    """

    length: int
    source: Ints
    document: Ints
    begin: Ints
    size: Ints
    offsets: Ints
    sources: list[SourceReport]
    truncated: int


def plan_windows(
    parts: Sequence[Part], length: int, *, tokens: int | None, seed: int, packing: bool = True
) -> WindowPlan:
    """Chooses, packs and orders pieces.

    Args:
        parts: the mixture; with a weight each, or none.
        length: tokens a window.
        tokens: how many are wanted, padding counted; None for every piece once, whatever the weights.
        seed: fixes everything.
        packing: several pieces a window; otherwise one, and those that fill less than half a window are left out.

    Raises:
        HyLoError: where the length leaves no room for text, a source with a weight has no text, weights are too large,
            or, without packing, no document fills half a window.
    """
    sources = [_Sequence(part, length, np.random.default_rng([seed, i]), packing) for i, part in enumerate(parts)]
    if not any(source.tokens for source in sources):
        raise HyLoError(f"no document is long enough for a window of {length} tokens; choose a smaller length")
    wanted = _wanted(sources, tokens)
    epochs = max(want / source.tokens for want, source in zip(wanted, sources, strict=True) if want)
    generator = np.random.default_rng([seed, len(parts)])
    rounds, windows = [], 0
    for number in range(1, int(np.ceil(epochs)) + 1):
        # The last round ends where the epochs do.
        until = min(number / epochs, 1.0)
        pieces = [source.take(until * want) for source, want in zip(sources, wanted, strict=True)]
        # The little that the last round has left may be of a piece that was taken before.
        if not any(map(len, pieces)):
            continue
        packed = _pack(sources, pieces, length, packing, generator)
        packed[-1] += windows
        windows = int(packed[-1][-1]) + 1
        rounds.append(packed)
    if tokens is not None:
        # Windows are not quite full, so the tokens that are wanted made some more; the last are left out.
        windows = -(-tokens // length)
    source, document, begin, size, window = (np.concatenate(values) for values in zip(*rounds, strict=True))
    offsets = np.searchsorted(window, np.arange(windows + 1))
    source, document, begin, size = (values[: offsets[-1]] for values in (source, document, begin, size))
    reports = [one.report(int(size[source == i].sum()), int((source == i).sum())) for i, one in enumerate(sources)]
    return WindowPlan(length, source, document, begin, size, offsets, reports, sum(one.truncated for one in sources))


class _Sequence:
    """A source's pieces, epoch after epoch, each in an order of its own."""

    def __init__(self, part: Part, length: int, generator: np.random.Generator, packing: bool) -> None:
        self.part, self._generator = part, generator
        self._start = len(part.store.start)
        if length <= self._start:
            raise HyLoError(f"a window of {length} tokens; expected more than the {self._start} that start every text")
        pieces = cut(part.store.lengths, length - self._start)
        self.truncated = pieces.cut
        # A piece's first token is predicted by nothing, unless something starts it.
        unseen = 0 if self._start else 1
        predicted = part.store.predicted(pieces.begin + unseen, pieces.size - unseen)
        self.unusable_tokens = int(pieces.size[~predicted].sum())
        kept = predicted if packing else predicted & (2 * (pieces.size + self._start) >= length)
        self.document, self.begin, self.size = pieces.document[kept], pieces.begin[kept], pieces.size[kept]
        self.tokens = int(self.total(slice(None)).sum())
        """Of an epoch, with what starts each piece."""
        self._order = np.empty(0, np.int64)
        self._begins = np.empty(0, np.int64)
        self._next, self._before, self._epochs = 0, 0, 0

    def total(self, pieces: Ints | slice) -> Ints:
        """Tokens of pieces, with what starts each."""
        return self.size[pieces] + self._start

    def take(self, until: float) -> Ints:
        """The pieces that begin before the `until`-th token of all epochs, and were not taken before."""
        taken = [np.empty(0, np.int64)]
        while True:
            stop = int(np.searchsorted(self._begins, until - self._before))
            taken.append(self._order[self._next : stop])
            self._next = max(self._next, stop)
            if self._next < len(self._order) or self._epochs * self.tokens >= until:
                return np.concatenate(taken)
            self._before = self._epochs * self.tokens
            self._epochs += 1
            self._order = self._generator.permutation(len(self.size))
            sizes = self.total(self._order)
            self._begins = np.cumsum(sizes) - sizes
            self._next = 0

    def report(self, tokens: int, pieces: int) -> SourceReport:
        store = self.part.store
        used = tokens + pieces * self._start
        return SourceReport(
            source=self.part.name,
            documents=store.documents,
            tokens=store.tokens,
            used_tokens=used,
            epochs=round(used / self.tokens, 4) if self.tokens else 0.0,
            held_out=store.info.held_out,
            unusable=store.info.unusable,
            unusable_tokens=self.unusable_tokens,
        )


def _wanted(sources: Sequence[_Sequence], tokens: int | None) -> list[float]:
    """Tokens to take of each source."""
    if tokens is None:
        return [float(source.tokens) for source in sources]
    weights = [source.tokens if source.part.weight is None else source.part.weight for source in sources]
    for source, weight in zip(sources, weights, strict=True):
        if weight and not source.tokens:
            raise HyLoError(f"{source.part.name} has a weight of {weight:g} and no text that fits; leave it out")
    total = sum(weights)
    if not math.isfinite(tokens * total):
        raise HyLoError(
            f"the weights of the sources add up to {total:g}, too much for {tokens} tokens; choose smaller ones"
        )
    return [tokens * weight / total for weight in weights]


def _pack(
    sources: Sequence[_Sequence], pieces: Sequence[Ints], length: int, packing: bool, generator: np.random.Generator
) -> list[Ints]:
    """Source, document, begin and size of pieces, and the window of each, by which they are sorted, from 0."""
    source = np.repeat(np.arange(len(sources)), [len(chosen) for chosen in pieces])
    columns = [
        np.concatenate([values[chosen] for values, chosen in zip(column, pieces, strict=True)])
        for column in zip(*((one.document, one.begin, one.size) for one in sources), strict=True)
    ]
    total = np.concatenate([one.total(chosen) for one, chosen in zip(sources, pieces, strict=True)])
    window = best_fit(total, length) if packing else np.arange(len(total))
    window = generator.permutation(int(window.max()) + 1)[window] if len(window) else window
    order = np.argsort(window, kind="stable")
    return [values[order] for values in (source, *columns, window)]
