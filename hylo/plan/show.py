"""A plan for people: the layer map drawn, and tables."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from hylo.mixers import mixer_class
from hylo.plan.quantities import format_gib, format_tokens

# By mixer: the letter it can be told by without colour, and the colour.
_CELLS = {
    "attention": ("A", "red"),
    "mla": ("M", "blue"),
    "gdn": ("G", "green"),
    "mamba2": ("2", "dark_orange3"),
    "kda": ("K", "magenta"),
}
_LAYERS_A_LINE = 16


def layer_map(layers: Sequence[str]) -> Text:
    """One cell a layer, sixteen a line with the first one's index; then what the letters mean."""
    drawn = Text()
    for start in range(0, len(layers), _LAYERS_A_LINE):
        drawn.append(f"{start:>4}  ", style="dim")
        for name in layers[start : start + _LAYERS_A_LINE]:
            drawn.append_text(_cell(name)).append(" ")
        drawn.append("\n")
    drawn.append("      ")
    for name in dict.fromkeys(layers):
        count = list(layers).count(name)
        drawn.append_text(_cell(name)).append(f" {count} {mixer_class(name).block}   ")
    return drawn


def _cell(name: str) -> Text:
    letter, colour = _CELLS.get(name, ("?", "white"))
    return Text(f" {letter} ", style=f"bold white on {colour}")


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def counts_table(plan: dict[str, Any]) -> Table:
    """The hybrid's sizes beside the base's."""
    table = _table(("", plan["name"], "base"))
    table.add_row("parameters, as saved", f"{plan['parameters']:,}", f"{plan['base_parameters']:,}")
    table.add_row("parameters, head apart", f"{plan['parameters_untied']:,}", "")
    cache, base_cache = plan["kv_cache_bytes_per_token"], plan["base_kv_cache_bytes_per_token"]
    table.add_row("cache, bytes a token", f"{cache:,}", f"{base_cache:,}")
    table.add_row("cache, of the base's", f"{plan['kv_cache_ratio']:.1%}", "")
    table.add_row("state, bytes a sequence", f"{plan['state_bytes_per_sequence']:,}", "0")
    return table


def memory_table(rows: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """One line an estimate: its parts and their sum in GiB, and whether it fits where that was asked."""
    parts = list(rows[0][1]["bytes"])
    judged = ["fits"] if rows[0][1]["fits"] is not None else []
    table = _table(("", *parts, "total", *judged))
    for name, estimate in rows:
        sizes = [*estimate["bytes"].values(), estimate["total_bytes"]]
        verdict = Text("yes", style="green") if estimate["fits"] else Text("no", style="red")
        table.add_row(name, *map(format_gib, sizes), *([verdict] if judged else []))
    return table


def what_to_change(rows: Sequence[tuple[str, dict[str, Any]]]) -> list[Text]:
    """A line for each change that would make an estimate fit which does not."""
    lines = []
    for name, estimate in rows:
        if estimate["fits"] is False:
            found = estimate["change"]
            lines.append(
                Text(f"{name} does not fit" + ("; any of these would do:" if found else ", and no one change helps"))
            )
            lines += [Text(f"  {change}") for change in found]
    return lines


def plan_view(plan: dict[str, Any]) -> Group:
    """All of it."""
    parts: list[Any] = [counts_table(plan), Text(), layer_map(plan["layers"])]
    parts += [Text(), *_serving_view(plan["inference"])]
    if "training" in plan:
        parts += [Text(), *_training_view(plan["training"])]
    return Group(*parts)


def _serving_view(serving: dict[str, Any]) -> list[Any]:
    rows = []
    for estimate in serving["contexts"]:
        length = format_tokens(estimate["context"])
        rows += [(length, estimate["hybrid"]), (f"{length}, base", estimate["base"])]
    title = f"memory to serve {serving['batch']} x context, GiB {_on(serving)}"
    parts = [Text(title, style="bold"), memory_table(rows), *what_to_change(rows)]
    if "longest_context" in serving:
        hybrid, base = (_tokens(serving["longest_context"][name]) for name in ("hybrid", "base"))
        parts.append(Text(f"longest context that fits, in tokens: {hybrid}; base: {base}"))
    return parts


def _training_view(training: dict[str, Any]) -> list[Any]:
    rows = [(stage["name"], stage) for stage in training["stages"]]
    title = f"memory to train, GiB {_on(training)}"
    return [Text(title, style="bold"), memory_table(rows), *what_to_change(rows), Text(), *_time_view(training)]


def _time_view(training: dict[str, Any]) -> list[Any]:
    table = _table(("", "tokens", "PFLOP", "hours"))
    for stage in training["stages"]:
        table.add_row(stage["name"], f"{stage['tokens']:,}", f"{stage['flops'] / 1e15:,.1f}", _hours(stage["hours"]))
    total = sum(stage["hours"] for stage in training["stages"])
    if len(training["stages"]) > 1:
        table.add_row("together", "", "", _hours(total))
    count = "one" if training["gpus"] == 1 else str(training["gpus"])
    title = f"time to train on {count} {training['gpu']}, {training['mfu']:.0%} of the peak used"
    return [Text(title, style="bold"), table]


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours < 10 else f"{hours:,.0f}"


def _on(setup: dict[str, Any]) -> str:
    return "on one GPU" if setup["gpus"] == 1 else f"on each of {setup['gpus']} GPUs; {setup['assumes']}"


def _tokens(tokens: int | None) -> str:
    return "any" if tokens is None else f"{tokens:,}"
