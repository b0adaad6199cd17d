"""How RULER marks an answer (its evaluation constants `string_match_all` and `string_match_part`)."""

import re
from collections.abc import Sequence

from hylo.evaluate.ruler.tasks import TASKS


def clean(answer: str) -> str:
    """Without white space around it, control characters made to line ends, as RULER does before it compares."""
    return re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip()


def score(task: str, answer: str, wanted: Sequence[str]) -> float:
    """From 0 to 1: the share of the wanted strings that the answer contains, case aside; for the question-answering
    tasks, 1 where it contains any of them."""
    given = clean(answer).lower()
    found = [one.lower() in given for one in wanted]
    return float(any(found)) if TASKS[task].any_answer else sum(found) / len(found)
