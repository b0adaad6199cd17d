"""Synthetic exercises: things to find, copy, count and follow in a long text. `TASKS` names them.

Each makes its facts, hides them in distractor paragraphs, and asks several questions, whose answers follow from the
text alone. None uses a prompt of RULER.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hylo.corpus import words
from hylo.corpus.words import distinct, scattered


class Question(NamedTuple):
    """What is asked, what is answered, and the same in a whole sentence, where there is one.

    The sentence goes on from the question's own words to the answer: a model must know when to stop repeating.
    """

    question: str
    answer: str
    sentence: str = ""

    def said(self, sentences: bool) -> str:
        """The answer, as a sentence where that is asked for and there is one."""
        return self.sentence if sentences and self.sentence else self.answer


@dataclass(frozen=True)
class Exercise:
    """A text, questions on it, and their answers."""

    task: str
    text: str
    questions: list[Question]


# So many characters of distractor paragraphs.
Paragraphs = Callable[[random.Random, int], list[str]]
# A text, and what is asked: questions and answers, and sentences where there are such.
Asked = Sequence[tuple[str, str] | tuple[str, str, str]]
Make = Callable[[random.Random, Paragraphs, int], tuple[str, Asked]]


def _facts_in(rng: random.Random, characters: int, each: int, most: int = 400) -> int:
    """How many facts of so many characters a text holds: anything from a few to half of it."""
    fullest = max(6, min(most, characters // (2 * each)))
    return round(6 * (fullest / 6) ** rng.random())


def _hidden(rng: random.Random, paragraphs: Paragraphs, characters: int, facts: list[str]) -> str:
    return scattered(rng, paragraphs(rng, max(0, characters - sum(map(len, facts)) - 2 * len(facts))), facts)


def _asked(rng: random.Random, items: list[str], most: int = 12) -> list[str]:
    return rng.sample(items, min(len(items), rng.randint(4, most)))


def _deliveries(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, Asked]:
    """Keys and values in sentences."""
    people = distinct(rng, words.person, _facts_in(rng, characters, 60))
    bays = dict(zip(people, distinct(rng, words.code, len(people)), strict=True))
    facts = [f"The parcel addressed to {who} is waiting in bay {bay}." for who, bay in bays.items()]
    asked = [
        (
            f"In which bay is the parcel addressed to {who}?",
            f"Bay {bays[who]}.",
            f"The parcel addressed to {who} is waiting in bay {bays[who]}.",
        )
        for who in _asked(rng, people)
    ]
    return _hidden(rng, paragraphs, characters, facts), asked


def _settings(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, list[tuple[str, str]]]:
    """Keys and values as lines of a configuration, which stands in one piece between paragraphs."""
    keys = distinct(rng, words.setting, _facts_in(rng, characters, 40))
    values = {key: str(rng.randint(1, 10 ** rng.randint(1, 8))) for key in keys}
    block = "\n".join(f"{key} = {value}" for key, value in values.items())
    text = _hidden(rng, paragraphs, characters, [f"```ini\n{block}\n```"])
    return text, [(f"To what is `{key}` set in the configuration?", values[key]) for key in _asked(rng, keys)]


def _register(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, list[tuple[str, str]]]:
    """Rows and columns of a table."""
    people = distinct(rng, words.person, _facts_in(rng, characters, 70))
    rows = {
        who: {"town": rng.choice(words.TOWNS), "badge": words.code(rng), "tool": words.thing(rng)} for who in people
    }
    lines = [f"| {who} | {row['town']} | {row['badge']} | {row['tool']} |" for who, row in rows.items()]
    table = "\n".join(["| name | town | badge | tool |", "| --- | --- | --- | --- |", *lines])
    columns = [(who, rng.choice(("town", "badge", "tool"))) for who in _asked(rng, people)]
    asked = [(f"What does the table give as the {column} of {who}?", rows[who][column]) for who, column in columns]
    return _hidden(rng, paragraphs, characters, [table]), asked


def _entry(rng: random.Random) -> dict[str, str]:
    return {"town": rng.choice(words.TOWNS), "badge": words.code(rng), "tool": words.thing(rng)}


def _prices(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, list[tuple[str, str]]]:
    """Values that later ones replace."""
    count = _facts_in(rng, characters, 60)
    things = distinct(rng, words.thing, max(2, count // 3))
    events = [(thing, rng.randint(2, 999)) for thing in [*things, *rng.choices(things, k=count - len(things))]]
    rng.shuffle(events)
    last: dict[str, int] = dict(events)
    facts = [f"From that day on the {thing} was sold for {price} crowns." for thing, price in events]
    asked = [
        (f"For how much was the {thing} sold in the end?", f"{last[thing]} crowns.") for thing in _asked(rng, things)
    ]
    return _hidden(rng, paragraphs, characters, facts), asked


def _sums(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, list[tuple[str, str]]]:
    """Two values to find and add."""
    things = distinct(rng, words.thing, _facts_in(rng, characters, 60))
    weights = {thing: rng.randint(3, 400) for thing in things}
    facts = [f"On the scales the {thing} weighed {weight} grams." for thing, weight in weights.items()]
    asked = []
    for _ in range(rng.randint(4, 10)):
        one, other = rng.sample(things, 2)
        working = f"{weights[one]} + {weights[other]} = {weights[one] + weights[other]}"
        asked.append((f"What do the {one} and the {other} weigh together, in grams?", working))
    return _hidden(rng, paragraphs, characters, facts), asked


def _program(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, list[tuple[str, str]]]:
    """Variables that take their value from others, and are set again."""
    count = _facts_in(rng, characters, 40)
    names = distinct(rng, words.variable, max(3, count // 2))
    values: dict[str, int] = {}
    lines: list[str] = []
    for turn in range(count):
        name = names[turn] if turn < len(names) else rng.choice(names)
        if values and rng.random() < 0.6:
            source = rng.choice(list(values))
            step = rng.choice((0, 0, 1, 2, 10))
            values[name] = values[source] + step
            lines.append(f"{name} = {source} + {step}" if step else f"{name} = {source}")
        else:
            values[name] = rng.randint(0, 9999)
            lines.append(f"{name} = {values[name]}")
    facts = [f"```python\n{line}\n```" for line in lines]
    asked = [
        (f"After all of this code has run in order, what does print({name}) show?", str(values[name]))
        for name in _asked(rng, names)
    ]
    return _hidden(rng, paragraphs, characters, facts), asked


def _handovers(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, list[tuple[str, str]]]:
    """Things that go from hand to hand."""
    count = _facts_in(rng, characters, 60)
    people = distinct(rng, words.person, max(4, min(40, count)))
    things = distinct(rng, words.thing, max(2, count // 4))
    holders: dict[str, list[str]] = {thing: [rng.choice(people)] for thing in things}
    facts = [f"{holders[thing][0]} brought along a {thing}." for thing in things]
    for _ in range(count - len(things)):
        thing = rng.choice(things)
        taker = rng.choice([who for who in people if who != holders[thing][-1]])
        facts.append(f"{holders[thing][-1]} handed the {thing} over to {taker}.")
        holders[thing].append(taker)
    asked = []
    for thing in _asked(rng, things):
        if len(holders[thing]) > 1 and rng.random() < 0.4:
            asked.append((f"Who had the {thing} just before the one who has it now?", f"{holders[thing][-2]}."))
        else:
            asked.append((f"Who ended up with the {thing}?", f"{holders[thing][-1]}."))
    return _hidden(rng, paragraphs, characters, facts), asked


def _employers(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, list[tuple[str, str]]]:
    """Two and three steps from what is asked to the answer, in any order in the text."""
    count = _facts_in(rng, characters, 60)
    firms = distinct(rng, words.firm, max(2, count // 3))
    towns = {firm: rng.choice(words.TOWNS) for firm in firms}
    people = distinct(rng, words.person, max(3, count - len(firms)))
    works = {who: rng.choice(firms) for who in people}
    mayors = dict(zip(words.TOWNS, distinct(rng, words.thing, len(words.TOWNS)), strict=True))
    facts = [f"{who} earns a living at the {firm}." for who, firm in works.items()]
    facts += [f"The {firm} has its gates in {town}." for firm, town in towns.items()]
    facts += [f"On the coat of arms of {town} one sees a {mayors[town]}." for town in dict.fromkeys(towns.values())]
    rng.shuffle(facts)
    asked = []
    for who in _asked(rng, people):
        town = towns[works[who]]
        if rng.random() < 0.5:
            asked.append((f"In which town does {who} work?", f"At the {works[who]}, in {town}."))
        else:
            answer = f"At the {works[who]}, in {town}: a {mayors[town]}."
            asked.append((f"What is on the coat of arms of the town where {who} works?", answer))
    return _hidden(rng, paragraphs, characters, facts), asked


def _vans(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, list[tuple[str, str]]]:
    """Events to count, of several kinds."""
    colours = rng.sample(words.COLOURS, rng.randint(2, 6))
    counts = {colour: rng.randint(0, 12) for colour in colours}
    events = [colour for colour, count in counts.items() for _ in range(count)]
    rng.shuffle(events)
    facts = [f"Just then a {colour} van rolled past the window." for colour in events]
    asked = [(f"How many {colour} vans rolled past the window?", str(counts[colour])) for colour in colours]
    asked.append(("How many vans rolled past the window altogether?", str(len(events))))
    return _hidden(rng, paragraphs, characters, facts), asked


def _votes(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, list[tuple[str, str]]]:
    """What is there more often than the rest."""
    towns = rng.sample(words.TOWNS, rng.randint(3, 6))
    most = rng.randint(4, 16)
    counts = {town: most if town == towns[0] else rng.randint(1, most - 1) for town in towns}
    votes = [town for town, count in counts.items() for _ in range(count)]
    rng.shuffle(votes)
    voters = distinct(rng, words.person, len(votes))
    facts = [f"{who} raised a hand for {town}." for who, town in zip(voters, votes, strict=True)]
    told = Counter(votes)
    asked = [("Which town won the vote, and with how many hands?", f"{towns[0]}, with {told[towns[0]]} hands.")]
    sample = rng.sample(list(zip(voters, votes, strict=True)), min(4, len(votes)))
    asked += [(f"For which town did {who} raise a hand?", f"{town}.") for who, town in sample]
    return _hidden(rng, paragraphs, characters, facts), asked


def _order(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, list[tuple[str, str]]]:
    """What comes before and after."""
    things = distinct(rng, words.thing, _facts_in(rng, characters, 50))
    facts = [f"The next lot at the auction was a {thing}." for thing in things]
    asked = [
        ("Which lot of the auction came first?", f"The {things[0]}."),
        ("Which lot of the auction came last?", f"The {things[-1]}."),
    ]
    for at in rng.sample(range(len(things) - 1), min(6, len(things) - 1)):
        if rng.random() < 0.5:
            asked.append((f"Which lot followed directly on the {things[at]}?", f"The {things[at + 1]}."))
        else:
            asked.append((f"Which lot came directly before the {things[at + 1]}?", f"The {things[at]}."))
    return _hidden(rng, paragraphs, characters, facts), asked


def _copying(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, list[tuple[str, str]]]:
    """Numbered paragraphs, some of them to be written out."""
    texts = paragraphs(rng, characters)
    text = "\n\n".join(f"§{number} {paragraph}" for number, paragraph in enumerate(texts, 1))
    short = [number for number, paragraph in enumerate(texts, 1) if len(paragraph) <= 700 and "§" not in paragraph]
    chosen = rng.sample(short, min(len(short), rng.randint(2, 5)))
    return text, [(f"Write out §{number} word for word.", texts[number - 1]) for number in chosen]


def _continuing(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, list[tuple[str, str]]]:
    """A paragraph to be gone on with from its beginning."""
    texts = paragraphs(rng, characters)
    text = "\n\n".join(texts)
    asked = []
    for paragraph in rng.sample(texts, len(texts)):
        parts = paragraph.split(" ")
        begin, rest = " ".join(parts[:8]), " ".join(parts[8:60])
        if len(parts) >= 16 and "\n" not in begin + rest and '"' not in begin and text.count(begin) == 1:
            asked.append((f'How does the passage go on that begins "{begin}"?', rest))
        if len(asked) == 4:
            break
    return text, asked


def _places(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, list[tuple[str, str]]]:
    """In which section something stands."""
    texts = paragraphs(rng, characters)
    size = max(1, len(texts) // rng.randint(3, 30))
    sections = [texts[at : at + size] for at in range(0, len(texts), size)]
    titles = distinct(rng, words.thing, len(sections))
    text = "\n\n".join(f"## The {title}\n\n" + "\n\n".join(part) for title, part in zip(titles, sections, strict=True))
    asked = []
    for at in rng.choices(range(len(sections)), k=12 if sections else 0):
        parts = rng.choice(sections[at]).split(" ")
        start = rng.randrange(max(1, len(parts) - 10))
        quote = " ".join(parts[start : start + 10])
        if len(parts) >= 10 and "\n" not in quote and '"' not in quote and text.count(quote) == 1:
            asked.append((f'Under which heading does one read "{quote}"?', f"The {titles[at]}"))
    return text, list(dict.fromkeys(asked))[:8]


# Of tickets and lockers: all of a text are of one kind.
_VALUES = (words.number, words.number, words.serial)


def _listed(rng: random.Random, items: list[str]) -> str:
    """What ends a sentence that lists, after its verb."""
    form = rng.randrange(4)
    if form == 0:
        return f" {_joined(items)}."
    if form == 1:
        return f": {', '.join(items)}."
    marks = [f"{number}." for number in range(1, len(items) + 1)] if form == 2 else ["-"] * len(items)
    return ":\n" + "\n".join(f"{mark} {item}" for mark, item in zip(marks, items, strict=True))


def _joined(items: list[str]) -> str:
    return " and ".join(part for part in (", ".join(items[:-1]), items[-1]) if part)


def _serials(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, Asked]:
    """Keys and long values, of which each sign is to be copied."""
    things = distinct(rng, words.thing, _facts_in(rng, characters, 100, most=200))
    serials = dict(zip(things, distinct(rng, words.serial, len(things)), strict=True))
    facts = [f"Stamped into the {thing} one reads {serial}." for thing, serial in serials.items()]
    asked = [
        (
            f"What does one read stamped into the {thing}?",
            serials[thing],
            f"Stamped into the {thing}{rng.choice((' is', ' one reads', ':'))} {serials[thing]}.",
        )
        for thing in _asked(rng, things, 8)
    ]
    return _hidden(rng, paragraphs, characters, facts), asked


def _tickets(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, Asked]:
    """Several values of a key, all of which are asked for, in the order of the text."""
    people = distinct(rng, words.person, max(3, _facts_in(rng, characters, 60, most=240) // 3))
    sizes = [rng.randint(1, 5) for _ in people]
    tickets = distinct(rng, rng.choice(_VALUES), sum(sizes))
    draws = [who for who, size in zip(people, sizes, strict=True) for _ in range(size)]
    rng.shuffle(draws)
    drawn: dict[str, list[str]] = {who: [] for who in people}
    for who, ticket in zip(draws, tickets, strict=True):
        drawn[who].append(ticket)
    facts = [f"{who} drew ticket {ticket}." for who, ticket in zip(draws, tickets, strict=True)]
    asked = []
    for who in _asked(rng, people, 6):
        sentence = f"The tickets drawn by {who} are" if len(drawn[who]) > 1 else f"The only ticket drawn by {who} is"
        asked.append((f"Which tickets did {who} draw?", _joined(drawn[who]), sentence + _listed(rng, drawn[who])))
    return _hidden(rng, paragraphs, characters, facts), asked


def _lockers(rng: random.Random, paragraphs: Paragraphs, characters: int) -> tuple[str, Asked]:
    """Values of several keys at once, in the order of the question."""
    people = distinct(rng, words.person, _facts_in(rng, characters, 60))
    lockers = dict(zip(people, distinct(rng, rng.choice(_VALUES), len(people)), strict=True))
    facts = [f"{who} keeps the key to locker {locker}." for who, locker in lockers.items()]
    asked = []
    for _ in range(rng.randint(3, 6)):
        chosen = rng.sample(people, rng.randint(1, min(5, len(people))))
        values = [lockers[who] for who in chosen]
        if len(chosen) > 1:
            question, begin = (
                f"To which lockers do {_joined(chosen)} keep the keys?",
                f"The lockers of {_joined(chosen)} are",
            )
        else:
            question, begin = f"To which locker does {chosen[0]} keep the key?", f"The locker of {chosen[0]} is"
        asked.append((question, _joined(values), begin + _listed(rng, values)))
    return _hidden(rng, paragraphs, characters, facts), asked


TASKS: dict[str, Make] = {
    "deliveries": _deliveries,
    "settings": _settings,
    "register": _register,
    "prices": _prices,
    "sums": _sums,
    "program": _program,
    "handovers": _handovers,
    "employers": _employers,
    "vans": _vans,
    "votes": _votes,
    "order": _order,
    "copying": _copying,
    "continuing": _continuing,
    "places": _places,
    "serials": _serials,
    "tickets": _tickets,
    "lockers": _lockers,
}


def make_exercise(task: str, rng: random.Random, paragraphs: Paragraphs, characters: int) -> Exercise:
    """An exercise of about so many characters. It may have no question where the paragraphs allow none."""
    text, questions = TASKS[task](rng, paragraphs, characters)
    return Exercise(task, text, [Question(*asked) for asked in questions])
