"""Results of several files as the columns of one table: what may stand together, and what is kept where two overlap."""

from collections.abc import Mapping, Sequence
from typing import Any

from hylo.evaluate.harness import COMMONSENSE
from hylo.evaluate.measures import Suite, measurements, task_mean
from hylo.evaluate.suites import SUITES


def columns(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One result for each model and way of measuring it, its suites from all evaluations together.

    A column is of the same weights, chat template or none, precision, seed and backend. RULER is put together by length
    and common sense by task; where a figure was measured twice, the one over more documents or samples is kept, of two
    alike the later, and the column's `repeated` names it. Where one model has several columns, `measured` tells them
    apart. GSM8K as another task, and perplexity of another text or in windows of another length, is no second
    measurement: the later ones of these stand in `further`, by suite.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for evaluation in evaluations:
        for result in evaluation["results"]:
            way = _way(evaluation["settings"], result)
            key = (_model(result), *way.values())
            known = found.get(key, {"suites": {}, "further": {}, "missing": {}, "repeated": [], "way": way})
            measured = {(name, *_asked(name, suite)): suite for name in SUITES for suite in measurements(known, name)}
            repeated = list(known["repeated"])
            for name, suite in result["suites"].items():
                asked = (name, *_asked(name, suite))
                measured[asked] = _together(name, measured[asked], suite, repeated) if asked in measured else suite
            suites, further = _by_suite(measured)
            missing = known["missing"] | result.get("missing", {})
            found[key] = (
                known
                | result
                | {
                    "suites": suites,
                    "further": further,
                    "missing": {name: why for name, why in missing.items() if name not in suites},
                    "repeated": list(dict.fromkeys(repeated)),
                    "way": way,
                }
            )
    results = list(found.values())
    for result in results:
        ways = [other["way"] for other in results if _model(other) == _model(result)]
        result["measured"] = ", ".join(
            words for name, words in result["way"].items() if len({way[name] for way in ways}) > 1
        )
    return results


def _model(result: Mapping[str, Any]) -> str:
    return str(result.get("weights_sha256", result["reference"]))


def _way(settings: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    """What a score depends on beside the model, in words."""
    return {
        "chat": "chat template" if settings["chat"] else "no chat template",
        "dtype": str(result["dtype"]).removeprefix("torch."),
        "seed": f"seed {settings['seed']}",
        "backend": str(settings.get("backend", "hf")),
    }


def _asked(name: str, suite: Suite) -> tuple[Any, ...]:
    """What two measurements of a suite must share to be of the same thing."""
    if name == "gsm8k":
        return (suite["task"],)
    return (suite["text"], suite["length"]) if name == "perplexity" else ()


def _by_suite(measured: Mapping[tuple[Any, ...], Suite]) -> tuple[dict[str, Suite], dict[str, list[Suite]]]:
    """The first measurement of each suite, and the others."""
    suites: dict[str, Suite] = {}
    further: dict[str, list[Suite]] = {}
    for (name, *_), suite in measured.items():
        if name in suites:
            further.setdefault(name, []).append(suite)
        else:
            suites[name] = suite
    return suites, further


def _together(name: str, known: Suite, other: Suite, repeated: list[str]) -> Suite:
    """Both measurements of one suite."""
    if name == "commonsense":
        return _commonsense(known, other, repeated)
    if name == "ruler":
        return _ruler(known, other, repeated)
    repeated.append({"gsm8k": "GSM8K"}.get(name, name))
    return other if _count(name, other) >= _count(name, known) else known


def _count(name: str, suite: Suite) -> int:
    if name == "gsm8k":
        return int(suite["exact_match"]["documents"])
    return sum(position["tokens"] for position in suite["positions"])


def _commonsense(known: Suite, other: Suite, repeated: list[str]) -> Suite:
    tasks = dict(known["tasks"])
    for name, score in other["tasks"].items():
        if name in tasks:
            repeated.append(name)
        if name not in tasks or score["documents"] >= tasks[name]["documents"]:
            tasks[name] = score
    missing = {name: why for name, why in (known["missing"] | other["missing"]).items() if name not in tasks}
    ordered = {name: tasks[name] for name in sorted(tasks)}
    return (
        known
        | other
        | {
            "tasks": ordered,
            "missing": missing,
            "mean": task_mean(ordered.values(), len(COMMONSENSE)),
        }
    )


def _ruler(known: Suite, other: Suite, repeated: list[str]) -> Suite:
    lengths, needles = _with_hashes(known), dict(known["needles"])
    for length, scores in _with_hashes(other).items():
        if length in lengths:
            repeated.append(f"RULER at {int(length):,}")
        if length not in lengths or _samples(scores) >= _samples(lengths[length]):
            lengths[length] = scores
            needles.pop(length, None)
            if length in other["needles"]:
                needles[length] = other["needles"][length]
    together = {name: value for name, value in (known | other).items() if name != "prompts_sha256"}
    return together | {
        "lengths": dict(sorted(lengths.items(), key=lambda item: int(item[0]))),
        "needles": needles,
        # A length that did not fit into memory once, and did another time, is not missing.
        "missing": {name: why for name, why in (known["missing"] | other["missing"]).items() if name not in lengths},
    }


def _with_hashes(suite: Suite) -> dict[str, dict[str, Any]]:
    """Its lengths, each with the hash of its prompts, or of all that were asked with them."""
    digest = {"prompts_sha256": suite["prompts_sha256"]} if "prompts_sha256" in suite else {}
    return {length: digest | scores for length, scores in suite["lengths"].items()}


def _samples(scores: Mapping[str, Any]) -> int:
    return sum(task["samples"] for task in scores["tasks"].values())
