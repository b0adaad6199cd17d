"""Documents held out for evaluation, and what they share with training text taken out of that.

Documents are held out whole, by a hash of their name. A paragraph of a training text that shares 13 words in a row with
them is taken out of it; a chat that does is left out whole. Held-out documents are kept in memory; training documents
are judged one at a time.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from hylo.data.documents import Document, text_digest, unit_hash
from hylo.data.sources import OpenSource
from hylo.errors import HyLoError

# Contamination is told by runs of this many words, as in GPT-3 (arXiv 2005.14165, appendix C).
_RUN_WORDS = 13
_WORD = re.compile(r"\w+")
# Multiplier of the hash of a run: odd, and without pattern.
_MIX = np.uint64(0x9E3779B97F4A7C15)
# Held-out text beyond what evaluation wants costs memory and time only.
_LEAST_CHARACTERS = 4_000_000
_CHARACTERS_A_TOKEN = 8


class HeldOut:
    """What is held out, and a judge of training documents.

    Args:
        documents: for evaluation.
        share: training documents whose name hashes below it are held out as well, though they are not among
            `documents`; 0 where evaluation text is not of the training text.
    """

    def __init__(self, documents: Sequence[Document], share: float = 0.0) -> None:
        self.documents, self.share = list(documents), share
        self._documents = set(documents)
        runs = [_runs(_words(document.text)) for document in documents]
        self._runs = np.unique(np.concatenate([*runs, np.empty(0, np.uint64)]))
        # Most runs are told to be new by one look into a table, before the search.
        self._table = np.zeros(2**22, bool)
        self._table[self._runs >> np.uint64(42)] = True

    def training(self, document: Document) -> Document | None:
        """What of a document may be trained on; None where nothing is."""
        if (self.share and unit_hash(document.name) < self.share) or document in self._documents:
            return None
        if document.messages is not None:
            return None if self._shared(_words(document.text)).size else document
        text = self._without_shared(document.text)
        if text is document.text:
            return document
        return Document(document.name, text) if text.strip() else None

    def digest(self) -> str:
        return hashlib.sha256(f"{self.share}\0{text_digest(self.documents)}".encode()).hexdigest()

    def _shared(self, words: list[str]) -> NDArray[np.intp]:
        """Where runs begin that held-out text has as well."""
        runs = _runs(words)
        maybe = np.flatnonzero(self._table[runs >> np.uint64(42)])
        if not maybe.size:
            return maybe
        found = np.searchsorted(self._runs, runs[maybe]).clip(max=len(self._runs) - 1)
        return maybe[self._runs[found] == runs[maybe]]

    def _without_shared(self, text: str) -> str:
        """The text without the paragraphs that a shared run touches, across paragraph ends as well."""
        shared = self._shared(_words(text))
        if not shared.size:
            return text
        paragraphs = re.split(r"(\n\s*\n)", text)
        owner = np.repeat(np.arange(len(paragraphs)), [len(_words(paragraph)) for paragraph in paragraphs])
        touched = set(owner[np.unique(shared[:, None] + np.arange(_RUN_WORDS))].tolist())
        kept = "".join(paragraph for i, paragraph in enumerate(paragraphs) if i not in touched)
        # What stood on both sides of a removed paragraph may make a run that was none before.
        return self._without_shared(kept)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str]) -> NDArray[np.uint64]:
    """A hash of each run of words, `[words - 12]`: a polynomial in the hashes of the words, modulo 2^64."""
    count = len(words) - _RUN_WORDS + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    runs = np.zeros(count, np.uint64)
    for at in range(_RUN_WORDS):
        runs = runs * _MIX + hashes[at : at + count]
    return runs


def held_out_of(sources: Iterable[OpenSource], share: float, tokens: int) -> HeldOut:
    """Holds out the documents whose name hashes below `share`, at least one. Sources of tokens are passed over.

    Of each source no more is read than gives text for `tokens` tokens, and 4 million characters: of a large one, its
    beginning. Documents further on are not trained on either if their names hash below.

    Raises HyLoError where a source cannot be read or holds no text.
    """
    found: list[Document] = []
    nearest: Document | None = None
    for source in sources:
        if source.tokens is not None:
            continue
        left = room(tokens)
        for document in _some(source):
            if unit_hash(document.name) < share:
                found.append(document)
                left -= len(document.text)
            elif not found and (nearest is None or unit_hash(document.name) < unit_hash(nearest.name)):
                nearest = document
            if left <= 0:
                break
    if not found and nearest is not None:
        found = [nearest]
    if not found:
        raise HyLoError("tokens: sources hold no text to evaluate on; give some with eval:")
    return HeldOut(found, share)


def evaluation_of(sources: Iterable[OpenSource], tokens: int) -> HeldOut:
    """Evaluation text from sources of its own, of each as much as `held_out_of` takes at most.

    Raises HyLoError where a source cannot be read or holds no text.
    """
    found: list[Document] = []
    for source in sources:
        left = room(tokens)
        for document in _some(source):
            found.append(document)
            left -= len(document.text)
            if left <= 0:
                break
    return HeldOut(found)


def room(tokens: int) -> int:
    """Characters that are held out of a source at most, to evaluate on so many tokens."""
    return max(_LEAST_CHARACTERS, _CHARACTERS_A_TOKEN * tokens)


def _some(source: OpenSource) -> Iterator[Document]:
    """Raises HyLoError where there is none."""
    documents = source.documents()
    first = next(documents, None)
    if first is None:
        raise HyLoError(f"no text in {source.name}")
    return itertools.chain([first], documents)


def hold_out(documents: Sequence[Document], share: float) -> list[Document]:
    """The documents to evaluate on: those whose name hashes below `share`, at least one."""
    held_out = [document for document in documents if unit_hash(document.name) < share]
    return held_out or [min(documents, key=lambda document: unit_hash(document.name))]


def without_overlap(documents: Sequence[Document], held_out: Sequence[Document]) -> list[Document]:
    """The documents to train on: those not held out, without what shares 13 words in a row with them.

    Raises HyLoError where nothing is left.
    """
    judge = HeldOut(held_out)
    training = [kept for document in documents if (kept := judge.training(document)) is not None]
    if not training:
        raise HyLoError("no text is left to train on once the evaluation text is held out; give more than one document")
    return training
