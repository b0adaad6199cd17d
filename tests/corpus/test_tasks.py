"""Synthetic exercises: each is solved again from its text alone, and none is worded as RULER is."""

import inspect
import random
import re
from collections import Counter
from collections.abc import Callable

import pytest
from tiny import sentences

from hylo.corpus.exercises import Distractors, as_chat, as_text
from hylo.corpus.tasks import TASKS, Exercise, make_exercise
from hylo.evaluate.ruler import tasks as ruler
from hylo.evaluate.ruler.words import NOISE

DISTRACTORS = Distractors([sentences(seed, 60) for seed in range(20)])
Solve = Callable[[str, str], str]


def found(pattern: str, text: str) -> list[tuple[str, ...]]:
    return [match.groups() for match in re.finditer(pattern, text)]


def asked(pattern: str, question: str) -> str:
    match = re.fullmatch(pattern, question)
    assert match is not None, question
    return match[1]


def deliveries(text: str, question: str) -> str:
    who = asked(r"In which bay is the parcel addressed to (.*)\?", question)
    (bay,) = re.findall(rf"parcel addressed to {who} is waiting in bay (\w+)\.", text)
    return f"Bay {bay}."


def settings(text: str, question: str) -> str:
    key = asked(r"To what is `(.*)` set in the configuration\?", question)
    (line,) = [line for line in text.splitlines() if line.startswith(f"{key} = ")]
    return line.split(" = ")[1]


def register(text: str, question: str) -> str:
    column, who = re.fullmatch(r"What does the table give as the (\w+) of (.*)\?", question).groups()  # type: ignore[union-attr]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    (row,) = [row for row in rows if row[0] == who]
    return row[rows[0].index(column)]


def prices(text: str, question: str) -> str:
    thing = asked(r"For how much was the (.*) sold in the end\?", question)
    told = re.findall(rf"the {thing} was sold for (\d+) crowns", text)
    return f"{told[-1]} crowns."


def sums(text: str, question: str) -> str:
    weights = dict(found(r"On the scales the ([a-z ]+) weighed (\d+) grams", text))
    things = re.fullmatch(r"What do the (.*) and the (.*) weigh together, in grams\?", question)
    assert things is not None
    one, other = int(weights[things[1]]), int(weights[things[2]])
    return f"{one} + {other} = {one + other}"


def program(text: str, question: str) -> str:
    name = asked(r"After all of this code has run in order, what does print\((\w+)\) show\?", question)
    values: dict[str, int] = {}
    for line in re.findall(r"```python\n(.*)\n```", text):
        exec(line, {}, values)
    return str(values[name])


def handovers(text: str, question: str) -> str:
    thing = re.search(r"(?:the|with the) ([a-z]+ [a-z]+)(?: just|\?)", question)
    assert thing is not None
    holders = re.findall(rf"([A-Z]\w+ [A-Z]\w+) brought along a {thing[1]}\.", text)
    for giver, taker in found(rf"([A-Z]\w+ [A-Z]\w+) handed the {thing[1]} over to ([A-Z]\w+ [A-Z]\w+)\.", text):
        assert giver == holders[-1]
        holders.append(taker)
    return f"{holders[-2 if 'just before' in question else -1]}."


def employers(text: str, question: str) -> str:
    who = re.search(r"(?:does|where) ([A-Z]\w+ [A-Z]\w+) works?\?", question)
    assert who is not None
    (firm,) = re.findall(rf"{who[1]} earns a living at the ([A-Z]\w+ [A-Z]\w+)\.", text)
    (town,) = re.findall(rf"The {firm} has its gates in (\w+)\.", text)
    if "coat of arms" not in question:
        return f"At the {firm}, in {town}."
    (arms,) = re.findall(rf"On the coat of arms of {town} one sees a ([a-z ]+)\.", text)
    return f"At the {firm}, in {town}: a {arms}."


def vans(text: str, question: str) -> str:
    colours = re.findall(r"Just then a (\w+) van rolled past the window\.", text)
    colour = re.match(r"How many (\w+) vans", question)
    return str(len(colours) if colour is None else colours.count(colour[1]))


def votes(text: str, question: str) -> str:
    hands = dict(found(r"([A-Z]\w+ [A-Z]\w+) raised a hand for (\w+)\.", text))
    if question.startswith("For which"):
        who = asked(r"For which town did (.*) raise a hand\?", question)
        return f"{hands[who]}."
    (first, most), (_, second) = Counter(hands.values()).most_common(2)
    assert most > second
    return f"{first}, with {most} hands."


def order(text: str, question: str) -> str:
    lots = re.findall(r"The next lot at the auction was a ([a-z ]+)\.", text)
    ends = {"Which lot of the auction came first?": 0, "Which lot of the auction came last?": -1}
    if question in ends:
        return f"The {lots[ends[question]]}."
    thing = asked(r".* (?:directly on|directly before) the (.*)\?", question)
    return f"The {lots[lots.index(thing) + (1 if 'followed' in question else -1)]}."


def copying(text: str, question: str) -> str:
    number = asked(r"Write out §(\d+) word for word\.", question)
    after = text.partition(f"§{number} ")[2]
    return after.partition(f"\n\n§{int(number) + 1} ")[0]


def continuing(text: str, question: str) -> str:
    begin = asked(r'How does the passage go on that begins "(.*)"\?', question)
    assert text.count(begin) == 1
    rest = text.partition(begin)[2].partition("\n\n")[0]
    return " ".join(rest.strip().split(" ")[:52])


def places(text: str, question: str) -> str:
    quote = asked(r'Under which heading does one read "(.*)"\?', question)
    before, _, after = text.partition(quote)
    assert quote not in after
    return re.findall(r"^## (.*)$", before, re.MULTILINE)[-1]


def serials(text: str, question: str) -> str:
    thing = asked(r"What does one read stamped into the (.*)\?", question)
    (serial,) = re.findall(rf"Stamped into the {thing} one reads ([\w-]+)\.", text)
    return serial


def joined(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"


def tickets(text: str, question: str) -> str:
    who = asked(r"Which tickets did (.*) draw\?", question)
    return joined(re.findall(rf"{who} drew ticket ([\w-]+)\.", text))


def lockers(text: str, question: str) -> str:
    people = re.split(", | and ", asked(r"To which lockers? do(?:es)? (.*) keep the keys?\?", question))
    kept = dict(found(r"([A-Z]\w+ [A-Z]\w+) keeps the key to locker ([\w-]+)\.", text))
    return joined([kept[who] for who in people])


SOLVERS: dict[str, Solve] = {
    "deliveries": deliveries,
    "settings": settings,
    "register": register,
    "prices": prices,
    "sums": sums,
    "program": program,
    "handovers": handovers,
    "employers": employers,
    "vans": vans,
    "votes": votes,
    "order": order,
    "copying": copying,
    "continuing": continuing,
    "places": places,
    "serials": serials,
    "tickets": tickets,
    "lockers": lockers,
}


def exercises(task: str) -> list[Exercise]:
    return [
        make_exercise(task, random.Random(f"{task} {characters} {seed}"), DISTRACTORS, characters)
        for characters in (4000, 16000, 60000)
        for seed in range(6)
    ]


def test_every_task_has_a_solver() -> None:
    assert set(SOLVERS) == set(TASKS)


@pytest.mark.parametrize("task", list(TASKS))
def test_answers_follow_from_the_text(task: str) -> None:
    made = exercises(task)
    assert all(exercise.questions for exercise in made)
    for exercise in made:
        for question, answer, sentence in exercise.questions:
            assert SOLVERS[task](exercise.text, question) == answer
            # The sentence has the same values in the same order, and no others.
            values = r"[0-9A-Fa-f-]{16,}|[0-9A-Z]{5}(?:-[0-9A-Z]{5})+|\d{4,}"
            assert not sentence or re.findall(values, sentence) == re.findall(values, answer)
            assert bool(sentence) == (task in ("deliveries", "serials", "tickets", "lockers"))


@pytest.mark.parametrize("task", list(TASKS))
def test_lengths_and_seeds(task: str) -> None:
    for characters in (8000, 120_000):
        one, again, other = (make_exercise(task, random.Random(seed), DISTRACTORS, characters) for seed in (1, 1, 2))
        assert one == again != other
        assert 0.9 * characters < len(one.text) < 1.25 * characters


def fixed_words(text: str) -> list[str]:
    """What a template says in any case: letters and underscores, and a mark where something is put in."""
    return re.findall(r"[a-z']+|\{", re.sub(r"\{\w*\}", " { ", text.lower()))


def runs_of(words: list[str], size: int = 5) -> set[tuple[str, ...]]:
    runs = {tuple(words[at : at + size]) for at in range(len(words) - size + 1)}
    return {run for run in runs if "{" not in run}


def test_none_is_worded_as_ruler_is() -> None:
    """No five words in a row of RULER's prompts, and none of its needles, are in what exercises say."""
    templates = [value for name, value in vars(ruler).items() if name.isupper() and isinstance(value, str)]
    assert len(templates) > 8
    templates += [NOISE, ruler._singular(ruler._NEEDLE_TEMPLATE), inspect.getsource(ruler._tracking)]
    theirs = set().union(*(runs_of(fixed_words(template)) for template in templates))
    for task in TASKS:
        for exercise in exercises(task)[:4]:
            texts = [as_text(exercise, random.Random(seed)) for seed in range(8)]
            chats = [as_chat(exercise, sentences) for sentences in (False, True)]
            for said in texts + ["\n".join(message["content"] for message in chat) for chat in chats]:
                assert not runs_of(fixed_words(said)) & theirs
                assert "magic" not in said
                assert "VAR " not in said
                assert "needle" not in said


def test_a_chat_has_every_question_once() -> None:
    exercise = exercises("deliveries")[0]
    messages = as_chat(exercise)
    assert [message["role"] for message in messages] == ["user", "assistant"] * len(exercise.questions)
    assert messages[0]["content"].startswith(exercise.text)
    assert [message["content"] for message in messages[1::2]] == [each.answer for each in exercise.questions]
    assert sum(message["content"].count(exercise.text) for message in messages) == 1


def test_a_sentence_follows_a_question_at_once_or_as_its_answer() -> None:
    exercise = exercises("lockers")[0]
    texts = {as_text(exercise, random.Random(seed)).partition(exercise.text)[2] for seed in range(40)}
    question, answer, sentence = exercise.questions[0]
    assert any(f"\n\n{question} {sentence}" in text for text in texts)
    assert any(f"{question}\nAnswer: {sentence}" in text for text in texts)
    assert any(f"{question}\nAnswer: {answer}" in text for text in texts)
    chat = as_chat(exercise, sentences=True)
    assert [message["content"] for message in chat[1::2]] == [each.sentence for each in exercise.questions]
