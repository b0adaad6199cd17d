"""Draws what `hylo bench` measured: time to the first token, and from token to token, over the length of the prompt."""

from pathlib import Path
from typing import Any

from hylo.plan.quantities import format_tokens


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG: both curves of both models, and bars of capacity and throughput."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    roles: list[str] = [role for role in ("model", "base") if role in result]
    names: dict[str, str] = {role: Path(result[role]["plan"]["model"]).name for role in roles}
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.6), width_ratios=(3, 3, 1.4, 1.4))
    for axis, key, label in ((axes[0], "ttft_s", "time to first token, s"), (axes[1], "tpot_ms", "time a token, ms")):
        ticks: set[int] = set()
        for role in roles:
            rows = [row for row in result[role]["contexts"] if row.get(key) is not None]
            ticks |= {row["context"] for row in rows}
            axis.plot([row["context"] for row in rows], [row[key] for row in rows], marker="o", label=names[role])
        axis.set_xscale("log", base=2)
        if key == "ttft_s":
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_xticks(sorted(ticks), [format_tokens(tick) for tick in sorted(ticks)])
        axis.minorticks_off()
        axis.set(xlabel="prompt, tokens", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    _bars(axes[2], roles, names, [result[role]["cache_tokens"] for role in roles], "cache, tokens")
    loads = [result[role].get("load", {}).get("output_tokens_per_s") or 0 for role in roles]
    _bars(axes[3], roles, names, loads, "under load, tokens/s")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(axis: Any, roles: list[str], names: dict[str, str], values: list[float], label: str) -> None:
    bars = axis.bar([names[role] for role in roles], values, color=[f"C{i}" for i in range(len(roles))])
    axis.bar_label(bars, labels=[f"{value:,.0f}" for value in values], fontsize=8)
    axis.tick_params(axis="x", labelrotation=20, labelsize=8)
    axis.set(ylabel=label)
