"""RULER's marks against hand-made answers, and against the harness's own scorer."""

import pytest

from hylo.evaluate.ruler import score

CASES = [
    ("niah_single_1", " 1234567.", ["1234567"], 1.0),
    ("niah_single_1", "1234568", ["1234567"], 0.0),
    ("niah_single_3", "it is 6E0AC92E-604A-4a71-9ddf-dbd76df56e18", ["6e0ac92e-604a-4a71-9ddf-dbd76df56e18"], 1.0),
    ("niah_multivalue", "111, 222 and 444", ["111", "222", "333", "444"], 0.75),
    ("vt", "ABCDE FGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"], 0.4),
    ("cwe", "1. apple 2. pear\x002. fig", ["apple", "fig", "plum", "kiwi"], 0.5),
    ("fwe", "abcdef, ghijkl, mnopqr", ["abcdef", "ghijkl", "mnopqr"], 1.0),
    ("fwe", "", ["abcdef", "ghijkl", "mnopqr"], 0.0),
]


@pytest.mark.parametrize(("task", "answer", "wanted", "expected"), CASES)
def test_all_wanted_strings_count_alike(task: str, answer: str, wanted: list[str], expected: float) -> None:
    assert score(task, answer, wanted) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"), [("In 23 Years.", 1.0), ("twenty-three", 0.0), ("\n\n23\n", 1.0), ("", 0.0)]
)
def test_any_answer_of_a_question_will_do(answer: str, expected: float) -> None:
    assert score("qa_squad", answer, ["23 years", "23"]) == expected


def test_scores_are_the_harness_s_where_it_follows_the_paper() -> None:
    """Not for questions: there the harness gives the share of the reference answers found, the paper any of them."""
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    for task, answer, wanted, _ in CASES:
        assert score(task, answer, wanted) == pytest.approx(string_match_all(postprocess_pred([answer]), [wanted]))
