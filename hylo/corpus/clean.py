"""What of a document goes into the corpus: duplicates, lists, foreign text and what is evaluated on are taken out."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from hylo.corpus.extract import Draft
from hylo.corpus.overlap import Passage, RunIndex, SeenRuns
from hylo.corpus.spec import Group

# A page of which so much stands in earlier text is a copy; a paragraph, of which so much does.
_COPIED_PAGE = 0.6
_COPIED_PARAGRAPH = 0.8
# Shorter pages say nothing by themselves.
_LEAST_CHARACTERS = 300
# English prose has these in every third place or so; lists of names, tables and other languages have few.
_COMMON_WORDS = frozenset(
    # ruff: noqa: SIM905
    "the of and to in a is that for it as be with on are this by or not an if from which you can at have was will "
    "all when one has but they other there no use any we he his i she her him had were so what their".split()
)
_LEAST_COMMON: dict[Group, float] = {"prose": 0.15, "manuals": 0.12, "api": 0.08, "code": 0.0}
_LEAST_LETTERS = 0.6
_TELLING_CHARACTERS = 5000
Reason = Literal["short", "not English prose", "copied pages", "copied paragraphs", "in evaluation text"]


@dataclass
class Losses:
    """What was taken out of a source.

    Attributes:
        characters: by reason.
        documents: of which nothing was left.
        runs: of evaluation text that were found, by set.
    """

    characters: Counter[str] = field(default_factory=Counter)
    documents: int = 0
    runs: Counter[str] = field(default_factory=Counter)

    def lose(self, reason: Reason, characters: int) -> None:
        if characters:
            self.characters[reason] += characters


class Cleaner:
    """Judges documents one after another; of two copies, the one that came first is kept.

    Args:
        evaluation: what no text of the corpus may share.
        seen: what came before; empty at the beginning.
    """

    def __init__(self, evaluation: RunIndex, seen: SeenRuns) -> None:
        self.evaluation, self.seen = evaluation, seen

    def clean(self, draft: Draft, group: Group, losses: Losses) -> str | None:
        """The document's text; None where nothing is left of it. Adds what was taken out to `losses`."""
        kept = [text for part in draft.parts if (text := self._page(part, group, losses)) is not None]
        if not kept:
            losses.documents += 1
            return None
        text = "\n\n".join(kept)
        # The end of a page and the beginning of the next may make a run that neither has.
        return text if len(kept) == 1 else self._without_evaluation(Passage(text), losses)

    def _page(self, text: str, group: Group, losses: Losses) -> str | None:
        if len(text) < _LEAST_CHARACTERS:
            losses.lose("short", len(text))
            return None
        passage = Passage(text)
        if not is_prose(passage, group):
            losses.lose("not English prose", len(text))
            return None
        known = self.seen.known(passage.runs)
        self.seen.add(passage.runs)
        if known.size and known.mean() > _COPIED_PAGE:
            losses.lose("copied pages", len(text))
            return None
        if group != "code":
            # A program is whole or no program.
            shorter = passage.without(known, _COPIED_PARAGRAPH)
            losses.lose("copied paragraphs", len(text) - len(shorter))
            passage = passage if shorter == text else Passage(shorter)
        clean = self._without_evaluation(passage, losses)
        if len(clean) < _LEAST_CHARACTERS:
            losses.lose("short", len(clean))
            return None
        return clean

    def _without_evaluation(self, passage: Passage, losses: Losses) -> str:
        clean, runs = self.evaluation.clean(passage)
        losses.runs.update(runs)
        losses.lose("in evaluation text", len(passage.text) - len(clean))
        return clean


def is_prose(passage: Passage, group: Group) -> bool:
    """Whether a page reads as text of its group should: by its letters, and its common English words."""
    if group == "code":
        return True
    if not passage.words:
        return False
    # The beginning of a long page tells.
    solid = re.sub(r"\s+", "", passage.text[:_TELLING_CHARACTERS])
    letters = sum(map(str.isalpha, solid)) / max(1, len(solid))
    words = passage.words[:_TELLING_CHARACTERS]
    common = sum(map(_COMMON_WORDS.__contains__, words)) / len(words)
    return letters >= _LEAST_LETTERS and common >= _LEAST_COMMON[group]
