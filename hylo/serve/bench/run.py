"""Measures a hybrid and its base one after the other, each in a process of its own; writes what was found."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.evaluate.report import environment
from hylo.files import read_json, write_json
from hylo.plan.quantities import format_tokens
from hylo.plan.source import read_config
from hylo.serve.bench.measure import Plan
from hylo.serve.launch import check_installed
from hylo.serve.parallel import check_parallel

# Of an error that is vLLM's, in characters.
LONGEST_MESSAGE = 300


def bench(plan: Plan, base: str | None, output: Path, limit_s: float | None = None) -> dict[str, Any]:
    """Measures `plan.model`, then `base` likewise, into `output`/bench.json and bench.png.

    Args:
        limit_s: seconds for each, after which what is known by then is taken; without a limit by default.

    Raises:
        HyLoError: bad input, before anything is started; or vLLM's own last word where it fails, its log kept.
    """
    check_installed()
    models = {"model": plan.model} | ({"base": base} if base is not None else {})
    for name in models.values():
        config = read_config(name)
        if isinstance(config, HyLoConfig):
            check_parallel(config, plan.gpus)
    if output.exists() and not output.is_dir():
        raise HyLoError(f"{output} is a file; expected a folder")
    output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"environment": environment()}
    for role, name in models.items():
        result[role] = _measured(replace(plan, model=name), output / f"{role}.log", limit_s)
        write_json(output / "bench.json", result)
    from hylo.serve.bench.plot import draw

    draw(result, output / "bench.png")
    return result


def _measured(plan: Plan, log: Path, limit_s: float | None) -> dict[str, Any]:
    """One model, in a new process: what the other left in the GPU's memory is gone with it.

    What is known is written beside the log as it comes, and stays there if the rest fails.
    """
    asked, found = log.with_suffix(".plan.json"), log.with_suffix(".json")
    found.unlink(missing_ok=True)
    write_json(asked, asdict(plan))
    command = [sys.executable, "-m", "hylo.serve.bench.measure", str(asked), str(found)]
    stopped: dict[str, Any] = {}
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, check=False, timeout=limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            code, stopped = 0, {"stopped_after_s": limit_s}
    if code or not found.is_file():
        raise HyLoError(f"{plan.model}: {_last_words(log.read_text(errors='replace'))} ({log})")
    return read_json(found) | stopped


def _last_words(log: str) -> str:
    """The last error in vLLM's log, with the line after it, which may hold the reason."""
    lines = [line.strip() for line in log.splitlines()]
    errors = [i for i, line in enumerate(lines) if "Error: " in line]
    if not errors:
        return "vLLM ended without a result"
    said = " ".join(lines[errors[-1] : errors[-1] + 2])
    return said if len(said) <= LONGEST_MESSAGE else f"{said[:LONGEST_MESSAGE]}…"


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """For people: one row a quantity, with the base's beside it and how many times better the hybrid is."""
    model, base = result["model"], result.get("base")
    rows = [_row("cache, tokens", model["cache_tokens"], base and base["cache_tokens"], more_is_better=True)]
    theirs = {row["context"]: row for row in base["contexts"]} if base else {}
    for ours in model["contexts"]:
        context = ours["context"]
        other = theirs.get(context)
        for key, name in (("ttft_s", "TTFT, s"), ("tpot_ms", "TPOT, ms")):
            rows.append(_row(f"{name} at {format_tokens(context)}", ours.get(key), other and other.get(key)))
    if "load" in model:
        load = model["load"]
        other = base["load"] if base else None
        name = f"tokens/s, {format_tokens(load['context'])} + {format_tokens(load['answer'])}"
        key = "output_tokens_per_s"
        rows.append(_row(name, load.get(key), other and other.get(key), more_is_better=True))
    return rows


def _row(name: str, ours: float | None, theirs: float | None, *, more_is_better: bool = False) -> list[str]:
    times = ""
    if ours and theirs:
        times = f"{ours / theirs if more_is_better else theirs / ours:.2f}×"
    return [name, *("" if value is None else f"{value:,}" for value in (ours, theirs)), times]
