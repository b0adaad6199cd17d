"""RULER's samples given to a model, and the scores by length, task and depth."""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hylo.evaluate.backends import Backend
from hylo.evaluate.engine import OUT_OF_MEMORY
from hylo.evaluate.measures import NO_MEMORY, Log, Save, free_memory, standard_error, task_mean, text_digest
from hylo.evaluate.ruler.generate import Sample, samples_digest
from hylo.evaluate.ruler.scoring import score
from hylo.evaluate.ruler.tasks import TASKS


@dataclass(frozen=True)
class RulerPrompts:
    """What RULER asks every model of one vocabulary.

    Attributes:
        missing: tasks without data, and why.
        left_out: tasks without a sample at a length, and why.
        origin: where the words and texts come from.
        notes: by length, what a reader must know of its prompts.
    """

    samples: Sequence[Sample] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[int, list[str]] = field(default_factory=dict)


def run_ruler(
    backend: Backend,
    prompts: RulerPrompts,
    measured: Save = lambda suite: None,
    log: Log = lambda rows: None,
) -> dict[str, Any]:
    """Scores by length and task, from 0 to 1; and by length and depth in percent how many single needles were found, of
    how many. A length that does not fit into memory is missing.

    Args:
        measured: is given the suite as it is after each length.
        log: is given a row for each sample of a length.
    """
    samples = prompts.samples
    suite: dict[str, Any] = {
        "lengths": {},
        "missing": dict(prompts.missing),
        "needles": {},
        "origin": dict(prompts.origin),
        "prompts_sha256": samples_digest(samples),
    }
    for length in dict.fromkeys(sample.length for sample in samples):
        asked = [sample for sample in samples if sample.length == length]
        start = time.monotonic()
        try:
            answers = _ruler_answers(backend, asked)
        except OUT_OF_MEMORY:
            suite["missing"][str(length)] = NO_MEMORY
        else:
            values = [score(sample.task, answer, sample.wanted) for sample, answer in zip(asked, answers, strict=True)]
            gone = dict(prompts.left_out.get(length, {}))
            suite["lengths"][str(length)] = _ruler_scores(asked, values, {*prompts.missing, *gone}) | {
                "missing": gone,
                "notes": prompts.notes.get(length, []),
                "prompts_sha256": samples_digest(asked),
                "seconds": round(time.monotonic() - start, 1),
            }
            log([_ruler_row(*row) for row in zip(asked, answers, values, strict=True)])
            if needles := _found_needles(asked, values):
                suite["needles"][str(length)] = needles
        free_memory()
        measured(suite)
    return suite


def _ruler_row(sample: Sample, answer: str, value: float) -> dict[str, Any]:
    return {
        "task": sample.task,
        "length": sample.length,
        "index": sample.index,
        "depth": sample.depth,
        "prompt_sha256": text_digest(sample.prompt),
        "answer": answer,
        "expected": sample.wanted,
        "score": value,
    }


def _ruler_answers(backend: Backend, samples: Sequence[Sample]) -> list[str]:
    """To samples of one length, in their order; asked together where they take as many tokens to answer."""
    groups: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.new_tokens, []).append(i)
    answers: dict[int, str] = {}
    for new_tokens, indices in groups.items():
        first = samples[indices[0]]
        given = backend.answers(
            [samples[i].prompt for i in indices],
            new_tokens,
            special=first.special,
            description=f"RULER {first.length:,}, answers of {new_tokens}",
        )
        answers.update(zip(indices, given, strict=True))
    return [answers[i] for i in range(len(samples))]


def _ruler_scores(samples: Sequence[Sample], values: Sequence[float], missing: set[str]) -> dict[str, Any]:
    """Of one length: each task, and the mean over them; `missing` are those that were wanted and could not be had."""
    tasks = {}
    for name in TASKS:
        of_task = [value for sample, value in zip(samples, values, strict=True) if sample.task == name]
        if of_task:
            value = statistics.fmean(of_task)
            tasks[name] = {"value": value, "stderr": standard_error(of_task), "samples": len(of_task)}
    mean = task_mean(tasks.values(), len(TASKS)) | {"label": ruler_label(tasks, missing)}
    return {"tasks": tasks, "mean": mean}


def ruler_label(tasks: Iterable[str], missing: Iterable[str]) -> str:
    """What a mean over these tasks is called: by their number where they are all thirteen, or all that could be had;
    else by name, since any twelve of thirteen are no RULER-12."""
    there = list(tasks)
    others = [name for name in TASKS if name not in there]
    if set(others) <= set(missing):
        return f"RULER-{len(there)}"
    return f"RULER without {', '.join(others)}" if len(others) < len(there) else f"RULER of {', '.join(there)}"


def _found_needles(samples: Sequence[Sample], values: Sequence[float]) -> dict[str, list[float]]:
    """By depth in percent: found, hidden."""
    needles: dict[str, list[float]] = {}
    for sample, value in zip(samples, values, strict=True):
        if sample.depth is not None:
            found = needles.setdefault(f"{sample.depth:g}", [0.0, 0])
            found[0] += value
            found[1] += 1
    return needles
