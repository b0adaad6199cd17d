"""Runs that texts share: copies are told from new text, and what evaluation has is taken out."""

# ruff: noqa: SIM905

import random
import re

import numpy as np
from tiny import sentences

from hylo.corpus.clean import Cleaner, Losses
from hylo.corpus.evaluations import _texts
from hylo.corpus.extract import Draft
from hylo.corpus.overlap import Labelled, Passage, RunIndex, SeenRuns

_WORDS = (
    "the of and to a in that is was he for it with as his on be at by had not are but from have they which one you "
    "were river stone lamp garden window harbour winter letter summer road bridge market candle forest engine morning"
).split(" ")


def prose(seed: int, words: int = 400) -> str:
    """Paragraphs that pass for English by their common words; two seeds share no run of 13 words."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(_WORDS, k=20)) + "." for _ in range(words // 20)]
    return "\n\n".join(" ".join(lines[at : at + 3]) for at in range(0, len(lines), 3))


def shared_runs(one: str, other: str) -> int:
    """An independent count of the runs of 13 words that two texts share."""
    words = [re.sub(r"\W+", " ", text.lower()).split() for text in (one, other)]
    runs = [{tuple(text[at : at + 13]) for at in range(len(text) - 12)} for text in words]
    return len(runs[0] & runs[1])


def cleaner(*evaluation: str) -> Cleaner:
    return Cleaner(RunIndex([Labelled("exam", list(evaluation))]), SeenRuns(bits=24))


def test_runs_are_told_as_counted_by_hand() -> None:
    words = sentences(1, 10).split()
    text = " ".join([*sentences(2, 4).split(), *words[5:40], *sentences(3, 4).split()])
    found, counts = RunIndex([Labelled("exam", [" ".join(words)])]).found(Passage(text).runs)
    assert int(found.sum()) == shared_runs(text, " ".join(words)) == 35 - 12
    assert counts == {"exam": 23}


def test_a_gap_is_filled_with_either_option() -> None:
    """No run of 13 words of the sentence as it is read has the gap in it."""
    begin, end = sentences(1, 1).split()[:7], sentences(2, 1).split()[:7]
    row = {"sentence": " ".join([*begin, "_", *end]), "option1": "lamp", "option2": "harbour", "answer": "1"}
    index = RunIndex([Labelled("winogrande", list(_texts(row)))])
    for option in ("lamp", "harbour"):
        assert index.found(Passage(" ".join([*begin, option, *end])).runs)[0].all()
    assert not index.found(Passage(" ".join([*begin, "stone", *end])).runs)[0].any()


def test_covered_words_are_those_of_the_runs() -> None:
    passage = Passage(" ".join(f"w{i}" for i in range(30)))
    found = np.zeros(18, bool)
    found[[2, 4]] = True
    assert np.flatnonzero(passage.covered(found)).tolist() == list(range(2, 17))


def test_seen_runs_tell_what_came_before_and_what_comes_twice() -> None:
    seen = SeenRuns(bits=24)
    first, second = Passage(sentences(1)).runs, Passage(sentences(2)).runs
    assert not seen.known(first).any()
    seen.add(first)
    assert seen.known(first).all()
    assert seen.known(second).mean() < 0.01
    twice = Passage(sentences(3) + sentences(3)).runs
    assert 0.4 < seen.known(twice).mean() < 0.55


def test_copies_and_near_copies_are_dropped() -> None:
    judge, losses = cleaner(), Losses()
    original = prose(1)
    assert judge.clean(Draft("a", [original]), "prose", losses) == original
    assert judge.clean(Draft("b", [original]), "prose", losses) is None
    # One word in forty is another: a near copy.
    words = original.split(" ")
    near = " ".join("other" if at % 40 == 39 else word for at, word in enumerate(words))
    assert judge.clean(Draft("c", [near]), "prose", losses) is None
    assert judge.clean(Draft("d", [prose(2)]), "prose", losses) == prose(2)
    assert losses.characters["copied pages"] == len(original) + len(near)
    assert losses.documents == 2


def test_a_quoted_paragraph_is_dropped_from_prose_and_not_from_code() -> None:
    judge, losses = cleaner(), Losses()
    judge.clean(Draft("a", [prose(1)]), "prose", losses)
    quoted = prose(1).split("\n\n")[0]
    page = f"{prose(2)}\n\n{quoted}\n\n{prose(3)}"
    assert judge.clean(Draft("b", [page]), "code", Losses()) == page
    judge, losses = cleaner(), Losses()
    judge.clean(Draft("a", [prose(1)]), "prose", losses)
    assert judge.clean(Draft("b", [page]), "manuals", losses) == f"{prose(2)}\n\n{prose(3)}"
    assert losses.characters["copied paragraphs"] == len(quoted) + 2


def test_pages_of_a_manual_are_judged_one_by_one() -> None:
    judge = cleaner()
    judge.clean(Draft("a", [prose(1)]), "manuals", Losses())
    kept = judge.clean(Draft("b", [prose(2), prose(1), prose(3)]), "manuals", Losses())
    assert kept == f"{prose(2)}\n\n{prose(3)}"


def test_pages_that_are_joined_make_no_run() -> None:
    words = prose(9).split()[:14]
    pages = [f"{prose(1)}\n\n{' '.join(words[:7])}", f"{' '.join(words[7:])}\n\n{prose(2)}"]
    kept = cleaner(" ".join(words)).clean(Draft("a", pages), "manuals", Losses())
    assert kept == f"{prose(1)}\n\n{prose(2)}"


def test_lists_and_foreign_text_are_no_prose() -> None:
    judge, losses = cleaner(), Losses()
    numbers = "\n".join(f"{i} {i * i} {i**3}" for i in range(300))
    german = "\n\n".join(f"Der Hund {i} läuft über die Straße und findet einen Knochen" for i in range(50))
    for text in (numbers, german):
        assert judge.clean(Draft("a", [text]), "manuals", losses) is None
    assert losses.characters["not English prose"] == len(numbers) + len(german)
    assert judge.clean(Draft("b", [numbers]), "code", losses) == numbers


def test_nothing_of_evaluation_is_left() -> None:
    exam = " ".join(prose(9).split()[:60])
    words = exam.split()
    judge, losses = cleaner(exam), Losses()
    within = f"{prose(1)}\n\nAs it says: {' '.join(words[3:30])}, and so on.\n\n{prose(2)}"
    across = f"{prose(3)}\n\n{' '.join(words[:7])}\n\n{' '.join(words[7:15])}"
    twelve = f"{prose(4)} {' '.join(words[:12])} stone stone"
    for name, text in (("within", within), ("across", across)):
        kept = judge.clean(Draft(name, [text]), "prose", losses)
        assert kept is not None
        assert shared_runs(text, exam) > 0
        assert shared_runs(kept, exam) == 0
    assert judge.clean(Draft("twelve", [twelve]), "prose", losses) == twelve
    assert losses.runs["exam"] == shared_runs(within, exam) + shared_runs(across, exam)
    assert losses.characters["in evaluation text"] > 0
