"""`hylo eval`: what is asked of a model, suite by suite, and one result with everything that made it.

All that can be wrong with the input is found, and all prompts are made, before weights are read.
"""

import math
import os
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants
from transformers import PreTrainedConfig

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.evaluate.backends import Backend, HfBackend, check_vllm, vllm_backend
from hylo.evaluate.data import LocalData, MissingDataError
from hylo.evaluate.engine import OUT_OF_MEMORY, Engine
from hylo.evaluate.measures import NO_MEMORY, Log, Save, digest, free_memory, standard_error, task_mean, text_digest
from hylo.evaluate.perplexity import cut_windows, perplexity_by_position
from hylo.evaluate.report import environment, installed_version
from hylo.evaluate.ruler import (
    TASKS,
    available_tasks,
    check_tasks,
    left_out,
    make_samples,
    origins,
    repeated_documents,
)
from hylo.evaluate.ruler.run import RulerPrompts, run_ruler
from hylo.precision import Precision, default_device, resolve_precision
from hylo.upcycle.bases import (
    context_length,
    load_model,
    load_text_config,
    load_tokenizer,
    opened_folder,
    resolve_base,
    weights_digest,
)
from hylo.upcycle.layout import format_layout

SUITES = ("commonsense", "gsm8k", "ruler", "perplexity")
# Marks a file as a result of this module, and says how to read it.
FORMAT = "hylo-eval-1"
# More than any document of lm-eval's tasks takes with its shots and its answer.
_HARNESS_TOKENS = 8192

Place = Literal["auto", "hub", "local"]


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        suites: of SUITES, in the order they are run.
        limit: documents of each task of lm-eval, and answers scored in bits per byte; None for all.
        lengths: of RULER, in tokens, prompt and answer together.
        samples: of RULER, for each task and length.
        tasks: of RULER; all that there is data for where empty.
        beyond: allow lengths beyond what the model was made for.
        text: files for perplexity, laid end to end; RULER's essays where empty.
        perplexity_length: tokens of a window; what the model was made for, at most 8,192, where None.
        windows: how many of them.
        chat: put the prompts of RULER and lm-eval into the tokenizer's chat template.
        data: a folder of data; see hylo.evaluate.data.
        place: where lm-eval's documents come from; `auto` is the hub where it answers, unless `data` is given.
        seed: of RULER's prompts.
        cache_bytes: of the backend vllm's cache; None for nearly all of a GPU.
        batch_tokens: see Engine.
        workers: processes that make RULER's prompts.
    """

    suites: tuple[str, ...]
    limit: int | None = None
    lengths: tuple[int, ...] = (4096, 8192)
    samples: int = 50
    tasks: tuple[str, ...] = ()
    beyond: bool = False
    text: tuple[str, ...] = ()
    perplexity_length: int | None = None
    windows: int = 8
    chat: bool = False
    data: str | None = None
    place: Place = "auto"
    seed: int = 0
    precision: Precision = "auto"
    backend: str = "hf"
    cache_bytes: int | None = None
    batch_tokens: int | None = None
    workers: int | None = None


def hub_answers(timeout_s: float = 3.0) -> bool:
    """Whether a model hub can be reached, and may be."""
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "0") not in ("", "0"):
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout_s):
            return True
    except (OSError, ValueError):
        return False


def parse_lengths(text: str) -> tuple[int, ...]:
    """`4K,8192` to tokens in rising order. Raises HyLoError on anything else."""
    from hylo.plan.quantities import parse_contexts

    try:
        return tuple(sorted(set(parse_contexts(text))))
    except HyLoError:
        raise HyLoError(f"--lengths {text!r}: expected tokens such as 4096 or 4K,8K") from None


def check_settings(settings: Settings) -> None:
    """Raises HyLoError on what is wrong with the settings themselves."""
    for name in settings.suites:
        if name not in SUITES:
            raise HyLoError(f"no suite {name!r}; expected one or more of {', '.join(SUITES)}")
    if not settings.suites:
        raise HyLoError(f"no suite is given; expected one or more of {', '.join(SUITES)}")
    check_tasks(settings.tasks)
    if settings.tasks and "ruler" not in settings.suites:
        raise HyLoError("--tasks are RULER's; add ruler to --suite, or leave them out")
    if settings.backend == "vllm":
        check_vllm()
        if "perplexity" in settings.suites:
            raise HyLoError("--backend vllm does not measure perplexity; leave out that suite or the backend")
    elif settings.cache_bytes is not None:
        raise HyLoError("--cache-memory is for --backend vllm; leave it out, or choose that backend")
    if {"commonsense", "gsm8k"} & set(settings.suites) or settings.backend == "vllm":
        from hylo.evaluate.harness import check_harness

        check_harness()


def context_of(reference: str) -> int:
    """Tokens that a model was made for. Raises HyLoError where there is no such model."""
    return context_length(_config_of(resolve_base(reference)), reference)


def _longest(settings: Settings) -> int:
    wanted = list(settings.lengths) if "ruler" in settings.suites else []
    if "perplexity" in settings.suites and settings.perplexity_length:
        wanted.append(settings.perplexity_length)
    return max(wanted, default=0)


def check_length(reference: str, longest: int, beyond: bool) -> None:
    """Raises HyLoError where a model was made for less and `beyond` does not ask for it, or there is none."""
    limit = context_of(reference)
    if longest > limit and not beyond:
        raise HyLoError(
            f"{longest:,} tokens are more than the {limit:,} that {reference} was made for; "
            "choose shorter lengths, or pass --beyond to see where it breaks"
        )


def evaluate_models(
    references: Sequence[str],
    settings: Settings,
    save: Save = lambda report: None,
    log: Log = lambda rows: None,
) -> dict[str, Any]:
    """Measures models one after the other, on the same prompts where they share a vocabulary and chat template.

    What does not fit into memory, a length of RULER or a suite, is named as missing, and the others go on.

    Args:
        references: folders, hub ids, GGUF files; the first is the model, the others are what it is compared with.
        save: is given all that is measured so far, after every suite and every length of RULER.
        log: is given what each sample was asked, answered and marked, as rows, once its suite or length is measured.

    Returns:
        What results.json holds; docs/evaluation.md explains every key.

    Raises:
        HyLoError: on bad input, before anything long is done.
    """
    check_settings(settings)
    data = LocalData.at(settings.data)
    for reference in references:
        check_length(reference, _longest(settings), settings.beyond)
    hub = settings.place == "hub" or (
        settings.place == "auto" and settings.data is None and _needs_hub(settings) and hub_answers()
    )
    _check_documents(settings, data, hub)
    if "perplexity" in settings.suites:
        # That there is some.
        next(_texts(settings, data))
    with ExitStack() as stack:
        folders = [stack.enter_context(opened_folder(reference)) for reference in references]
        tokenizers = [load_tokenizer(folder) for folder in folders]
        if settings.chat:
            _check_templates(references, tokenizers)
        start = time.monotonic()
        prompts = _make_prompts(tokenizers, settings, data)
        prompts_seconds = time.monotonic() - start
        windows = [_windows(*one, settings, data) for one in zip(folders, tokenizers, strict=True)]
        results: list[dict[str, Any]] = []
        report: dict[str, Any] = {
            "format": FORMAT,
            "settings": asdict(settings) | {"place": "hub" if hub else "local"},
            "prompts_seconds": round(prompts_seconds, 1),
            "results": results,
        }

        def keep() -> None:
            save(report | {"environment": _environment()})

        every = zip(references, folders, tokenizers, prompts, windows, strict=True)
        for reference, folder, tokenizer, asked, text in every:
            results.append({})
            _evaluate_one(results[-1], reference, folder, tokenizer, asked, text, settings, data, hub, keep, log)
            # What the model before held.
            free_memory()
    return report | {"environment": _environment()}


def _environment() -> dict[str, Any]:
    where = environment()
    where["versions"] |= {name: installed_version(name) for name in ("lm_eval", "datasets", "vllm")}
    return where


def _needs_hub(settings: Settings) -> bool:
    return bool({"commonsense", "gsm8k"} & set(settings.suites))


def _config_of(path: Path) -> PreTrainedConfig:
    """Of a resolved base, before its weights are read: a GGUF file's are dequantised first."""
    return load_text_config(path) if path.is_dir() else load_text_config(path.parent, gguf_file=path.name)


def _check_documents(settings: Settings, data: LocalData, hub: bool) -> None:
    """Raises HyLoError where a suite of lm-eval has no documents at all."""
    from hylo.evaluate.harness import COMMONSENSE, hub_tasks

    wanted = {"commonsense": tuple(COMMONSENSE), "gsm8k": ("gsm8k",)}
    for suite in settings.suites:
        tasks = wanted.get(suite, ())
        if hub and tasks:
            # What is downloaded here is found again when it is needed.
            with hub_tasks(tasks):
                continue
        reasons = [reason for task in tasks if (reason := _why_missing(task, data)) is not None]
        if tasks and len(reasons) == len(tasks):
            raise HyLoError(reasons[0])


def _why_missing(task: str, data: LocalData) -> str | None:
    try:
        data.documents(task)
    except MissingDataError as error:
        return str(error)
    return None


def _texts(settings: Settings, data: LocalData) -> Iterator[str]:
    """Texts for perplexity, read as far as they are taken."""
    if not settings.text:
        try:
            yield data.essays()[0]
        except MissingDataError:
            raise HyLoError("perplexity needs a long text; give one with --text") from None
        return
    from hylo.data.sources import iterate_documents

    yield from (document.text for document in iterate_documents(settings.text))


def _text_name(settings: Settings, data: LocalData) -> str:
    return ", ".join(settings.text) or f"essays ({data.essays()[1]})"


def _windows(folder: Path, tokenizer: Any, settings: Settings, data: LocalData) -> list[list[int]]:
    """Of the perplexity suite, where it is asked for."""
    if "perplexity" not in settings.suites:
        return []
    length = settings.perplexity_length or min(context_length(load_text_config(folder), str(folder)), 8192)
    return cut_windows(_texts(settings, data), tokenizer, length, settings.windows)


def _make_prompts(tokenizers: Sequence[Any], settings: Settings, data: LocalData) -> list[RulerPrompts]:
    """RULER's, for each model; made once for all that share a vocabulary, and the chat template where it is used."""
    if "ruler" not in settings.suites:
        return [RulerPrompts() for _ in tokenizers]
    tasks, missing = available_tasks(data, settings.tasks or tuple(TASKS))
    if not tasks:
        raise HyLoError(f"no RULER task has its data: {'; '.join(missing.values())}")
    made: list[RulerPrompts] = []
    for i, tokenizer in enumerate(tokenizers):
        same = next((made[j] for j in range(i) if _prompted_alike(tokenizers[j], tokenizer, settings.chat)), None)
        if same is None:
            samples = make_samples(
                tokenizer,
                tasks,
                settings.lengths,
                settings.samples,
                seed=settings.seed,
                data=data,
                chat=settings.chat,
                workers=settings.workers,
            )
            same = RulerPrompts(
                samples, missing, left_out(samples, tasks), origins(data, tasks), repeated_documents(samples, data)
            )
        made.append(same)
    return made


def _prompted_alike(one: Any, other: Any, chat: bool) -> bool:
    return one.get_vocab() == other.get_vocab() and (not chat or one.chat_template == other.chat_template)


def _check_templates(references: Sequence[str], tokenizers: Sequence[Any]) -> None:
    for reference, tokenizer in zip(references, tokenizers, strict=True):
        if not tokenizer.chat_template:
            raise HyLoError(f"the tokenizer of {reference} has no chat template; leave out --chat")


def describe_model(folder: Path, reference: str) -> dict[str, Any]:
    """What a checkpoint is, from its config alone: layout, cache and state."""
    config = load_text_config(folder)
    facts: dict[str, Any] = {
        "reference": reference,
        "family": config.model_type,
        "context": int(config.max_position_embeddings),
        "weights_sha256": weights_digest(folder),
    }
    if isinstance(config, HyLoConfig):
        return facts | {
            "layout": format_layout(config.token_mixers or []),
            "token_mixers": config.token_mixers,
            "base_model": config.base_model,
            "cache_bytes_per_token": config.cache_bytes(1),
            "base_cache_bytes_per_token": 2 * config.base_cache_elements_per_token,
            "state_bytes_per_sequence": config.state_bytes(),
        }
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return facts | {
        "layers": config.num_hidden_layers,
        "cache_bytes_per_token": 4 * config.num_hidden_layers * heads * size,
    }


def _evaluate_one(
    result: dict[str, Any],
    reference: str,
    folder: Path,
    tokenizer: Any,
    prompts: RulerPrompts,
    windows: list[list[int]],
    settings: Settings,
    data: LocalData,
    hub: bool,
    keep: Callable[[], None],
    log: Log,
) -> None:
    """Fills `result` suite by suite; `keep` saves it."""
    facts = describe_model(folder, reference)
    dtype = resolve_precision(settings.precision)
    engine: Engine | None = None
    backend: Backend
    with ExitStack() as stack:
        if settings.backend == "vllm":
            longest = longest_sequence(settings, facts["context"])
            name = str(dtype).removeprefix("torch.")
            backend = stack.enter_context(vllm_backend(folder, longest, facts["context"], name, settings.cache_bytes))
        else:
            model = load_model(folder, dtype).to(default_device())
            facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
            engine = Engine(model, tokenizer, settings.batch_tokens)
            backend = HfBackend(engine)
        result |= facts | {"dtype": str(dtype), "finished": False, "suites": {}, "missing": {}}
        for name in settings.suites:
            start = time.monotonic()

            def logged(rows: list[dict[str, Any]], name: str = name) -> None:
                log([{"model": reference, "suite": name} | row for row in rows])

            def measured(suite: dict[str, Any], name: str = name, start: float = start) -> None:
                result["suites"][name] = suite | {"seconds": round(time.monotonic() - start, 1)}
                keep()

            try:
                if name == "ruler":
                    run_ruler(backend, prompts, measured, logged)
                elif name == "perplexity":
                    assert engine is not None
                    measured(_run_perplexity(engine, windows, _text_name(settings, data)))
                else:
                    run: Callable[..., dict[str, Any]] = {"commonsense": _run_commonsense, "gsm8k": _run_gsm8k}[name]
                    measured(run(backend, settings, data, hub, logged))
            except OUT_OF_MEMORY:
                result["missing"][name] = NO_MEMORY
                keep()
            free_memory()
        result["finished"] = True
        keep()


def longest_sequence(settings: Settings, context: int) -> int:
    """Tokens of the longest sequence that the suites may ask for, which may be far less than the model's context."""
    lengths = list(settings.lengths) if "ruler" in settings.suites else []
    if {"commonsense", "gsm8k"} & set(settings.suites):
        lengths.append(min(context, _HARNESS_TOKENS))
    return max(lengths)


# The suites.


def _run_commonsense(backend: Backend, settings: Settings, data: LocalData, hub: bool, log: Log) -> dict[str, Any]:
    from hylo.evaluate.harness import COMMONSENSE, hub_tasks, local_tasks, run_tasks

    with hub_tasks(list(COMMONSENSE)) if hub else local_tasks(list(COMMONSENSE), data) as (tasks, origins, missing):
        measured = run_tasks(backend, tasks, limit=settings.limit, chat=settings.chat, log=log)
    for name, result in measured.items():
        result |= {"metric": COMMONSENSE[name], "origin": origins[name]} | result["metrics"][COMMONSENSE[name]]
    return {"tasks": measured, "missing": missing, "mean": task_mean(measured.values(), len(COMMONSENSE))}


def _run_gsm8k(backend: Backend, settings: Settings, data: LocalData, hub: bool, log: Log) -> dict[str, Any]:
    """Exact match of generated answers, and bits per byte of the gold ones."""
    from hylo.evaluate.harness import hub_tasks, local_tasks, run_tasks

    # gsm8k draws its five shots from the train split, which no package has; gsm8k_cot carries its eight shots itself.
    name = "gsm8k" if hub else "gsm8k_cot"
    with hub_tasks([name]) if hub else local_tasks([name], data) as (tasks, origins, _):
        every = run_tasks(backend, tasks, limit=settings.limit, chat=settings.chat, log=log)
        rows = list(tasks[name].test_docs())
    answers = [(row["question"], row["answer"]) for row in rows[: settings.limit]]
    return {
        "task": name,
        "origin": origins[name],
        "exact_match": every[name],
        "bits_per_byte": gold_bits_per_byte(backend, answers, log),
    }


def gold_bits_per_byte(
    backend: Backend, answers: Sequence[tuple[str, str]], log: Log = lambda rows: None
) -> dict[str, Any]:
    """How many bits a model needs for each byte of a worked answer, 0-shot, after `Question: ...\\nAnswer:`.

    It still tells models apart that are too small to get an answer right. The mean is over answers.
    """
    pairs = [(f"Question: {question}\nAnswer:", f" {answer}") for question, answer in answers]
    scored = backend.loglikelihoods(pairs, "gold answers")
    bits = [-value / math.log(2) / len(answer.encode()) for (_, answer), (value, _) in zip(pairs, scored, strict=True)]
    log(
        [
            {
                "task": "gold answers",
                "index": i,
                "prompt_sha256": text_digest(context),
                "expected": answer,
                "score": {"bits_per_byte": value},
            }
            for i, ((context, answer), value) in enumerate(zip(pairs, bits, strict=True))
        ]
    )
    return {
        "value": statistics.fmean(bits),
        "stderr": standard_error(bits),
        "documents": len(bits),
        "requests_sha256": digest(pairs),
    }


def _run_perplexity(engine: Engine, windows: list[list[int]], text: str) -> dict[str, Any]:
    scores = perplexity_by_position(engine, windows)
    return {
        "text": text,
        "length": len(windows[0]),
        "windows": len(windows),
        "nats": scores.nats,
        "stderr": scores.stderr,
        "perplexity": scores.perplexity,
        "positions": [asdict(one) | {"perplexity": one.perplexity} for one in scores.positions],
        "requests_sha256": digest(windows),
    }
