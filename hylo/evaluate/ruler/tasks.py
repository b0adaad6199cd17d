"""RULER's tasks: prompts as in its data/synthetic scripts, sized by a number of units (words, sentences, documents).

A task makes a `Draft` of a given number of units. The same generator state gives the same draft, so that the number
can be searched for (`fit`).
"""

import itertools
import math
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

from hylo.evaluate.data import LocalData, Question, Reading
from hylo.evaluate.ruler.words import DEPTHS, NOISE, Distinct, Essays, all_words, word_lists

Count = Callable[[str], int]


@dataclass(frozen=True)
class Draft:
    """A prompt of some size.

    Attributes:
        input: what is asked.
        prefix: how the answer begins; the model goes on from there.
        wanted: strings that the answer should contain.
        depth: percent of the context that stands before the one needle asked for; None where there is no such needle.
    """

    input: str
    prefix: str
    wanted: list[str]
    depth: float | None = None


class Material:
    """What drafts are made from, read once in each process.

    Args:
        data: where texts come from.
        count: tokens of a string.
    """

    def __init__(self, data: LocalData, count: Count) -> None:
        self.data, self.count = data, count

    @cached_property
    def essays(self) -> Essays:
        return Essays(self.data.essays()[0])

    def reading(self, name: str) -> Reading:
        return self.data.squad() if name == "squad" else self.data.hotpotqa()

    @cached_property
    def tracking_noises(self) -> int:
        """Sentences of noise in the worked example of variable tracking: what fits 500 tokens, as in RULER."""
        for noises in (15, 10):
            example, answer = _tracking_example(random.Random(0), noises)
            if self.count(f"{example} {answer}") + _TRACKING_TOKENS <= 500:
                return noises
        return 5


# Makes a draft of `units` from a generator. `index` is the sample's number, `length` its target in tokens.
Make = Callable[[Material, random.Random, int, int, int], Draft]


@dataclass(frozen=True)
class Task:
    """One of the thirteen.

    Attributes:
        make: see `Make`.
        new_tokens: how many tokens a model may answer with; they count towards the length.
        lowest: units that it takes at least.
        any_answer: whether one of the wanted strings is enough.
        needs: what data: "essays", "squad", "hotpotqa", or None.
    """

    make: Make
    new_tokens: int
    lowest: int = 1
    any_answer: bool = False
    needs: str | None = None


# Needles in a haystack.

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_NEEDLE_TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
_NEEDLE_PREFIX = "The special magic {kind} for {query} mentioned in the provided text are"


def _singular(template: str) -> str:
    """For one answer, as RULER rewrites its templates."""
    return template.replace("Some", "A").replace("are all", "is").replace("are", "is")


@dataclass(frozen=True)
class Needles:
    """`keys` of `values` each, of which `queries` are asked for, in a haystack of "essay", "noise" or "needles"."""

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def __call__(self, material: Material, rng: random.Random, units: int, length: int, index: int) -> Draft:
        new_key, new_value = Distinct(self.key_kind, rng), Distinct(self.value_kind, rng)
        hidden = [(new_key(), [new_value() for _ in range(self.values)]) for _ in range(self.keys)]
        asked = rng.sample(hidden, self.queries)
        needles = [(key, self._sentence(key, value)) for key, values in hidden for value in values]
        rng.shuffle(needles)
        depths = sorted(rng.sample(DEPTHS, len(needles)))
        if len(needles) == 1:
            # Each depth in turn, so that any number of samples covers all depths evenly.
            depths = [_depths_in_turn(length)[index % len(DEPTHS)]]
        if self.haystack == "essay":
            context = self._in_essay(material.essays, units, depths, [sentence for _, sentence in needles])
        else:
            context = self._in_lines(rng, units, depths, [sentence for _, sentence in needles], new_key, new_value)
        queries = [key for key, _ in asked]
        query = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
        one = self.queries * self.values == 1
        kind = self.value_kind.removesuffix("s") if one else self.value_kind
        template, prefix = (
            (_singular(_NEEDLE_TEMPLATE), _singular(_NEEDLE_PREFIX))
            if one
            else (
                _NEEDLE_TEMPLATE,
                _NEEDLE_PREFIX,
            )
        )
        place = [key for key, _ in needles].index(queries[0])
        return Draft(
            template.format(kind=kind, context=context, query=query),
            prefix.format(kind=kind, query=query),
            [value for _, values in asked for value in values],
            float(depths[place]) if one else None,
        )

    def _sentence(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _in_essay(self, essays: Essays, units: int, depths: list[int], needles: list[str]) -> str:
        """Needles between sentences; `units` are words."""
        words, ends = essays.first(units)
        parts, done = [], 0
        for depth, needle in zip(depths, needles, strict=True):
            sentences = int(len(ends) * depth / 100)
            end = ends[sentences - 1] if sentences else 0
            parts += [*words[done:end], needle]
            done = end
        return " ".join([*parts, *words[done:]])

    def _in_lines(
        self, rng: random.Random, units: int, depths: list[int], needles: list[str], key: Distinct, value: Distinct
    ) -> str:
        """Needles between lines, of noise or of other needles; `units` are lines."""
        noise = self.haystack == "noise"
        lines = [NOISE if noise else self._sentence(key(), value()) for _ in range(units)]
        for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
            lines.insert(round(units * depth / 100), needle)
        return "\n".join(lines)


def _depths_in_turn(length: int) -> list[int]:
    depths = list(DEPTHS)
    random.Random(length).shuffle(depths)
    return depths


# Variable tracking.

_TRACKING_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
# The spelling is RULER's.
_TRACKING_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assgined the value {query}, they are:"
)
_TRACKING_TOKENS = 30
_HOPS = 4


def _tracking(rng: random.Random, noises: int, letters: int) -> tuple[str, str, list[str]]:
    """What is asked, how the answer begins, and the variables of the chain."""
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10000, 99998))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {after} = VAR {before} " for before, after in itertools.pairwise(names)]
    sentences = [NOISE + "\n"] * noises
    for j, place in enumerate(sorted(rng.sample(range(len(sentences)), len(chain)))):
        sentences.insert(place + j, chain[j])
    context = " ".join(sentences).replace(". \n", ".\n")
    return (
        _TRACKING_TEMPLATE.format(context=context, query=value),
        _TRACKING_PREFIX.format(count=len(names), query=value),
        names,
    )


def _tracking_example(rng: random.Random, noises: int) -> tuple[str, str]:
    """A worked example, of shorter names than the question has, and its answer."""
    question, prefix, names = _tracking(rng, noises, letters=3)
    return f"{question} {prefix} ", " ".join(names)


def _variable_tracking(material: Material, rng: random.Random, units: int, length: int, index: int) -> Draft:
    """One chain of five variables in `units` sentences of noise, after one worked example."""
    example, answer = _tracking_example(rng, material.tracking_noises)
    question, prefix, names = _tracking(rng, units, letters=5)
    return Draft(f"{example} {answer}\n\n\n\n{question}", prefix, names)


# Common and frequent words.

_COMMON_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
_COMMON_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_COMMON = 10


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _common_list(rng: random.Random, units: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """A list of `units` distinct words, ten of which stand `often` times in it and the others `seldom`."""
    known = all_words()
    words = rng.sample(known, min(units, len(known)))
    if units > len(words):
        # RULER turns to a longer list of words here, which no package has.
        kinds, taken = word_lists(), set(words)
        while len(words) < units:
            pair = f"{rng.choice(kinds['adjective']).rstrip()}-{rng.choice(kinds['noun']).rstrip()}"
            if pair not in taken:
                taken.add(pair)
                words.append(pair)
    listed = words[:_COMMON] * often + words[_COMMON:] * seldom
    rng.shuffle(listed)
    return _COMMON_TEMPLATE.format(context=_numbered(listed)), words[:_COMMON]


def _common_words(material: Material, rng: random.Random, units: int, length: int, index: int) -> Draft:
    """One worked example, then a list of `units` words; below 4,096 tokens with fewer repetitions, as in RULER."""
    short = length < 4096
    example, answer = _common_list(rng, *((20, 3, 1) if short else (40, 10, 3)))
    question, common = _common_list(rng, units, *((6, 1) if short else (30, 3)))
    # Without a space before the worked answer, as in RULER.
    return Draft(f"{example} {_COMMON_PREFIX}{_numbered(answer)}\n{question}", _COMMON_PREFIX, common)


_FREQUENT_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FREQUENT_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
_ZETA_2 = math.pi**2 / 6


def _frequent_words(material: Material, rng: random.Random, units: int, length: int, index: int) -> Draft:
    """About `units` words, the k-th most frequent in k^-2 of the places; the first is dots, which are noise."""
    letters = string.ascii_lowercase
    words: dict[str, None] = {"...": None}
    while len(words) < max(length // 50, 5):
        words["".join(rng.choices(letters, k=6))] = None
    vocabulary = list(words)
    counts = [int(units / rank**2 / _ZETA_2) for rank in range(1, len(vocabulary) + 1)]
    text = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
    rng.shuffle(text)
    return Draft(_FREQUENT_TEMPLATE.format(context=" ".join(text)), _FREQUENT_PREFIX, vocabulary[1:4])


# Question answering.

_READING_ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
_READING_TEMPLATE = (
    f"{_READING_ASK}\n\nThe following are given documents.\n\n{{context}}\n\n{_READING_ASK}\n\nQuestion: {{query}}"
)


@dataclass(frozen=True)
class QuestionAnswering:
    """A question over `units` documents beyond those that hold the answer: first of the same article, then any."""

    name: str

    def __call__(self, material: Material, rng: random.Random, units: int, length: int, index: int) -> Draft:
        reading, question = material.reading(self.name), self._question(material, index)
        known = {*question.paragraphs, *question.related}
        others = [i for i in range(len(reading.paragraphs)) if i not in known]
        rng.shuffle(others)
        related = rng.sample(question.related, len(question.related))
        more = [*related, *others]
        turns = -(-units // len(more)) if units else 1
        chosen = [*question.paragraphs, *(more * turns)[:units]]
        rng.shuffle(chosen)
        documents = [f"Document {i}:\n{reading.paragraphs[number]}" for i, number in enumerate(chosen, 1)]
        context = "\n\n".join(documents)
        return Draft(_READING_TEMPLATE.format(context=context, query=question.text), "Answer:", question.answers)

    def _question(self, material: Material, index: int) -> Question:
        # The same questions at every length.
        questions = material.reading(self.name).questions
        return questions[_shuffled(self.name, len(questions))[index % len(questions)]]

    def needed(self, material: Material, index: int) -> str:
        """What every draft of that number holds."""
        paragraphs = material.reading(self.name).paragraphs
        return "\n\n".join(paragraphs[number] for number in self._question(material, index).paragraphs)


@cache
def _shuffled(seed: str, count: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


TASKS: dict[str, Task] = {
    "niah_single_1": Task(Needles("noise"), 128),
    "niah_single_2": Task(Needles("essay"), 128, needs="essays"),
    "niah_single_3": Task(Needles("essay", value_kind="uuids"), 128, needs="essays"),
    "niah_multikey_1": Task(Needles("essay", keys=4), 128, needs="essays"),
    "niah_multikey_2": Task(Needles("needles"), 128),
    "niah_multikey_3": Task(Needles("needles", key_kind="uuids", value_kind="uuids"), 128),
    "niah_multivalue": Task(Needles("essay", values=4), 128, needs="essays"),
    "niah_multiquery": Task(Needles("essay", keys=4, queries=4), 128, needs="essays"),
    "vt": Task(_variable_tracking, _TRACKING_TOKENS, lowest=_HOPS + 2),
    "cwe": Task(_common_words, 120, lowest=_COMMON + 1),
    # From here on the third and the fourth word differ in number.
    "fwe": Task(_frequent_words, 50, lowest=60),
    "qa_squad": Task(QuestionAnswering("squad"), 32, lowest=0, any_answer=True, needs="squad"),
    "qa_hotpotqa": Task(QuestionAnswering("hotpotqa"), 32, lowest=0, any_answer=True, needs="hotpotqa"),
}
