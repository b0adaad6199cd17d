"""The model card: README.md with the hub's metadata, made from a checkpoint, its run and its scores."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.evaluate.page.sources import Run, Sources
from hylo.evaluate.report import row_labels
from hylo.evaluate.show import missing_lines, notes, score_rows, table_rows
from hylo.files import write_text
from hylo.upcycle.bases import load_text_config, weights_digest
from hylo.upcycle.layout import format_layout
from hylo.version import __version__

_CARD_FILE = "README.md"
# Samples a task and length below which a score of RULER is a first look.
_RULER_SAMPLES = 50
# What the hub is told where no licence is found.
_UNKNOWN_LICENSE = "that-of-the-base"
# So that a card that a person wrote is never written over.
_MARK = "<!-- made by hylo report -->"


def write_model_card(folder: Path, sources: Sources) -> Path:
    """Writes README.md into a hybrid's checkpoint. Returns its path. Raises HyLoError as `made_card` does."""
    path, text = made_card(folder, sources)
    write_text(path, text)
    return path


def made_card(folder: Path, sources: Sources) -> tuple[Path, str]:
    """Where a checkpoint's card belongs, and what it says.

    Raises HyLoError where the folder holds no hybrid, or a card that was not made here.
    """
    if not (folder / "config.json").is_file():
        raise HyLoError(f"{folder} holds no config.json; expected a hybrid's checkpoint")
    config = load_text_config(folder)
    if not isinstance(config, HyLoConfig):
        raise HyLoError(f"{folder} is no hybrid; expected a checkpoint that hylo made")
    path = folder / _CARD_FILE
    if path.is_file() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise HyLoError(f"{path} was not made by hylo report; move it away to have one made")
    return path, model_card(config, sources, folder)


def model_card(config: HyLoConfig, sources: Sources, folder: Path) -> str:
    """The card as markdown, with the hub's metadata in front."""
    layout = format_layout(config.token_mixers or [])
    base = config.base_model or "an unknown base"
    run = _run_of(config, sources, folder)
    weights = weights_digest(folder)
    results = _of(weights, sources)
    whole = _of(weights, Sources(evaluations=[one for one in sources.evaluations if _is_whole(one)]))
    name = f"{base.removeprefix('package:').rstrip('/').split('/')[-1]}-{layout.replace(' ', '-')}"
    metadata: dict[str, Any] = {
        **base_license(base),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hylo", "hybrid", "linear-attention", "mla", "distillation"],
    }
    if _is_hub_id(base):
        metadata |= {"base_model": base, "base_model_relation": "finetune"}
    if whole:
        metadata["model-index"] = [{"name": name, "results": _hub_results(whole[0])}]
    share = config.cache_elements_per_token / config.base_cache_elements_per_token
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{_MARK}\n",
        f"# {name}\n",
        f"A hybrid of {base}: layout `{layout}`, made with hylo {__version__} by distillation from the original. "
        f"Its cache is **{share:.1%}** of the base's: {config.cache_bytes(1):,} bytes a token in 16 bits, and "
        f"{config.state_bytes():,} bytes of state a sequence.\n",
        _license_line(base),
        _layers_table(config),
    ]
    if run is not None:
        parts += [_training(run), _steps(run)]
    if results:
        parts.append(_scores(results, sources))
    parts.append(_usage(folder))
    return "\n".join(part for part in parts if part)


def _run_of(config: HyLoConfig, sources: Sources, folder: Path) -> Run | None:
    """The run that made a checkpoint: the one that it lies in, or the only one of its layout."""
    alike = [run for run in sources.runs if run.report and run.report["token_mixers"] == config.token_mixers]
    for run in alike:
        if run.folder is not None and (run.folder / "model").resolve() == folder.resolve():
            return run
    return alike[0] if len(alike) == 1 else None


def _of(weights: str, sources: Sources) -> list[dict[str, Any]]:
    """The scores of a model of these weights, whatever its folder was called; without a chat template first."""
    found = [one for one in sources.results if one.get("weights_sha256") == weights]
    return sorted(found, key=lambda one: one["way"]["chat"] != "no chat template")


def _is_whole(evaluation: dict[str, Any]) -> bool:
    """Whether it is fit for the hub's tables, which show no counts: every document, and RULER as it is reported."""
    settings = evaluation["settings"]
    finished = all(result.get("finished", True) for result in evaluation["results"])
    enough = "ruler" not in settings["suites"] or settings["samples"] >= _RULER_SAMPLES
    return finished and settings["limit"] is None and enough


def base_license(base: str) -> dict[str, str]:
    """What the hub's metadata says of the licence: that of the base's package, or of its own card, in its folder or in
    the hub's cache. Nothing is downloaded.

    `license`, and where the hub has no name for it ("other") also `license_name` and `license_link`.
    """
    stated: dict[str, str] = {}
    if base.startswith("package:"):
        name = _package_license(base.removeprefix("package:"))
        stated = {"license": name} if name else {}
    elif (card := _base_card(base)) is not None:
        stated = _card_license(card)
    if not stated:
        stated = {"license": "other", "license_name": _UNKNOWN_LICENSE}
    if stated["license"] == "other" and _is_hub_id(base):
        # A link in a base's card may be a file beside it.
        link = stated.get("license_link", "")
        page = f"https://huggingface.co/{base}"
        stated["license_link"] = (f"{page}/blob/main/{link}" if link else page) if "://" not in link else link
    elif "://" not in stated.get("license_link", ""):
        stated.pop("license_link", None)
    return stated


def _is_hub_id(base: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()


def _package_license(name: str) -> str | None:
    try:
        words = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    stated = next((words[key] for key in ("License-Expression", "License") if key in words), None)
    return stated.strip().lower() if stated and len(stated) < 40 else None


def _base_card(base: str) -> Path | None:
    if _is_hub_id(base):
        found = try_to_load_from_cache(base, _CARD_FILE)
        return Path(found) if isinstance(found, str) else None
    card = Path(base) / _CARD_FILE
    return card if card.is_file() else None


def _card_license(card: Path) -> dict[str, str]:
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        values = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict) or not values.get("license"):
        return {}
    return {name: str(values[name]) for name in ("license", "license_name", "license_link") if values.get(name)}


def _license_line(base: str) -> str:
    stated = base_license(base)
    name = stated.get("license_name", stated["license"])
    if name == _UNKNOWN_LICENSE:
        return "The base's licence is not recorded here; it holds for this model as well.\n"
    link = f" ({stated['license_link']})" if "license_link" in stated else ""
    return f"Licence of the base: {name}{link}. It holds for this model as well.\n"


def _layers_table(config: HyLoConfig) -> str:
    mixers = config.token_mixers or []
    lines = ["## Layers\n", "| mixer | layers | sizes |", "| --- | --- | --- |"]
    for name in dict.fromkeys(mixers):
        places = ", ".join(str(i) for i, one in enumerate(mixers) if one == name)
        sizes = (config.mixer_geometry or {}).get(name, {})
        shown = ", ".join(f"{key} {value}" for key, value in sizes.items() if not isinstance(value, list | dict))
        lines.append(f"| `{name}` | {places} | {shown} |")
    return "\n".join(lines) + "\n"


def _training(run: Run) -> str:
    recipe = run.recipe
    lines = [
        "## Training\n",
        "| stage | objective | tokens | length | learning rate |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {stage['name']} | {stage['objective']} | {stage['tokens']:,} | {stage['length']:,} "
        f"| {stage['learning_rate']:g} |"
        for stage in recipe["stages"]
    ]
    calibration = recipe.get("calibration")
    if calibration:
        lines.append(f"\nOutput projections were solved on {calibration['tokens']:,} tokens before.")
    lines.append(f"\nTeacher: {recipe['teacher'] or 'the base'}.")
    return "\n".join(lines) + "\n"


def _steps(run: Run) -> str:
    assert run.report is not None
    tokens = run.report["evaluation"]["tokens"]
    lines = [
        f"On {tokens:,} held-out tokens, KL(teacher‖model) in nats a token:\n",
        "| | perplexity | KL | top-1 agreement |",
        "| --- | ---: | ---: | ---: |",
    ]
    labels = row_labels(run.report)
    lines += [
        f"| {labels[name]} | {scores['perplexity']:,.2f} | {scores['kl']:.3f} | {scores['agreement']:.1%} |"
        for name, scores in run.report["scores"].items()
    ]
    return "\n".join(lines) + "\n"


def _scores(ours: list[dict[str, Any]], sources: Sources) -> str:
    others = [other for other in sources.results if other.get("weights_sha256") != ours[0]["weights_sha256"]]
    names = [", ".join(filter(None, ("this model", one["measured"]))) for one in ours]
    names += [", ".join(filter(None, (Path(other["reference"]).name, other["measured"]))) for other in others]
    lines = ["## Scores\n", f"| | metric | n | {' | '.join(names)} |", f"| --- | --- | ---: |{' ---: |' * len(names)}"]
    for (_, label, metric), count, cells in table_rows([*ours, *others]):
        # What the others alone were asked says nothing of this model.
        if any(cells[: len(ours)]):
            lines.append(f"| {label} | {metric} | {count} | {' | '.join(cells)} |")
    lines += [
        f"\n{line[0].upper()}{line[1:]}." for line in (*notes([*ours, *others]), *missing_lines({"results": ours}))
    ]
    return "\n".join(lines) + "\n"


def _hub_results(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": label, "type": suite},
            "metrics": [{"type": metric or "mean", "value": round(value, 4)}],
        }
        for (suite, label, metric), (value, _, _) in score_rows(result)
    ]


def _usage(folder: Path) -> str:
    return (
        "## Use\n\n```python\n"
        "import hylo  # registers the model with transformers' Auto classes\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder.absolute().name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder.absolute().name}")\n```\n'
    )
