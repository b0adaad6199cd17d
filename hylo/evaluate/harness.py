"""lm-evaluation-harness: its tasks, unchanged from a hub, or fed from local data; its `hf` model over this engine."""

import contextlib
import hashlib
import importlib.util
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from hylo.errors import HyLoError
from hylo.evaluate.backends import Backend, cut_left
from hylo.evaluate.data import LocalData, MissingDataError
from hylo.evaluate.engine import Engine, context_limit
from hylo.evaluate.quiet import quiet

# The seven tasks of the published tables, 0-shot, and the metric that stands for each: the accuracy normalised by the
# length of the choices wherever the harness has it.
COMMONSENSE = {
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "hellaswag": "acc_norm",
    "openbookqa": "acc_norm",
    "piqa": "acc_norm",
    "race": "acc",
    "winogrande": "acc",
}
# Where each task stands among the harness's own, its split, and the documents that it takes.
_SHIPPED = {
    "arc_challenge": ("arc/arc_challenge.yaml", "test", "arc_challenge"),
    "arc_easy": ("arc/arc_easy.yaml", "test", "arc_easy"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", "hellaswag"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test", "openbookqa"),
    "piqa": ("piqa/piqa.yaml", "validation", "piqa"),
    "race": ("race/race.yaml", "test", "race"),
    "winogrande": ("winogrande/default.yaml", "validation", "winogrande"),
    "gsm8k": ("gsm8k/gsm8k.yaml", "test", "gsm8k"),
    "gsm8k_cot": ("gsm8k/gsm8k-cot.yaml", "test", "gsm8k"),
}
# lm-eval's own default: where a task draws its shots, they are those of published scores.
_SHOTS_SEED = 1234


def check_harness() -> None:
    """Raises HyLoError where lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise HyLoError("this suite needs lm-eval; install it with: pip install 'hylo[eval]'")


def shipped_config(task: str) -> Path:
    """The task's own file in the harness."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / _SHIPPED[task][0]


@contextmanager
def local_tasks(
    names: Sequence[str], data: LocalData
) -> Iterator[tuple[dict[str, Any], dict[str, str], dict[str, str]]]:
    """The harness's tasks over local documents, for the length of the block.

    Each is a configuration that includes the harness's own file and changes nothing but where documents come from.

    Yields tasks by name, the origin of each one's documents, and why others are missing.
    """
    with tempfile.TemporaryDirectory(prefix="hylo-tasks-") as scratch:
        folder, origins, missing = Path(scratch), dict[str, str](), dict[str, str]()
        for name in names:
            _, split, needs = _SHIPPED[name]
            try:
                documents = data.documents(needs)
            except MissingDataError as error:
                missing[name] = str(error)
                continue
            origins[name] = documents.origin
            file = folder / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in documents.rows))
            config = {
                "include": str(shipped_config(name)),
                "task": name,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {split: str(file)}, "cache_dir": str(folder / "cache")},
                "training_split": None,
                "validation_split": split if split == "validation" else None,
                "test_split": split if split == "test" else None,
                "fewshot_split": None,
            }
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        yield _load(list(origins), include_path=str(folder), include_defaults=False), origins, missing


@contextmanager
def hub_tasks(names: Sequence[str]) -> Iterator[tuple[dict[str, Any], dict[str, str], dict[str, str]]]:
    """The harness's own tasks, their documents from the hub; as `local_tasks`, with nothing missing."""
    # Their folders alone: reading all of the harness's tasks takes longer than some of them run.
    folders = dict.fromkeys(str(shipped_config(name).parent) for name in names)
    tasks = _load(list(names), include_path=list(folders), include_defaults=False)
    yield tasks, {name: str(task.config.dataset_path) for name, task in tasks.items()}, {}


def _load(names: list[str], **settings: Any) -> dict[str, Any]:
    if not names:
        return {}
    with quiet():
        from lm_eval.tasks import TaskManager

        try:
            return dict(TaskManager(**settings).load(names)["tasks"])
        except (KeyError, ValueError, OSError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise HyLoError(f"lm-eval cannot load {', '.join(names)} from these documents: {reason}") from None


def run_tasks(
    backend: Backend,
    tasks: dict[str, Any],
    *,
    limit: int | None,
    chat: bool = False,
    log: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> dict[str, dict[str, Any]]:
    """What the harness measures, by task: every metric with its standard error, documents, shots and a hash of the
    requests.

    Args:
        limit: documents of each task, from the first on; None for all.
        chat: put prompts into the chat template.
        log: is given a row for each document and filter of the answers.
    """
    from lm_eval.evaluator import evaluate

    for task in tasks.values():
        # As lm-eval's own command does: a task that does not say how many shots it wants gets none.
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SHOTS_SEED)
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        results = evaluate(
            lm=backend.harness_model,
            task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
            limit=limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    assert results is not None
    for name in tasks:
        log([{"task": name} | _logged(sample) for sample in results["samples"][name]])
    return {
        name: {
            "metrics": _metrics(results["results"][name]),
            "documents": results["n-samples"][name]["effective"],
            "of": results["n-samples"][name]["original"],
            "shots": results["n-shot"][name],
            "version": results["versions"][name],
            "requests_sha256": requests_digest(task.instances),
        }
        for name, task in tasks.items()
    }


def _logged(sample: dict[str, Any]) -> dict[str, Any]:
    """Of a document: a hash of its first prompt, what the model gave (the text, or of each choice its log-likelihood
    and whether it is the greedy one), what the filter made of it, what was expected, and each metric."""
    given = [responses[0] for responses in sample["resps"]]
    return {
        "index": sample["doc_id"],
        "prompt_sha256": sample["prompt_hash"],
        "answer": given[0] if len(given) == 1 else given,
        "filter": sample["filter"],
        "filtered": sample["filtered_resps"],
        "expected": sample["target"],
        "score": {metric: sample[metric] for metric in sample["metrics"]},
    }


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """`metric` or `metric,filter` to value and standard error, from the harness's flat names."""
    metrics: dict[str, dict[str, float | None]] = {}
    for name, value in values.items():
        metric, _, kind = name.partition(",")
        if not kind or metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{kind}")
        label = metric if kind == "none" else f"{metric},{kind}"
        metrics[label] = {"value": float(value), "stderr": float(stderr) if isinstance(stderr, float) else None}
    return metrics


def requests_digest(instances: Sequence[Any]) -> str:
    """A hash over exactly what is asked, in the order of the documents."""
    digest = hashlib.sha256()
    for instance in sorted(instances, key=lambda instance: (instance.doc_id, instance.idx)):
        asked = [instance.request_type, instance.doc_id, instance.idx, instance.args]
        digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def harness_model(engine: Engine) -> Any:
    """lm-eval's `hf` model for a model that is loaded already, with this engine's batches in place of its own."""
    from lm_eval.models.huggingface import HFLM

    class HarnessModel(HFLM):
        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            rows = [cut_left(context, continuation, self.max_length) for _, context, continuation in requests]
            return engine.loglikelihoods(rows, "lm-eval: choices")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            answers: dict[int, str] = {}
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
            for settings, indices in groups.items():
                asked = json.loads(settings)
                if asked.get("do_sample") or asked.get("temperature"):
                    raise HyLoError("sampled answers are not evaluated; expected greedy ones")
                until = asked.get("until") or []
                until = [until] if isinstance(until, str) else until
                new_tokens = asked.get("max_gen_toks", self.max_gen_toks)
                most = self.max_length - new_tokens
                prompts = [self.tok_encode(requests[i].args[0])[-most:] for i in indices]
                texts = engine.generate(prompts, new_tokens, until=until, description="lm-eval: answers")
                answers.update(zip(indices, texts, strict=True))
            return [answers[i] for i in range(len(requests))]

    with quiet():
        return HarnessModel(
            pretrained=engine.model,
            tokenizer=engine.tokenizer,
            backend="causal",
            batch_size=1,
            max_length=context_limit(engine.model),
        )
