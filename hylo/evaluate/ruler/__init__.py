"""RULER (arXiv 2404.06654): thirteen synthetic tasks at any length, made without a network.

`make_samples` makes prompts, `score` marks answers, `TASKS` names the tasks.
"""

from hylo.evaluate.ruler.generate import (
    Sample,
    available_tasks,
    check_tasks,
    left_out,
    make_samples,
    origins,
    repeated_documents,
    samples_digest,
)
from hylo.evaluate.ruler.scoring import score
from hylo.evaluate.ruler.tasks import TASKS

__all__ = [
    "TASKS",
    "Sample",
    "available_tasks",
    "check_tasks",
    "left_out",
    "make_samples",
    "origins",
    "repeated_documents",
    "samples_digest",
    "score",
]
