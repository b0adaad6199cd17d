"""What the suites share: means, errors and hashes of what they measure, and where it goes."""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# What was measured of a suite.
Suite = dict[str, Any]
# Is given all that is measured so far.
Save = Callable[[dict[str, Any]], None]
# Is given what samples were asked, answered and marked, as rows.
Log = Callable[[list[dict[str, Any]]], None]

# Why a suite, or a length of RULER, is missing.
NO_MEMORY = "not measured: one sequence does not fit into memory"


def task_mean(results: Any, of: int) -> dict[str, Any]:
    """The mean over tasks, labelled by how many of the published ones it is over."""
    results = list(results)
    errors = [result["stderr"] for result in results]
    known = all(error is not None for error in errors)
    return {
        "label": f"mean of {len(results)}" + ("" if len(results) == of else f" of the {of} tasks"),
        "value": statistics.fmean(result["value"] for result in results),
        "stderr": math.sqrt(sum(error**2 for error in errors)) / len(errors) if known else None,
    }


def measurements(result: Mapping[str, Any], name: str) -> list[Suite]:
    """Of a suite: one or none, and in a column of several files those of other texts and tasks as well."""
    first = [result["suites"][name]] if name in result["suites"] else []
    return [*first, *result.get("further", {}).get(name, [])]


def standard_error(values: Sequence[float]) -> float | None:
    """Of a mean; None for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def digest(asked: Any) -> str:
    """A hash over numbers and texts."""
    return text_digest(json.dumps(asked))


def text_digest(text: str) -> str:
    """A hash over a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def free_memory() -> None:
    """Gives back what a GPU's allocator keeps and nothing uses."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
