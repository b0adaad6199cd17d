"""Results of `hylo eval` as a table for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

# What a suite is called, and what a row of it shows.
_PERCENT = 100.0
Cell = tuple[float, float | None, int | None]


def results_table(report: Mapping[str, Any]) -> Table:
    """One row a score, one column a model. Accuracies in percent, each with its standard error."""
    results: Sequence[Mapping[str, Any]] = report["results"]
    table = Table(title=" against ".join(result["reference"] for result in results), caption=caption(report))
    table.add_column("")
    table.add_column("metric")
    table.add_column("n", justify="right")
    for result in results:
        table.add_column(model_name(result), justify="right")
    columns = [dict(score_rows(result)) for result in results]
    before = None
    for suite, label, metric in dict.fromkeys(key for column in columns for key in column):
        cells = [column.get((suite, label, metric)) for column in columns]
        if before not in (None, suite):
            table.add_section()
        before = suite
        number = next((cell[2] for cell in cells if cell is not None), None)
        table.add_row(label, metric, f"{number:,}" if number else "", *(_cell(cell, metric) for cell in cells))
    return table


def model_name(result: Mapping[str, Any]) -> str:
    """A model by its layout, or its family, and its folder."""
    return f"{result.get('layout') or result['family']} ({Path(result['reference']).name})"


def _cell(cell: Cell | None, metric: str) -> str:
    if cell is None:
        return ""
    value, stderr, _ = cell
    if metric == "perplexity":
        return f"{value:,.2f}"
    digits = 3 if metric == "bits per byte" else 1
    return f"{value:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr is not None else "")


def score_rows(result: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str], Cell]]:
    """(suite, row, metric) with value, standard error and count. Accuracies are in percent."""
    suites = result["suites"]
    if (suite := suites.get("commonsense")) is not None:
        for task, score in suite["tasks"].items():
            yield ("commonsense", task, score["metric"]), _percent(score, score["documents"])
        yield ("commonsense", suite["mean"]["label"], ""), _percent(suite["mean"], None)
    if (suite := suites.get("gsm8k")) is not None:
        matches = suite["exact_match"]
        for metric, score in matches["metrics"].items():
            label = metric.replace("exact_match,", "exact match, ").replace("-", " ")
            yield ("gsm8k", f"{suite['task']}, {matches['shots']} shots", label), _percent(score, matches["documents"])
        bits = suite["bits_per_byte"]
        yield ("gsm8k", "GSM8K, gold answers", "bits per byte"), (bits["value"], bits["stderr"], bits["documents"])
    if (suite := suites.get("ruler")) is not None:
        for length, scores in suite["lengths"].items():
            label = f"{scores['mean']['label']} at {int(length):,}"
            count = sum(task["samples"] for task in scores["tasks"].values())
            yield ("ruler", label, "score"), _percent(scores["mean"], count)
    if (suite := suites.get("perplexity")) is not None:
        count = sum(position["tokens"] for position in suite["positions"])
        yield (
            ("perplexity", f"{suite['text']}, windows of {suite['length']:,}", "perplexity"),
            (
                suite["perplexity"],
                None,
                count,
            ),
        )


def _percent(score: Mapping[str, Any], count: int | None) -> Cell:
    stderr = score["stderr"]
    return _PERCENT * score["value"], _PERCENT * stderr if stderr is not None else None, count


def missing_lines(report: Mapping[str, Any]) -> list[str]:
    """What was asked for and could not be had, one line each."""
    names: dict[str, dict[str, None]] = {}
    for result in report["results"]:
        for suite in result["suites"].values():
            for name, reason in suite.get("missing", {}).items():
                names.setdefault(reason, {})[name] = None
    return [
        reason if all(name in reason for name in of) else f"{', '.join(of)}: {reason}" for reason, of in names.items()
    ]


def caption(report: Mapping[str, Any]) -> str:
    """What a reader must know of the scores: how much was measured."""
    parts = []
    if report["settings"]["limit"] is not None:
        parts.append(f"the first {report['settings']['limit']:,} documents of each task alone")
    suites = {suite for result in report["results"] for suite in result["suites"]}
    if "ruler" in suites:
        parts.append(f"samples of RULER for each task and length: {report['settings']['samples']}")
    return "; ".join(parts)
