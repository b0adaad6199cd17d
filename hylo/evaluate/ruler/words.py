"""What RULER's prompts are made of: words, needles, noise."""

import importlib.util
import random
import re
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path

from hylo.errors import HyLoError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# Percent of the context before a needle.
DEPTHS = tuple(round(100 * i / 39) for i in range(40))
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")


@cache
def word_lists() -> dict[str, list[str]]:
    """The nouns, adjectives and verbs of wonderwords, as RULER uses them. Raises HyLoError where it is missing."""
    found = importlib.util.find_spec("wonderwords")
    if found is None or not found.submodule_search_locations:
        raise HyLoError("RULER needs wonderwords; install it with: pip install 'hylo[eval]'")
    folder = Path(found.submodule_search_locations[0]) / "assets"
    return {
        kind: [line for line in (folder / f"{kind}list.txt").read_text().splitlines() if line.strip()]
        for kind in ("noun", "adjective", "verb")
    }


@cache
def all_words() -> list[str]:
    """Every word once, in an order of their own."""
    return sorted({word.rstrip() for words in word_lists().values() for word in words})


def _number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _word(rng: random.Random) -> str:
    words = word_lists()
    return f"{rng.choice(words['adjective']).rstrip()}-{rng.choice(words['noun']).rstrip()}"


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_KINDS: dict[str, Callable[[random.Random], str]] = {"numbers": _number, "words": _word, "uuids": _uuid}


class Distinct:
    """Draws of one kind (numbers, words, uuids), none of them twice."""

    def __init__(self, kind: str, rng: random.Random) -> None:
        self._draw, self._rng, self._seen = _KINDS[kind], rng, set[str]()

    def __call__(self) -> str:
        while (value := self._draw(self._rng)) in self._seen:
            pass
        self._seen.add(value)
        return value


class Essays:
    """A text as words, any number of them, and where its sentences end.

    Where more words are asked for than the text has, it begins again.
    """

    def __init__(self, text: str) -> None:
        self.words = text.split(" ")
        self._ends = [i + 1 for i, word in enumerate(self.words) if _SENTENCE_END.search(word)]

    def first(self, count: int) -> tuple[list[str], list[int]]:
        """The first `count` words, and the number of words before the end of each of their sentences; the last sentence
        may be cut off."""
        turns = -(-count // len(self.words)) if count else 1
        words = (self.words * turns)[:count]
        ends = [turn * len(self.words) + end for turn in range(turns) for end in self._ends]
        ends = [end for end in ends if end < count]
        return words, [*ends, count]
