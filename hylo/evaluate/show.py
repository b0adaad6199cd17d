"""Results of `hylo eval` as a table for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hylo.evaluate.measures import measurements

# What a suite is called, and what a row of it shows.
_PERCENT = 100.0
Cell = tuple[float, float | None, int | None]


def results_table(report: Mapping[str, Any]) -> Table:
    """One row a score, one column a model. Accuracies in percent, each with its standard error."""
    results: Sequence[Mapping[str, Any]] = report["results"]
    title = " against ".join(result["reference"] for result in results)
    table = Table(title=escape(title), caption=escape(caption(report)))
    table.add_column("")
    table.add_column("metric")
    table.add_column("n", justify="right")
    for result in results:
        table.add_column(escape(model_name(result)), justify="right")
    before = None
    for (suite, label, metric), number, cells in table_rows(results):
        if before not in (None, suite):
            table.add_section()
        before = suite
        table.add_row(escape(label), metric, number, *cells)
    return table


def table_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, str, str], str, list[str]]]:
    """(suite, row, metric), the count and a cell for each result, as text. Where results differ in their counts, each
    cell has its own."""
    columns = [dict(score_rows(result)) for result in results]
    for key in dict.fromkeys(key for column in columns for key in column):
        cells = [column.get(key) for column in columns]
        counts = {cell[2] for cell in cells if cell is not None and cell[2]}
        texts = [_cell(cell, key[2]) for cell in cells]
        if len(counts) > 1:
            texts = [
                f"{text} (n {cell[2]:,})" if cell is not None and cell[2] else text
                for text, cell in zip(texts, cells, strict=True)
            ]
        yield key, f"{counts.pop():,}" if len(counts) == 1 else "", texts


def model_name(result: Mapping[str, Any]) -> str:
    """A model by its layout or family, its folder, and how it was measured where that was in several ways."""
    name = f"{result.get('layout') or result['family']} ({Path(result['reference']).name})"
    return f"{name}, {result['measured']}" if result.get("measured") else name


def _cell(cell: Cell | None, metric: str) -> str:
    if cell is None:
        return ""
    value, stderr, _ = cell
    digits = {"perplexity": 2, "bits per byte": 3}.get(metric, 1)
    return f"{value:,.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr is not None else "")


def score_rows(result: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str], Cell]]:
    """(suite, row, metric) with value, standard error and count. Accuracies are in percent."""
    suites = result["suites"]
    if (suite := suites.get("commonsense")) is not None:
        for task, score in suite["tasks"].items():
            yield ("commonsense", task, score["metric"]), _percent(score, score["documents"])
        yield ("commonsense", suite["mean"]["label"], ""), _percent(suite["mean"], None)
    for suite in measurements(result, "gsm8k"):
        matches = suite["exact_match"]
        for metric, score in matches["metrics"].items():
            label = metric.replace("exact_match,", "exact match, ").replace("-", " ")
            yield ("gsm8k", f"{suite['task']}, {matches['shots']} shots", label), _percent(score, matches["documents"])
    # The same answers, whatever the task.
    if answers := [suite["bits_per_byte"] for suite in measurements(result, "gsm8k")]:
        bits = max(answers, key=lambda one: one["documents"])
        yield ("gsm8k", "GSM8K, gold answers", "bits per byte"), (bits["value"], bits["stderr"], bits["documents"])
    if (suite := suites.get("ruler")) is not None:
        for length, scores in suite["lengths"].items():
            label = f"{scores['mean']['label']} at {int(length):,}"
            count = sum(task["samples"] for task in scores["tasks"].values())
            yield ("ruler", label, "score"), _percent(scores["mean"], count)
    for suite in measurements(result, "perplexity"):
        count = sum(position["tokens"] for position in suite["positions"])
        # Of the perplexity, from that of the mean: exp is nearly straight so close to it.
        stderr = suite["perplexity"] * suite["stderr"] if suite.get("stderr") is not None else None
        label = f"{suite['text']}, windows of {suite['length']:,}"
        yield ("perplexity", label, "perplexity"), (suite["perplexity"], stderr, count)


def _percent(score: Mapping[str, Any], count: int | None) -> Cell:
    stderr = score["stderr"]
    return _PERCENT * score["value"], _PERCENT * stderr if stderr is not None else None, count


def missing_lines(report: Mapping[str, Any]) -> list[str]:
    """What was asked for and could not be had, one line for each reason; with the model's name where others have it."""
    results = report["results"]
    of: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for what, reason in _missing(result):
            of.setdefault((what, reason), []).append(model_name(result))
    reasons: dict[tuple[str, str], list[str]] = {}
    for (what, reason), models in of.items():
        reasons.setdefault(("" if len(models) == len(results) else ", ".join(models), reason), []).append(what)
    return [
        (f"{models}: " if models else "")
        + (reason if all(what in reason for what in names) else f"{', '.join(names)}: {reason}")
        for (models, reason), names in reasons.items()
    ]


def _missing(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for part in (result, *result["suites"].values()):
        for name, reason in part.get("missing", {}).items():
            # Of RULER a whole length may be missing, and is named by its tokens.
            yield f"RULER at {int(name):,}" if name.isdigit() else name, reason
    for scores in result["suites"].get("ruler", {}).get("lengths", {}).values():
        yield from scores.get("missing", {}).items()


def caption(report: Mapping[str, Any]) -> str:
    """What a reader must know of the scores: how much was measured."""
    return "; ".join(notes(report["results"]))


def notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much was measured, and what more than once; with the model's name where that is not so of all."""
    of: dict[str, list[str]] = {}
    for result in results:
        for line in _notes(result):
            of.setdefault(line, []).append(model_name(result))
    return [line if len(names) == len(results) else f"{', '.join(names)}: {line}" for line, names in of.items()]


def _notes(result: Mapping[str, Any]) -> Iterator[str]:
    if not result.get("finished", True):
        yield "not finished"
    suites = result["suites"]
    tasks = list(suites.get("commonsense", {}).get("tasks", {}).values())
    tasks += [suite["exact_match"] for suite in measurements(result, "gsm8k")]
    if limits := sorted({task["documents"] for task in tasks if task["documents"] < task["of"]}):
        yield f"the first {_either(limits)} documents of each task alone"
    lengths = suites.get("ruler", {}).get("lengths", {}).values()
    if samples := sorted({task["samples"] for scores in lengths for task in scores["tasks"].values()}):
        yield f"samples of RULER for each task and length: {_either(samples)}"
    for scores in lengths:
        yield from scores.get("notes", [])
    if result.get("repeated"):
        yield f"measured more than once, the largest shown: {', '.join(result['repeated'])}"


def _either(counts: Sequence[int]) -> str:
    return " or ".join(f"{count:,}" for count in counts)
