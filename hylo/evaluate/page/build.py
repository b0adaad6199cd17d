"""Puts a page together, section by section. A section without anything to show is left out."""

import html
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hylo.evaluate.measures import measurements
from hylo.evaluate.page.charts import COLORS, Line, check_plots, line_plot, shade, tokens_label
from hylo.evaluate.page.sources import Run, Sources, read_sources
from hylo.evaluate.published import PUBLISHED, SOURCE
from hylo.evaluate.report import row_labels
from hylo.evaluate.ruler.tasks import TASKS
from hylo.evaluate.show import missing_lines, model_name, notes, score_rows, table_rows
from hylo.version import __version__

MIXER_COLORS = {
    "attention": "#6d7780",
    "mla": "#b53a3a",
    "gdn": "#17609c",
    "kda": "#2c7f76",
    "mamba2": "#8a6414",
}
_SHORT = {"attention": "ATT", "mla": "MLA", "gdn": "GDN", "kda": "KDA", "mamba2": "M2"}
_DEPTH_BINS = 10
# About, on a phone: of its screen, of a letter, of the space around a cell.
_PHONE_PIXELS, _PIXELS_A_LETTER, _PIXELS_A_CELL = 345, 7.5, 11
_CONTEXTS = (8192, 32768, 131072, 1048576)

Section = Callable[[Sources], str]


def report_page(places: Sequence[Path], title: str | None = None) -> str:
    """One self-contained HTML page of runs and results.

    Raises HyLoError where a place is neither, or matplotlib is missing.
    """
    check_plots()
    sources = read_sources(places)
    sections: tuple[Section, ...] = (
        _layers,
        _memory,
        _steps,
        _losses,
        _scores,
        _ruler,
        _needles,
        _perplexity,
        _samples,
        _circumstances,
    )
    style = (resources.files("hylo") / "evaluate" / "page" / "style.css").read_text()
    head = _escape(title or _title(sources))
    body = "\n".join(part for part in (_tiles(sources), *(section(sources) for section in sections)) if part)
    return (
        "<!doctype html>\n"
        f'<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{head}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<h1>{head}</h1>\n<p class=note>{_escape(_subtitle(sources))}</p>\n{body}\n</body>\n</html>\n"
    )


# Pieces of HTML.


def _escape(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, *parts: str) -> str:
    content = [part for part in parts if part]
    return f"<section>\n<h2>{_escape(title)}</h2>\n" + "\n".join(content) + "\n</section>" if content else ""


def _figure(svg: str, text: str) -> str:
    return f"<figure>{svg}<figcaption>{_escape(text)}</figcaption></figure>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], note: str = "", kind: str = "plain") -> str:
    """Cells are HTML already; a row whose label begins with `mean` is set apart."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body, rows = "", list(rows)
    for row in rows:
        mark = " class=mean" if row[0].startswith("mean") else ""
        body += f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n"
    words = f"<p class=note>{_escape(note)}</p>" if note else ""
    rows_html = f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody>"
    return f"{words}{_scroll([header, *rows], kind)}<table class={kind}>{rows_html}</table></div>"


def _scroll(rows: Sequence[Sequence[str]], kind: str) -> str:
    """What holds a table. One that is likely wider than a phone says there that it can be moved sideways."""
    width = 0.0
    for i, column in enumerate(zip(*rows, strict=True)):
        texts = [re.sub(r"<[^>]*>", " ", cell) for cell in column]
        if kind == "scores":
            # There these break between words.
            breaking = texts if i == 0 else texts[:1]
            texts = [*(word for text in breaking for word in text.split()), *texts[len(breaking) :]]
        width += max(map(len, texts), default=0) * _PIXELS_A_LETTER + _PIXELS_A_CELL
    return f'<div class="scroll{" wide" if width > _PHONE_PIXELS else ""}">'


def _heat(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Shares from 0 to 1 as coloured percentages; the number is always written."""
    lines = []
    for label, shares in rows:
        cells = ""
        for share in shares:
            if share is None:
                cells += "<td></td>"
                continue
            background, ink = shade(share)
            cells += f'<td style="background:{background};color:{ink}">{100 * share:.0f}</td>'
        lines.append(f"<tr><td>{_escape(label)}</td>{cells}</tr>")
    head = "".join(f"<th>{_escape(column)}</th>" for column in (corner, *columns))
    texts = [[corner, *columns], *([label, *("100" for _ in shares)] for label, shares in rows)]
    return (
        f"{_scroll(texts, 'heat')}<table class=heat><thead><tr>{head}</tr></thead><tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if count >= 100 or unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError(count)


# What the sections read.


def _hybrid(sources: Sources) -> dict[str, Any] | None:
    """Layout, cache and parameters of the hybrid, from a run's report or from a result."""
    for run in sources.runs:
        if run.report is not None:
            return run.report
    return next((result for result in sources.results if result.get("layout")), None)


def _title(sources: Sources) -> str:
    hybrid = _hybrid(sources)
    if hybrid is not None:
        base = hybrid.get("base") or hybrid.get("base_model") or hybrid["reference"]
        return f"{str(base).removeprefix('package:')} as {hybrid['layout']}"
    if sources.results:
        return " and ".join(dict.fromkeys(Path(result["reference"]).name for result in sources.results))
    return " and ".join(run.name for run in sources.runs)


def _subtitle(sources: Sources) -> str:
    reports = [run.report for run in sources.runs if run.report is not None]
    where = [item["environment"] for item in (*reports, *sources.evaluations)]
    parts = dict.fromkeys(f"{place['date']}, {place['device']}" for place in where)
    return "; ".join([*parts, f"hylo {__version__}"])


def _tiles(sources: Sources) -> str:
    tiles: list[tuple[str, str]] = []
    hybrid = _hybrid(sources)
    if hybrid is not None:
        share = hybrid["cache_bytes_per_token"] / hybrid["base_cache_bytes_per_token"]
        tiles.append((f"{share:.1%}", "cache, of the base's"))
        if hybrid.get("parameters"):
            tiles.append((f"{hybrid['parameters'] / 1e6:,.0f}M", "parameters"))
    for run in sources.runs:
        if run.report is not None:
            last = list(run.report["scores"].values())[-1]
            tiles.append((f"{last['kl']:.2f}", "KL to the teacher, nats a token"))
            tiles.append((f"{last['agreement']:.0%}", "top-1 agreement"))
    # A base's scores are no hybrid's.
    scored = [result for result in sources.results if hybrid is None or result.get("layout")]
    for result in scored[:1]:
        for (suite, label, metric), (value, _, _) in score_rows(result):
            if label.startswith("mean of"):
                tiles.append((f"{value:.1f}", f"common sense, {label}"))
            elif suite == "ruler":
                tiles.append((f"{value:.1f}", label))
            elif metric == "perplexity":
                tiles.append((f"{value:.1f}", "perplexity"))
    if not tiles:
        return ""
    inner = "".join(f"<div class=tile><b>{_escape(a)}</b><span>{_escape(b)}</span></div>" for a, b in tiles[:8])
    return f"<div class=tiles>{inner}</div>"


# The sections.


def _layers(sources: Sources) -> str:
    hybrid = _hybrid(sources)
    if hybrid is None or not hybrid.get("token_mixers"):
        return ""
    mixers = hybrid["token_mixers"]
    cells = "".join(
        f'<i style="background:{MIXER_COLORS.get(name, "#444444")}">{_escape(_SHORT.get(name, name))}'
        f"<small>{i}</small></i>"
        for i, name in enumerate(mixers)
    )
    kinds = dict.fromkeys(mixers)
    legend = "".join(
        f'<span><i style="background:{MIXER_COLORS.get(name, "#444444")}"></i>'
        f"{mixers.count(name)} × {_escape(_MEANING.get(name, name))}</span>"
        for name in kinds
    )
    return _section(
        "Layers", f"<div class=layers>{cells}</div><div class=legend>{legend}</div>", _geometry(hybrid, list(kinds))
    )


_MEANING = {
    "attention": "attention, kept",
    "mla": "Multi-Head Latent Attention",
    "gdn": "Gated DeltaNet",
    "kda": "Kimi Delta Attention",
    "mamba2": "Mamba-2",
}


def _geometry(hybrid: dict[str, Any], kinds: list[str]) -> str:
    sizes = hybrid.get("mixer_geometry") or {}
    lines = []
    for name in kinds:
        if not sizes.get(name):
            continue
        values = {key: value for key, value in sizes[name].items() if not isinstance(value, list | dict)}
        words = ", ".join(f"{key} {value}" for key, value in values.items())
        lines.append(f"<p class=note>{_escape(_SHORT.get(name, name))}: {_escape(words)}</p>")
    return "".join(lines)


def _memory(sources: Sources) -> str:
    hybrid = _hybrid(sources)
    if hybrid is None:
        return ""
    ours, base = hybrid["cache_bytes_per_token"], hybrid["base_cache_bytes_per_token"]
    state = hybrid["state_bytes_per_sequence"]
    rows = [
        [
            tokens_label(context),
            _size(base * context),
            _size(ours * context + state),
            f"{_ratio(ours, base, state, context)}",
        ]
        for context in _CONTEXTS
    ]
    contexts = [2**power for power in range(10, 21)]
    plot = line_plot(
        "memory",
        [
            Line("hybrid, cache and state", contexts, [(ours * c + state) / 2**20 for c in contexts]),
            Line("base, cache", contexts, [base * c / 2**20 for c in contexts], color=COLORS[1]),
        ],
        x_label="tokens of one sequence",
        y_label="MiB",
        lengths=True,
        log_y=True,
    )
    facts = (
        f"{ours:,} bytes a token against {base:,}, and {_size(state)} of state a sequence, whatever its length "
        "(16-bit values, states in float32)."
    )
    return _section(
        "Cache and memory against the base",
        f"<p>{_escape(facts)}</p>",
        "<div class=charts>",
        _figure(plot, "What one sequence keeps in memory beside the weights."),
        _table(["tokens", "base", "hybrid", "times less"], rows),
        "</div>",
    )


def _ratio(ours: float, base: float, state: float, context: int) -> str:
    return f"{base * context / (ours * context + state):.1f}"


def _steps(sources: Sources) -> str:
    parts = []
    for run in sources.runs:
        if run.report is None:
            continue
        labels, rows = row_labels(run.report), []
        for name, scores in run.report["scores"].items():
            rows.append(
                [
                    _escape(labels[name]),
                    f"{scores['perplexity']:,.2f}",
                    f"{scores['kl']:.3f}",
                    f"{scores['agreement']:.1%}",
                ]
            )
        tokens = run.report["evaluation"]["tokens"]
        note = f"{run.name}: on {tokens:,} held-out tokens; KL(teacher‖model) in nats a token"
        parts.append(_table(["", "perplexity", "KL", "top-1"], rows, note))
    return _section("After each step", *parts)


def _losses(sources: Sources) -> str:
    figures = []
    for number, run in enumerate(sources.runs):
        objectives = {stage["name"]: stage["objective"] for stage in run.recipe["stages"]}
        for name, lines in run.losses.items():
            if not lines:
                continue
            what = "KL, nats a token" if objectives.get(name) == "kl" else "loss of all layers"
            x, y = [line["tokens"] for line in lines], [line["loss"] for line in lines]
            smooth, over = _running_mean(y)
            plot = line_plot(
                f"loss-{number}-{name}",
                [Line("each", x, y, alpha=0.35), Line(f"mean over {over}", x, smooth)]
                if over > 1
                else [Line(name, x, y)],
                x_label="tokens",
                y_label=what,
            )
            figures.append(_figure(plot, f"{run.name}, {name}: {objectives.get(name)}, {lines[-1]['tokens']:,} tokens"))
    return _section("Loss while training", "<div class=charts>", *figures, "</div>") if figures else ""


def _running_mean(values: Sequence[float]) -> tuple[list[float], int]:
    """Of each value and those before it, over a tenth of all; and over how many."""
    over = max(1, len(values) // 10)
    return [statistics.fmean(values[max(0, i + 1 - over) : i + 1]) for i in range(len(values))], over


def _scores(sources: Sources) -> str:
    results = sources.results
    if not results:
        return ""
    rows = []
    for (_, label, metric), number, cells in table_rows(results):
        how = ", ".join(filter(None, (metric, f"n {number}" if number else "")))
        rows.append([f"{_escape(label)}<small>{_escape(how)}</small>", *map(_escape, cells)])
    table = _table(["", *(_escape(model_name(result)) for result in results)], rows, kind="scores")
    warning = "".join(f"<p class=missing>{_escape(line)}</p>" for line in missing_lines({"results": results}))
    header = ["published", "cache", "common sense", "GSM8K", *(f"RULER {tokens_label(n)}" for n in PUBLISHED[0].ruler)]
    published = [
        [
            _escape(model.name),
            f"{model.cache} %",
            f"{model.commonsense}",
            f"{model.gsm8k}",
            *(f"{value}" for value in model.ruler.values()),
        ]
        for model in PUBLISHED
    ]
    note = f"HyLo, {SOURCE}: other bases and far more training; mean of 7 tasks, and of RULER's 13"
    return _section(
        "Scores",
        table,
        "".join(f"<p class=note>{_escape(line)}</p>" for line in notes(results)),
        warning,
        _table(header, published, note),
    )


def _with(sources: Sources, suite: str) -> list[dict[str, Any]]:
    return [result for result in sources.results if suite in result["suites"]]


def _ruler(sources: Sources) -> str:
    results = [result for result in _with(sources, "ruler") if result["suites"]["ruler"]["lengths"]]
    if not results:
        return ""
    lines, heats = [], []
    for i, result in enumerate(results):
        by_length = result["suites"]["ruler"]["lengths"]
        lengths = sorted(map(int, by_length))
        means = [by_length[str(length)]["mean"] for length in lengths]
        lines.append(
            Line(
                model_name(result),
                lengths,
                [100 * mean["value"] for mean in means],
                [100 * mean["stderr"] if mean["stderr"] is not None else None for mean in means],
                COLORS[i % len(COLORS)],
            )
        )
        tasks = [task for task in TASKS if any(task in scores["tasks"] for scores in by_length.values())]
        rows: list[tuple[str, Sequence[float | None]]] = [
            (task, [_value(by_length[str(length)]["tasks"].get(task)) for length in lengths]) for task in tasks
        ]
        rows.append((_mean_label(means), [mean["value"] for mean in means]))
        heat = _heat("", [tokens_label(n) for n in lengths], rows)
        heats.append(f"<div><h3>{_escape(model_name(result))}</h3>{heat}</div>")
    if all(len(line.x) == 1 for line in lines):
        # One point is no curve.
        return _section("RULER", "<div class=side>", *heats, "</div>")
    longest = max(max(line.x) for line in lines)
    drawn = False
    for model in PUBLISHED:
        reached = [length for length in model.ruler if length <= 2 * longest]
        # Of another base it says nothing here.
        if reached and any(model.is_of(reference) for reference in _references(sources)):
            values = [model.ruler[length] for length in reached]
            lines.append(Line(model.name, reached, values, None, COLORS[len(lines) % len(COLORS)], True))
            drawn = True
    name = _mean_label([one["mean"] for result in results for one in result["suites"]["ruler"]["lengths"].values()])
    plot = line_plot(
        "ruler", lines, x_label="tokens, prompt and answer", y_label=f"{name}, %", lengths=True, percent=True
    )
    words = "Mean over the tasks by length, in percent, with one standard error."
    words += f" Dashed: published, {SOURCE}, of RULER-13." if drawn else ""
    return _section("RULER", "<div class=charts>", _figure(plot, words), "</div>", "<div class=side>", *heats, "</div>")


def _references(sources: Sources) -> list[str]:
    """What the models and their bases are called."""
    hybrid = _hybrid(sources) or {}
    names = [hybrid.get("base"), hybrid.get("base_model"), *(result["reference"] for result in sources.results)]
    return [str(name) for name in names if name]


def _mean_label(means: Sequence[dict[str, Any]]) -> str:
    """What they are means over, where that is the same for all and no long list of tasks."""
    labels = {mean["label"] for mean in means}
    label = labels.pop()
    return label if not labels and label.startswith("RULER-") else "mean"


def _value(score: dict[str, Any] | None) -> float | None:
    return score["value"] if score is not None else None


def _needles(sources: Sources) -> str:
    parts = []
    for result in _with(sources, "ruler"):
        needles = result["suites"]["ruler"]["needles"]
        lengths = sorted(map(int, needles))
        if not lengths:
            continue
        rows: list[tuple[str, Sequence[float | None]]] = []
        for place in range(_DEPTH_BINS):
            low, high = 100 * place / _DEPTH_BINS, 100 * (place + 1) / _DEPTH_BINS
            cells: list[float | None] = []
            for length in lengths:
                inside = [
                    counts
                    for depth, counts in needles[str(length)].items()
                    if min(int(float(depth) / 100 * _DEPTH_BINS), _DEPTH_BINS - 1) == place
                ]
                hidden = sum(count for _, count in inside)
                cells.append(sum(found for found, _ in inside) / hidden if hidden else None)
            rows.append((f"{low:.0f}–{high:.0f} %", cells))
        heat = _heat("depth", [tokens_label(length) for length in lengths], rows)
        parts.append(f"<div><h3>{_escape(model_name(result))}</h3>{heat}</div>")
    if parts:
        parts = ["<div class=side>", *parts, "</div>"]
        parts.append(
            "<p class=note>Needles found, in percent, by length and by how much of the context stands before the "
            "needle; over all RULER tasks that ask for one needle.</p>"
        )
    return _section("Needle retrieval by depth", *parts)


def _perplexity(sources: Sources) -> str:
    measured = [(result, suite) for result in sources.results for suite in measurements(result, "perplexity")]
    if not measured:
        return ""
    names = [model_name(result) for result, _ in measured]
    over = [f"{suite['windows']} windows of {suite['length']:,} of {suite['text']}" for _, suite in measured]
    words = f"Each point is 1,024 tokens, over {over[0]}."
    if len(set(over)) > 1:
        names = [f"{i}: {name}" for i, name in enumerate(names, 1)]
        words = f"Each point is 1,024 tokens. {'; '.join(f'{i}: {what}' for i, what in enumerate(over, 1))}."
    lines = []
    for i, (name, (_, suite)) in enumerate(zip(names, measured, strict=True)):
        x = [position["start"] + 512 for position in suite["positions"]]
        values = [position["perplexity"] for position in suite["positions"]]
        lines.append(Line(name, x, values, None, COLORS[i % len(COLORS)]))
    plot = line_plot("perplexity", lines, x_label="position in the window, tokens", y_label="perplexity", log_y=True)
    return _section("Perplexity by position", "<div class=charts>", _figure(plot, words), "</div>")


def _samples(sources: Sources) -> str:
    parts = []
    for run in sources.runs:
        if run.report is None or not run.report["samples"]:
            continue
        parts.append(f"<p>After <b>{_escape(run.report['prompt'])}</b> each goes on, greedily:</p>")
        for name, text in run.report["samples"].items():
            parts.append(f"<blockquote><b>{_escape(name)}</b> {_escape(' '.join(text.split()))}</blockquote>")
    return _section("What it writes", *parts)


def _circumstances(sources: Sources) -> str:
    parts = []
    for run in sources.runs:
        recipe = run.recipe
        facts = {
            "run": run.name,
            "base": recipe["base"],
            "teacher": recipe["teacher"] or "the base",
            "layout": recipe["layout"],
            "training text": ", ".join(_source_name(source) for source in recipe["data"].get("train") or []),
            "stages": "; ".join(_stage(stage) for stage in recipe["stages"]) or "none",
        }
        if run.report is not None:
            facts["seconds"] = ", ".join(f"{name} {seconds:,}" for name, seconds in run.report["seconds"].items())
            facts |= _place(run.report["environment"])
        parts.append(_facts(facts))
    for evaluation in sources.evaluations:
        settings = evaluation["settings"]
        facts = {
            "models": ", ".join(f"{result['reference']} ({result['dtype']})" for result in evaluation["results"]),
            "suites": ", ".join(settings["suites"]),
            "seed": settings["seed"],
            "documents": "all" if settings["limit"] is None else f"the first {settings['limit']} of each task",
            "chat template": "yes" if settings["chat"] else "no",
            "data": settings["place"],
        } | _place(evaluation["environment"])
        for result in evaluation["results"][:1]:
            for name, suite in result["suites"].items():
                facts[f"{name}, seconds"] = suite["seconds"]
            facts |= _asked(result["suites"])
        parts.append(_facts(facts))
    return _section("How it was measured", *parts)


def _asked(suites: dict[str, Any]) -> dict[str, str]:
    """Where what was asked comes from, and its hashes. Results of older versions have fewer of them."""
    facts: dict[str, str | None] = {}
    if (suite := suites.get("ruler")) is not None:
        for name, origin in suite.get("origin", {}).items():
            facts[f"RULER, {name}"] = origin
        for length, scores in suite["lengths"].items():
            facts[f"RULER prompts at {int(length):,}, sha256"] = scores.get("prompts_sha256")
        facts["RULER prompts, sha256"] = suite["prompts_sha256"]
    for task, score in suites.get("commonsense", {}).get("tasks", {}).items():
        facts[f"{task} requests, sha256"] = score["requests_sha256"]
    if (suite := suites.get("gsm8k")) is not None:
        facts[f"{suite['task']} requests, sha256"] = suite["exact_match"]["requests_sha256"]
        facts["GSM8K gold answers, sha256"] = suite["bits_per_byte"].get("requests_sha256")
    if (suite := suites.get("perplexity")) is not None:
        facts["perplexity windows, sha256"] = suite.get("requests_sha256")
    return {name: value for name, value in facts.items() if value is not None}


def _source_name(source: Any) -> str:
    """A source of text is a name, or a section that has one."""
    return str(source["source"] if isinstance(source, dict) else source)


def _stage(stage: dict[str, Any]) -> str:
    return f"{stage['name']} ({stage['objective']}, {stage['tokens']:,} tokens of {stage['length']:,})"


def _place(environment: dict[str, Any]) -> dict[str, str]:
    versions = {name: version for name, version in environment["versions"].items() if version}
    return {
        "date": environment["date"],
        "hardware": environment["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _facts(facts: dict[str, Any]) -> str:
    return "<dl>" + "".join(f"<dt>{_escape(a)}</dt><dd>{_escape(b)}</dd>" for a, b in facts.items()) + "</dl>"


__all__ = ["MIXER_COLORS", "Run", "report_page"]
