"""Samples of RULER: each as long as its length allows in tokens of the model's tokenizer, in parallel processes.

A sample depends on the seed, its task, its length and its number alone, however many processes make it.
"""

import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any

from hylo.errors import HyLoError
from hylo.evaluate.data import LocalData, MissingDataError, Reading
from hylo.evaluate.ruler.tasks import TASKS, Draft, Material, QuestionAnswering, Task
from hylo.evaluate.ruler.words import word_lists
from hylo.progress import bar

# Samples that one process makes in a go: each go begins with a few prompts that only serve to find a size.
_SAMPLES_A_JOB = 10
# How many drafts are tried beyond those wanted where they are not questions, whose sizes differ little.
_MORE_DRAFTS = 40
# Below this many tokens in all, starting processes takes longer than they save.
_TOKENS_WORTH_PROCESSES = 2_000_000


@dataclass(frozen=True)
class Sample:
    """A prompt and what is wanted of the answer.

    Attributes:
        prompt: as the model reads it, up to where its answer begins.
        tokens: of the prompt; with `new_tokens` at most `length`.
        special: whether the tokenizer adds its special tokens (a chat template brings its own).
        depth: percent of the context before the needle; None where that says nothing.
    """

    task: str
    length: int
    index: int
    prompt: str
    wanted: list[str]
    tokens: int
    new_tokens: int
    special: bool
    depth: float | None


def check_tasks(names: Sequence[str]) -> None:
    """Raises HyLoError on an unknown task."""
    for name in names:
        if name not in TASKS:
            raise HyLoError(f"no RULER task {name!r}; expected one of {', '.join(TASKS)}")


def available_tasks(data: LocalData, wanted: Sequence[str] = tuple(TASKS)) -> tuple[list[str], dict[str, str]]:
    """Those of the wanted tasks that there is data for, and why the others are missing.

    Raises HyLoError on an unknown task, or where the package with the words is missing.
    """
    check_tasks(wanted)
    word_lists()
    found, missing = [], {}
    for name in wanted:
        needs = TASKS[name].needs
        try:
            if needs is not None:
                getattr(data, needs)()
            found.append(name)
        except MissingDataError as error:
            missing[name] = str(error)
    return found, missing


def make_samples(
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int],
    count: int,
    *,
    seed: int = 0,
    data: LocalData | None = None,
    chat: bool = False,
    workers: int | None = None,
) -> list[Sample]:
    """`count` samples of each task at each length, in order of length, task and number.

    A draft that does not fit a length at its smallest (a long question) gives way to the next that does; where there
    are fewer than `count` of these there are fewer samples, and a task of which none fits is left out (see `left_out`).

    Args:
        lengths: in tokens, prompt and answer together.
        chat: put the question into the tokenizer's chat template, and begin the model's turn with the answer's prefix.
        workers: processes; as many as there are cores by default, none where there is little to do.

    Raises:
        HyLoError: where a length is too short for every task, data is missing, or there is no chat template.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise HyLoError("the tokenizer has no chat template; leave out --chat")
    data = data or LocalData()
    maker = Maker(tokenizer, data)
    # All that can be too short is told before anything long is made.
    plans = [
        (kind, maker.fitting(kind, count))
        for length in lengths
        for kind in (Kind(t, length, seed, chat) for t in tasks)
    ]
    for length in lengths:
        if not any(numbers for kind, numbers in plans if kind.length == length):
            raise HyLoError(f"{length} tokens are too few for RULER's {', '.join(tasks)}; choose longer lengths")
    jobs = [
        Job(kind, first, numbers[first : first + _SAMPLES_A_JOB], numbers[0])
        for kind, numbers in plans
        for first in range(0, len(numbers), _SAMPLES_A_JOB)
    ]
    total = sum(job.kind.length * len(job.numbers) for job in jobs)
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), len(jobs)) if total >= _TOKENS_WORTH_PROCESSES else 1
    made: dict[Job, list[Sample]] = {}
    with bar("make RULER prompts", sum(len(job.numbers) for job in jobs), "samples") as shown:
        if workers <= 1:
            for job in jobs:
                made[job] = maker(job)
                shown.advance(len(made[job]), f"{job.kind.task} {job.kind.length:,}")
        else:
            # Not forked from here: this process may hold threads and a GPU.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, data)) as pool:
                # The long ones first, so that no process is left alone with one at the end.
                ordered = sorted(jobs, key=lambda job: -job.kind.length)
                waiting = {pool.submit(_work, job): job for job in ordered}
                try:
                    for done in as_completed(waiting):
                        job = waiting[done]
                        made[job] = done.result()
                        shown.advance(len(made[job]), f"{job.kind.task} {job.kind.length:,}")
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return [sample for job in jobs for sample in made[job]]


def left_out(samples: Sequence[Sample], tasks: Sequence[str]) -> dict[int, dict[str, str]]:
    """By length, the tasks that have no sample because none fits, and that reason."""
    there = {(sample.length, sample.task) for sample in samples}
    return {
        length: {task: f"no sample fits {length:,} tokens" for task in tasks if (length, task) not in there}
        for length in dict.fromkeys(sample.length for sample in samples)
    }


def origins(data: LocalData, tasks: Sequence[str]) -> dict[str, str]:
    """Where the words and texts of these tasks come from."""
    found = {"words": f"wonderwords {importlib.metadata.version('wonderwords')}"}
    for needs in dict.fromkeys(TASKS[task].needs for task in tasks):
        if needs == "essays":
            found[needs] = data.essays()[1]
        elif needs is not None:
            reading: Reading = getattr(data, needs)()
            counts = f"{len(reading.questions):,} questions over {len(reading.paragraphs):,} paragraphs"
            found[needs] = f"{reading.origin}, {counts}"
    return found


def repeated_documents(samples: Sequence[Sample], data: LocalData) -> dict[int, list[str]]:
    """By length, the question-answering tasks whose prompts hold some documents more than once, in words."""
    found: dict[int, dict[str, None]] = {}
    for sample in samples:
        make = TASKS[sample.task].make
        if isinstance(make, QuestionAnswering):
            there = len(getattr(data, make.name)().paragraphs)
            if len(re.findall(r"\n\nDocument \d+:\n", sample.prompt)) > there:
                words = f"{sample.task} at {sample.length:,} repeats some of its {there:,} paragraphs"
                found.setdefault(sample.length, {})[words] = None
    return {length: list(words) for length, words in found.items()}


def samples_digest(samples: Sequence[Sample]) -> str:
    """A hash over prompts and wanted answers."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(asdict(sample), sort_keys=True).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Kind:
    """What samples have in common."""

    task: str
    length: int
    seed: int
    chat: bool

    @property
    def budget(self) -> int:
        """Tokens of a prompt at most."""
        return self.length - TASKS[self.task].new_tokens


@dataclass(frozen=True)
class Job:
    """Samples of one kind, in order from number `first` on, from drafts of these numbers.

    Attributes:
        calibrate: the number of the draft that sizes are found on, for all jobs of this kind the same.
    """

    kind: Kind
    first: int
    numbers: tuple[int, ...]
    calibrate: int


_maker: "Maker"


def _start_worker(tokenizer: Any, data: LocalData) -> None:
    global _maker
    # One thread a process: the processes are the parallel part.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _maker = Maker(tokenizer, data)


def _work(job: Job) -> list[Sample]:
    return _maker(job)


class Maker:
    """Makes samples in one process."""

    def __init__(self, tokenizer: Any, data: LocalData) -> None:
        self.tokenizer = tokenizer
        self.material = Material(data, lambda text: self._count(text, True))

    def _count(self, text: str, special: bool) -> int:
        return len(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _prompt(self, draft: Draft, chat: bool) -> str:
        if not chat:
            return f"{draft.input} {draft.prefix}"
        turns = [{"role": "user", "content": draft.input}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + draft.prefix

    def _sized(self, kind: Kind, number: int) -> Callable[[int], tuple[Draft, str, int]]:
        """Makes the draft of that number in any size, its prompt, and counts the prompt's tokens."""

        def make(units: int) -> tuple[Draft, str, int]:
            # Anew for each size: only the size differs between tries.
            rng = random.Random(f"{kind.seed}/{kind.task}/{kind.length}/{number}")
            draft = TASKS[kind.task].make(self.material, rng, units, kind.length, number)
            prompt = self._prompt(draft, kind.chat)
            return draft, prompt, self._count(prompt, not kind.chat)

        return make

    def fitting(self, kind: Kind, count: int) -> tuple[int, ...]:
        """The numbers of the first `count` drafts that fit at their smallest; each question is tried once."""
        task = TASKS[kind.task]
        questions = self.material.reading(task.make.name).questions if isinstance(task.make, QuestionAnswering) else ()
        numbers: list[int] = []
        for number in range(max(count, len(questions)) if questions else count + _MORE_DRAFTS):
            if len(numbers) == count:
                break
            # Cheaper than a draft, and no draft is shorter.
            if isinstance(task.make, QuestionAnswering):
                needed = self._count(task.make.needed(self.material, number), False)
                if needed > kind.budget:
                    continue
            if self._sized(kind, number)(task.lowest)[2] <= kind.budget:
                numbers.append(number)
        return tuple(numbers)

    def __call__(self, job: Job) -> list[Sample]:
        kind, task = job.kind, TASKS[job.kind.task]
        start, slope = self._calibrate(task, kind.budget, lambda units: self._sized(kind, job.calibrate)(units)[2])
        samples = []
        for index, number in enumerate(job.numbers, job.first):
            found = fit(self._sized(kind, number), kind.budget, start, slope, task.lowest)
            # It does at its smallest: `fitting`.
            assert found is not None
            draft, prompt, tokens = found
            samples.append(
                Sample(
                    kind.task,
                    kind.length,
                    index,
                    prompt,
                    draft.wanted,
                    tokens,
                    task.new_tokens,
                    not kind.chat,
                    draft.depth,
                )
            )
        return samples

    def _calibrate(self, task: Task, budget: int, count: Callable[[int], int]) -> tuple[int, float]:
        """Units that come near the budget, and tokens a unit; always found on the same draft, so that it does not
        matter which samples a process makes."""
        low, high = task.lowest, task.lowest + 40
        tokens_low, tokens_high = count(low), count(high)
        for _ in range(2):
            slope = max((tokens_high - tokens_low) / (high - low), 0.1)
            high = max(low + 1, low + int((budget - tokens_low) / slope))
            tokens_high = count(high)
        slope = max((tokens_high - tokens_low) / (high - low), 0.1)
        return max(low, high + math.floor((budget - tokens_high) / slope)), slope


def fit(
    make: Callable[[int], tuple[Draft, str, int]], budget: int, start: int, slope: float, lowest: int
) -> tuple[Draft, str, int] | None:
    """The largest draft that fits, to within one unit; None where not even the smallest does.

    Args:
        make: a draft of so many units, its prompt, and the prompt's tokens.
        budget: tokens at most.
        start: units to try first.
        slope: about how many tokens a unit adds.
        lowest: units at least.
    """
    best: tuple[Draft, str, int] | None = None
    fits, breaks = lowest - 1, None
    units = max(start, lowest)
    while units > fits and (breaks is None or units < breaks):
        made = make(units)
        tokens = made[2]
        if tokens <= budget:
            best, fits = made, units
            step = int((budget - tokens) / slope)
        else:
            breaks = units
            step = -max(1, math.ceil((tokens - budget) / slope))
        units += step
        if breaks is not None and units >= breaks:
            units = breaks - 1
        units = max(units, lowest)
    return best
