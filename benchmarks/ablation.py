"""What each part of a recipe buys: variants of it at equal tokens, by KL over the tokens that they have seen.

python benchmarks/ablation.py --data corpus --gpus 0,1,2,3 --tokens 12000000 --name ablation-smollm2-h200

benchmarks/ablation.yaml names the variants: changes to the recipes of smollm2-135m. Each is carried out by
`hylo upcycle` in a process of its own, as many at once as there are GPUs. Tokens are those of stages 1 and 2 together,
which all variants have alike; those of a calibration come on top, and count where it is said how many a KL took.

Text is fresh, so the KL that a stage logs is that of unseen text. A variant has reached what the control ended with
where the mean of its last few logged values has; the control's end is read the same way. Final scores are of held-out
text.

The result is written again as each variant ends, and one that is there already is not made again: run the same
command once more after a stop. `--only` takes some variants, `--set` changes all of them.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, circumstances, write_result
from jobs import Job, last_line, run_jobs
from variants import changed, corpus_digest, read_yaml, shared_out

from hylo.distill.recipe import parse_recipe
from hylo.errors import HyLoError
from hylo.files import read_json, write_json

TABLE = Path(__file__).with_suffix(".yaml")
RECIPES = Path(__file__).resolve().parents[1] / "hylo" / "recipes" / "smollm2-135m"
# Logged values that are one reading: each is a mean over a hundredth of a stage.
TRAILING = 5
# Of both axes of the plot.
_TICKS = [m * 10.0**e for e in range(-2, 4) for m in (1, 1.5, 2, 3, 4, 6, 8)]
# Tokens seen, KL.
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Variant:
    """A recipe to be carried out, as its values."""

    name: str
    group: str
    says: dict[str, Any]
    recipe: dict[str, Any]


def read_table(path: Path, tokens: int, changes: Sequence[str]) -> tuple[dict[str, Any], list[Variant]]:
    """The table, and its variants with their tokens; `changes` come before a variant's own.

    Raises HyLoError where a change does not fit its recipe.
    """
    table = read_yaml(path)
    variants = []
    if lacking := [key for key in ("control", "reference", "variants") if key not in table]:
        raise HyLoError(f"{path} lacks {lacking[0]}; expected a table such as {TABLE}")
    for name, says in table["variants"].items():
        file = RECIPES / f"{says.get('recipe', table.get('recipe', 'hybrid'))}.yaml"
        values = changed(read_yaml(file), [*table.get("common", []), *changes, *says.get("set", [])])
        share = says.get("stage1", table.get("stage1"))
        values = shared_out(values, round(tokens * says.get("scale", 1)), share)
        variants.append(Variant(name, says["group"], says, values))
    return table, variants


def curve_of(seen: int, stages: Sequence[Sequence[Mapping[str, Any]]]) -> Curve:
    """KL by tokens seen, from the metrics of the stages of KL that follow `seen` tokens."""
    curve = []
    for metrics in stages:
        for entry in metrics:
            kl = entry.get("kl", entry["loss"])
            if kl is not None:
                curve.append((seen + entry["tokens"], kl))
        seen += metrics[-1]["tokens"] if metrics else 0
    return curve


def trailing(curve: Curve, count: int = TRAILING) -> Curve:
    """The mean of each value and those before it, `count` at most."""
    means = []
    for i, (tokens, _) in enumerate(curve):
        values = [kl for _, kl in curve[max(0, i + 1 - count) : i + 1]]
        means.append((tokens, sum(values) / len(values)))
    return means


def tokens_to_reach(curve: Curve, target: float, count: int = TRAILING) -> int | None:
    """Tokens after which the trailing mean is at most `target`; None where it never is."""
    means = trailing(curve, count)[min(count, len(curve)) - 1 :]
    return next((tokens for tokens, kl in means if kl <= target), None)


def measured(run: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a finished run says of itself."""
    steps = {path.parent.name: read_json(path) for path in run.glob("*/step.json")}
    tokens, kl_stages, rates = {}, [], {}
    calibration = steps.get("calibrate", {}).get("result", {}).get("tokens", 0)
    seen = calibration
    for stage in recipe["stages"]:
        logs = steps[stage["name"]]["result"]["logs"]
        tokens[stage["name"]] = logs[-1]["tokens"]
        # The first value holds compilation.
        rates[stage["name"]] = round(sum(log["tokens_per_s"] for log in logs[1:]) / max(1, len(logs) - 1), 1)
        if stage["objective"] == "kl":
            kl_stages.append(logs)
        else:
            seen += logs[-1]["tokens"]
    curve = curve_of(seen, kl_stages)
    return {
        "tokens": {"calibrate": calibration, **tokens},
        "seconds": {name: step["seconds"] for name, step in steps.items()},
        "tokens_per_s": rates,
        "curve": [[tokens, round(kl, 5)] for tokens, kl in curve],
        "last_kl": round(trailing(curve)[-1][1], 5),
        "scores": steps["evaluate"]["result"]["scores"],
    }


def compared(table: Mapping[str, Any], results: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each result with what it took to be where the control ended, once there is a control."""
    control = results.get(table["control"], {})
    if "last_kl" not in control:
        return dict(results)
    target, whole = control["last_kl"], control["curve"][-1][0]
    told = {}
    for name, result in results.items():
        told[name] = dict(result)
        if "curve" in result:
            reached = tokens_to_reach([(tokens, kl) for tokens, kl in result["curve"]], target)
            share = None if reached is None else round(reached / whole, 4)
            told[name]["reached_control"] = {"tokens": reached, "share_of_control": share}
    return told


def rows(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """For a terminal: a line a variant."""
    lines = [f"{'variant':<20} {'KL, training':>12} {'held-out':>9} {'tokens to the control':>30}"]
    for name, result in results.items():
        if "failed" in result:
            lines.append(f"{name:<20} {result['failed']}")
            continue
        reached = result.get("reached_control", {})
        share = reached.get("share_of_control")
        told = "not reached" if share is None else f"{reached['tokens']:,} ({share:.0%})"
        held_out = list(result["scores"].values())[-1]["kl"]
        lines.append(f"{name:<20} {result['last_kl']:>12.4f} {held_out:>9.4f} {told if reached else '':>30}")
    return lines


def plot(table: Mapping[str, Any], results: Mapping[str, dict[str, Any]], path: Path) -> None:
    """A panel a group, a line a variant, the control and the reference on each."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    drawn = {name: result for name, result in results.items() if "curve" in result}
    if not drawn:
        return
    always = [name for name in (table["control"], table["reference"]) if name in drawn]
    groups = list(dict.fromkeys(result["group"] for result in drawn.values()))
    columns = min(2, len(groups))
    figure = Figure(figsize=(6.4 * columns, 4.2 * math.ceil(len(groups) / columns)), layout="constrained")
    panels = figure.subplots(math.ceil(len(groups) / columns), columns, squeeze=False, sharex=True, sharey=True)
    for axes, group in zip(panels.flat, groups, strict=False):
        own = [name for name, result in drawn.items() if result["group"] == group and name not in always]
        for name in [*always, *own]:
            curve = trailing([(tokens, kl) for tokens, kl in drawn[name]["curve"]])
            style = {table["control"]: ("black", "--"), table["reference"]: ("black", "-")}.get(name, (None, "-"))
            points = [(tokens / 1e6, kl) for tokens, kl in curve]
            axes.plot(*zip(*points, strict=True), label=name, color=style[0], linestyle=style[1], linewidth=1.4)
        axes.set(title=group, xscale="log", yscale="log", xlabel="million tokens seen", ylabel="KL, nats a token")
        # The axes' own ticks are powers of ten, of which there are few.
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = [tick for tick in _TICKS if low <= tick <= high]
            axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    for axes in list(panels.flat)[len(groups) :]:
        axes.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with tokens/ and held-out/")
    parser.add_argument("--gpus", default="", help="as CUDA_VISIBLE_DEVICES names them; none: the CPU")
    parser.add_argument("--tokens", type=int, default=12_000_000, help="of stages 1 and 2 together")
    parser.add_argument("--only", help="variants, with commas")
    parser.add_argument(
        "--set", action="append", default=[], help="KEY=VALUE for all variants, such as base=model.gguf"
    )
    parser.add_argument("--table", type=Path, default=TABLE, help="of variants")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="folder for the runs")
    parser.add_argument("--keep", action="store_true", help="keep the weights of runs that ended")
    parser.add_argument("--name", default="ablation", help="of the result files")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    try:
        table, variants = read_table(arguments.table, arguments.tokens, arguments.set)
        names = [variant.name for variant in variants]
        wanted = arguments.only.split(",") if arguments.only else names
        if unknown := [name for name in wanted if name not in names]:
            raise HyLoError(f"no variant {unknown[0]!r}; expected some of {', '.join(names)}")
        chosen = {variant.name: variant for variant in variants if variant.name in wanted}
        for variant in chosen.values():
            parse_recipe(variant.recipe, variant.name)
    except HyLoError as error:
        sys.exit(f"error: {error}")
    for part in ("tokens", "held-out"):
        if not (arguments.data / part).is_dir():
            sys.exit(f"error: {arguments.data} holds no folder {part}; expected what corpus.py packs")
    corpus = corpus_digest(arguments.data)
    folders = {name: arguments.runs.absolute() / name for name in names}
    gpus = [gpu for gpu in arguments.gpus.split(",") if gpu]
    results: dict[str, dict[str, Any]] = {}
    for variant in variants:
        file = folders[variant.name] / "result.json"
        found = read_json(file) if file.is_file() else {"failed": "not made"}
        if "failed" not in found and (found["recipe"], found.get("corpus")) == (variant.recipe, corpus):
            results[variant.name] = found

    def write() -> dict[str, dict[str, Any]]:
        told = compared(table, {name: results[name] for name in names if name in results})
        settings = {"tokens": arguments.tokens, "set": arguments.set, "gpus": len(gpus)}
        roles = {key: table[key] for key in ("control", "reference")}
        whole = circumstances() | {"settings": settings} | roles | {"trailing": TRAILING, "variants": told}
        write_result(arguments.output / f"{arguments.name}.json", whole)
        plot(table, told, arguments.output / f"{arguments.name}.png")
        return told

    def ended(job: Job, code: int, seconds: float) -> None:
        variant = chosen[job.name]
        result = {"group": variant.group, "says": variant.says, "recipe": variant.recipe, "command": "hylo upcycle"}
        result["corpus"] = corpus
        result["wall_s"] = round(seconds, 1)
        if code:
            result["failed"] = f"exit code {code}: {last_line(job.log)}"
        else:
            result |= measured(folders[job.name] / "run", variant.recipe)
        write_json(folders[job.name] / "result.json", result)
        results[job.name] = result
        if not code and not arguments.keep:
            for weights in (folders[job.name] / "run").rglob("*.safetensors"):
                weights.unlink()
        print("\n".join(rows(write())), flush=True)

    jobs = []
    for name in chosen:
        if name in results:
            print(f"{name}: there already")
            continue
        folder = folders[name]
        file, text = folder / "recipe.yaml", folder / "corpus.txt"
        if file.is_file() and (read_yaml(file), text.is_file() and text.read_text()) != (chosen[name].recipe, corpus):
            # Made by another table, or from other text.
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text.write_text(corpus)
        file.write_text(yaml.safe_dump(chosen[name].recipe, sort_keys=False))
        command = [sys.executable, "-m", "hylo", "upcycle", str(file), "--output", str(folder / "run")]
        jobs.append(Job(name, command, folder / "log.txt", arguments.data.absolute()))
    run_jobs(jobs, gpus, ended)
    print("\n".join(rows(write())))
    if any("failed" in results[name] for name in chosen):
        sys.exit(1)


if __name__ == "__main__":
    main()
