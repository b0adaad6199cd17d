"""The report of a run: JSON with everything, a table for the terminal, a plot."""

import importlib.metadata
import os
import platform
import re
import resource
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig

from hylo.config import HyLoConfig
from hylo.distill.recipe import Recipe
from hylo.files import write_json
from hylo.upcycle.bases import Base
from hylo.upcycle.convert import DTYPES
from hylo.upcycle.layout import format_layout


def environment() -> dict[str, Any]:
    """Hardware and versions, to stand beside every measured number."""
    packages = ("hylo", "torch", "transformers", "accelerate", "numpy")
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "cores": os.cpu_count(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def installed_version(package: str) -> str | None:
    """None where the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def write_report(
    folder: Path,
    recipe: Recipe,
    steps: Mapping[str, Mapping[str, Any]],
    model_folder: Path,
    base_folder: Path,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Writes `report.json` and `report.png` into `folder`. Returns the report.

    Args:
        steps: each step's `step.json`.
        dtype: of the matrix products that the scores were computed with.
    """
    with Base.open(base_folder) as base:
        base_parameters = base.parameters
    config = AutoConfig.from_pretrained(model_folder)
    assert isinstance(config, HyLoConfig)
    element = DTYPES[recipe.save_dtype].itemsize
    evaluation = steps["evaluate"]["result"]
    report = {
        "base": recipe.base,
        "layout": format_layout(config.token_mixers or []),
        "token_mixers": config.token_mixers,
        "mixer_geometry": config.mixer_geometry,
        "parameters": steps["convert" if recipe.student is None else "student"]["result"]["parameters"],
        "base_parameters": base_parameters,
        "cache_bytes_per_token": config.cache_bytes(1, element),
        "base_cache_bytes_per_token": config.base_cache_elements_per_token * element,
        "cache_ratio": config.cache_elements_per_token / config.base_cache_elements_per_token,
        "state_bytes_per_sequence": config.state_bytes(element),
        "evaluation": {"tokens": evaluation["tokens"], "documents": evaluation["documents"], "compute": str(dtype)},
        "scores": evaluation["scores"],
        "samples": evaluation["samples"],
        "prompt": recipe.evaluation.prompt,
        "seconds": {name: step["seconds"] for name, step in steps.items()},
        "training": {
            stage.name: steps[stage.name]["result"] | {"objective": stage.objective} for stage in recipe.stages
        },
        "recipe": recipe.model_dump(),
        "environment": environment(),
    }
    write_json(folder / "report.json", report)
    plot_report(report, folder / "report.png")
    return report


def report_table(report: Mapping[str, Any]) -> Table:
    """What a reader wants first: sizes, and the scores of each step."""
    tokens = report["evaluation"]["tokens"]
    teacher = report["recipe"]["teacher"] or "the base"
    table = Table(
        title=f"{report['base']} as {report['layout']}, on {tokens:,} held-out tokens",
        caption=f"KL(teacher‖student) a token, and how often both put the same token first; the teacher is {teacher}",
    )
    for column, justify in (
        ("", "left"),
        ("parameters", "right"),
        ("cache, bytes/token", "right"),
        ("perplexity", "right"),
        ("KL, nats", "right"),
        ("top-1", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    labels = row_labels(report)
    for name, scores in report["scores"].items():
        base = name == "base"
        cache = report["base_cache_bytes_per_token"] if base else report["cache_bytes_per_token"]
        share = "" if base else f" ({report['cache_ratio']:.1%})"
        table.add_row(
            labels[name],
            f"{report['base_parameters'] if base else report['parameters']:,}",
            f"{cache:,}{share}",
            f"{scores['perplexity']:,.2f}",
            f"{scores['kl']:.3f}",
            f"{scores['agreement']:.1%}",
        )
    return table


def row_labels(report: Mapping[str, Any]) -> dict[str, str]:
    """How each scored checkpoint is called."""
    names = {"base": "base", "student": "the student given", "convert": "converted", "calibrate": "calibrated"}
    return {name: names.get(name, f"after {name}") for name in report["scores"]}


def plot_report(report: Mapping[str, Any], path: Path) -> None:
    """One picture: the layer map, KL and perplexity after each step, and the loss of each stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stages = report["training"]
    colors = {"attention": "#8a8a8a", "mla": "#d1495b", "gdn": "#2a6f97"}
    figure = plt.figure(figsize=(12, 3.6 + 3.2 * bool(stages)), layout="constrained")
    grid = figure.add_gridspec(2 + bool(stages), 1, height_ratios=[0.35, 3, 3][: 2 + bool(stages)])

    layers = figure.add_subplot(grid[0])
    mixers = report["token_mixers"]
    for i, name in enumerate(mixers):
        layers.add_patch(plt.Rectangle((i, 0), 0.92, 1, color=colors.get(name, "#e9c46a")))
    for name in dict.fromkeys(mixers):
        layers.plot([], [], "s", color=colors.get(name, "#e9c46a"), label=f"{name} × {mixers.count(name)}")
    layers.set(xlim=(0, len(mixers)), ylim=(0, 1), yticks=[])
    layers.set_xticks([i + 0.46 for i in range(len(mixers))], [str(i) for i in range(len(mixers))], fontsize=7)
    layers.legend(loc="lower right", bbox_to_anchor=(1, 1.02), ncols=4, frameon=False, fontsize=8)
    ratio = report["cache_ratio"]
    layers.set_title(
        f"{report['base']} as {report['layout']}: cache {ratio:.1%} of the base's", loc="left", fontsize=11
    )
    layers.spines[:].set_visible(False)

    scores, labels = report["scores"], row_labels(report)
    names = list(scores)
    middle = grid[1].subgridspec(1, 3)
    for column, (key, title, scale) in enumerate(
        (
            ("kl", "KL(teacher‖student), nats a token", 1),
            ("perplexity", "perplexity", 1),
            ("agreement", "top-1 agreement, %", 100),
        )
    ):
        axes = figure.add_subplot(middle[column])
        values = [scores[name][key] * scale for name in names]
        bars = axes.bar(range(len(names)), values, color=["#8a8a8a"] + ["#2a6f97"] * (len(names) - 1))
        axes.bar_label(bars, [f"{value:,.2f}" if value < 100 else f"{value:,.0f}" for value in values], fontsize=8)
        axes.set_xticks(range(len(names)), [labels[name].replace(" ", "\n") for name in names], fontsize=8)
        axes.set_title(title, fontsize=10)
        if key == "perplexity":
            axes.set_yscale("log")
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)

    if stages:
        bottom = grid[2].subgridspec(1, len(stages))
        for column, (name, stage) in enumerate(stages.items()):
            axes = figure.add_subplot(bottom[column])
            axes.plot([log["tokens"] for log in stage["logs"]], [log["loss"] for log in stage["logs"]], color="#d1495b")
            what = "KL, nats a token" if stage["objective"] == "kl" else "layerwise loss"
            axes.set_title(f"{name}: {what} while training", fontsize=10)
            axes.set_xlabel("tokens", fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
