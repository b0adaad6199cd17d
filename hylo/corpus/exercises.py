"""Exercises of every task and length on the corpus's own text, written as texts and as chats."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hylo.corpus.rows import SUFFIX, reading, writing
from hylo.corpus.spec import CorpusSpec
from hylo.corpus.tasks import TASKS, Exercise, make_exercise
from hylo.progress import bar

# Of English with names and numbers in it.
_CHARACTERS_A_TOKEN = 3.9
# Of distractor text of each source, and paragraphs of which it is made.
_CHARACTERS_A_SOURCE = 1_500_000
_PARAGRAPH = (60, 1500)
_HELD_OUT_SHARE = 0.01
# Folders whose text is paragraphs.
_DISTRACTING = ("prose", "manuals", "held-out")
_INTRODUCTIONS = ("", "", "Read this text; questions on it follow.", "Here are some notes.", "# Notes")
_FORMS = (
    ("Question: ", "\nAnswer: "),
    ("Q: ", "\nA: "),
    ("", "\n"),
    ("- ", "\n  "),
    ("> ", "\n\n"),
    ("", " "),
    ("", " "),
)


class Distractors:
    """Paragraphs of documents, in their order.

    Args:
        documents: texts; those without paragraphs of a fit length are passed over.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        shortest, longest = _PARAGRAPH
        split = [[p.strip() for p in text.split("\n\n")] for text in documents]
        kept = [[p for p in paragraphs if shortest <= len(p) <= longest] for paragraphs in split]
        self.documents = [paragraphs for paragraphs in kept if paragraphs]

    def __call__(self, rng: random.Random, characters: int) -> list[str]:
        """Paragraphs of about so many characters: a stretch of one document, then of another."""
        chosen: list[str] = []
        size = 0
        while size < characters and self.documents:
            document = rng.choice(self.documents)
            start = rng.randrange(len(document))
            for paragraph in document[start:]:
                chosen.append(paragraph)
                size += len(paragraph) + 2
                if size >= characters:
                    break
        return chosen


def write_exercises(spec: CorpusSpec, output: Path) -> dict[str, Any]:
    """Writes exercises on the corpus's training text, and a few on its held-out text; returns how many of which."""
    wanted = spec.tasks
    if not wanted.tokens:
        return {}
    told: dict[str, Any] = {}
    for place, folder, share in (
        ("train/exercises", output / "train" / "exercises", 1.0),
        ("held-out", output / "held-out-exercises", _HELD_OUT_SHARE),
    ):
        of = (output / place.split("/")[0]).rglob(f"*{SUFFIX}")
        files = sorted(path for path in of if path.parent.name in _DISTRACTING)
        distractors = Distractors(list(_texts(files)))
        counts: Counter[str] = Counter()
        with writing(folder / f"exercises{SUFFIX}") as texts, writing(_chats(folder)) as chats:
            for name, length, exercise, rng in _exercises(spec, distractors, share, place):
                counts[f"{exercise.task}"] += 1
                counts[f"{length} tokens"] += 1
                if rng.random() < wanted.chats:
                    chats.write({"name": name, "messages": as_chat(exercise, sentences=rng.random() < 0.5)})
                else:
                    texts.write({"name": name, "text": as_text(exercise, rng)})
        told[place] = dict(counts)
    return told


def _chats(folder: Path) -> Path:
    """Beside the texts: a source of hylo holds texts or chats."""
    return folder.with_name(f"{folder.name}-chats") / f"exercises{SUFFIX}"


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        left = _CHARACTERS_A_SOURCE
        for row in reading(file):
            if "text" not in row:
                break
            yield row["text"][:left]
            left -= len(row["text"])
            if left <= 0:
                break


def _exercises(
    spec: CorpusSpec, distractors: Distractors, share: float, place: str
) -> Iterator[tuple[str, int, Exercise, random.Random]]:
    lengths = spec.tasks.lengths
    each = [max(1, round(share * spec.tasks.tokens / len(lengths) / length)) for length in lengths]
    tasks = list(TASKS)
    with bar(f"exercises for {place}", sum(each), "exercises") as shown:
        for length, count in zip(lengths, each, strict=True):
            for number in range(count):
                name = f"exercises/{place}/{length}/{number}"
                rng = random.Random(f"{spec.seed}/{name}")
                task = tasks[number % len(tasks)]
                exercise = make_exercise(task, rng, distractors, round(length * _CHARACTERS_A_TOKEN))
                shown.advance(1, task)
                if exercise.questions:
                    yield name, length, exercise, rng


def as_text(exercise: Exercise, rng: random.Random) -> str:
    """The text, then questions and answers, in one of several forms."""
    introduction = rng.choice(_INTRODUCTIONS)
    before, between = rng.choice(_FORMS)
    sentences = rng.random() < 0.5
    asked = [f"{before}{each.question}{between}{each.said(sentences)}" for each in exercise.questions]
    return "\n\n".join(part for part in (introduction, exercise.text, *asked) if part)


def as_chat(exercise: Exercise, sentences: bool = False) -> list[dict[str, str]]:
    """The text with the first question, and the others one turn each; answered in `sentences` where there are such."""
    messages = []
    for number, each in enumerate(exercise.questions):
        content = each.question if number else f"{exercise.text}\n\n{each.question}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": each.said(sentences)}]
    return messages
