"""`hylo eval`, in process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hylo.commands.evaluate import register
from hylo.errors import HyLoError
from hylo.evaluate.ruler import score

Run = Callable[..., Any]


@pytest.fixture
def run(
    tmp_path: Path, base_folder: Path, mixed_folder: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Runs `eval` in a folder with a hybrid, its base and texts."""
    for name, folder in (("base", base_folder), ("hybrid", mixed_folder), ("texts", text_folder)):
        (tmp_path / name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    # Of two commands each is called by its name, as in `hylo`.
    app.command()(lambda: None)
    register(app)

    def call(line: str) -> Any:
        return CliRunner().invoke(app, ["eval", *line.split()])

    return call


def test_a_model_beside_its_base(run: Run, tmp_path: Path) -> None:
    line = "hybrid --suite ruler,perplexity --vs base --tasks niah_single_1,fwe --lengths 2K --samples 2 --beyond "
    result = run(line + "--text texts --length 256 --windows 2 --precision float32 --output out/eval")
    assert result.exit_code == 0, result.output
    for shown in ("hybrid against base", "RULER of niah_single_1, fwe", "perplexity", "out/eval/results.json"):
        assert shown in result.output
    report = json.loads((tmp_path / "out" / "eval" / "results.json").read_text())
    assert [one["reference"] for one in report["results"]] == ["hybrid", "base"]
    assert report["results"][0]["suites"]["perplexity"]["text"] == "texts"
    assert report["results"][0]["suites"]["perplexity"]["windows"] == 2
    assert "RULER of niah_single_1, fwe" in (tmp_path / "out" / "eval" / "report.html").read_text()
    # The same seed, the same scores.
    again = run(line + "--text texts --length 256 --windows 2 --precision float32 --json")
    assert again.exit_code == 0, again.output
    for one, other in zip(report["results"], json.loads(again.output)["results"], strict=True):
        for name in ("ruler", "perplexity"):
            one["suites"][name].pop("seconds"), other["suites"][name].pop("seconds")
        assert one["suites"]["perplexity"] == other["suites"]["perplexity"]
        assert one["suites"]["ruler"]["needles"] == other["suites"]["ruler"]["needles"]


def test_every_answer_can_be_looked_at(run: Run, tmp_path: Path) -> None:
    """The scores of results.json from samples.jsonl alone, which is written anew."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples.jsonl").write_text("of another run\n")
    line = (
        "hybrid --suite commonsense,gsm8k,ruler --limit 2 --tasks niah_multivalue,qa_squad --lengths 2K,3K --samples 2 "
    )
    line += "--vs base --beyond --source local --precision float32 --log-samples --output out"
    result = run(line)
    assert result.exit_code == 0, result.output
    assert "out/samples.jsonl" in result.output
    rows = [json.loads(text) for text in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    for one in report["results"]:
        ours = [row for row in rows if row["model"] == one["reference"]]
        assert all(len(row["prompt_sha256"]) == 64 and "expected" in row for row in ours)
        for length, scores in one["suites"]["ruler"]["lengths"].items():
            for task, expected in scores["tasks"].items():
                marked = [row for row in ours if (row["task"], row.get("length")) == (task, int(length))]
                assert [row["index"] for row in marked] == [0, 1]
                assert sum(row["score"] for row in marked) / 2 == expected["value"]
                assert all(score(task, row["answer"], row["expected"]) == row["score"] for row in marked)
        for task, expected in one["suites"]["commonsense"]["tasks"].items():
            marked = [row for row in ours if row["task"] == task]
            assert sum(row["score"]["acc"] for row in marked) / 2 == expected["metrics"]["acc"]["value"]
        answered = [row for row in ours if row["task"] == "gsm8k_cot"]
        assert {row["filter"] for row in answered} == {"strict-match", "flexible-extract"}
        assert all(isinstance(row["answer"], str) for row in answered)
        bits = [row["score"]["bits_per_byte"] for row in ours if row["task"] == "gold answers"]
        assert sum(bits) / 2 == pytest.approx(one["suites"]["gsm8k"]["bits_per_byte"]["value"])


def test_text_alone_is_scored_as_before(run: Run) -> None:
    result = run("hybrid --teacher base --text texts --length 64 --tokens 500 --precision float32 --json")
    assert result.exit_code == 0, result.output
    scores = json.loads(result.output)
    assert scores["tokens"] == 7 * 63
    assert scores["kl"] > 0
    shown = run("base --text texts --length 64 --tokens 500 --precision float32")
    assert shown.output.startswith("perplexity")


def test_a_first_look_takes_little_of_each_suite_and_gives_way_to_options(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hylo.evaluate import suites

    asked: list[suites.Settings] = []

    def note(models: list[str], settings: suites.Settings, *rest: object) -> None:
        asked.append(settings)
        raise HyLoError("noted")

    monkeypatch.setattr(suites, "evaluate_models", note)
    repeated = "base --suite ruler,ruler --tasks vt,fwe,vt --quick --samples 5"
    for line in ("base --suite all", "base --suite all --quick", repeated):
        assert str(run(line).exception) == "noted"
    whole, quick, chosen = asked
    assert whole.suites == quick.suites == suites.SUITES
    assert (chosen.suites, chosen.tasks) == (("ruler",), ("vt", "fwe"))
    assert (whole.limit, whole.lengths, whole.samples) == (None, (4096, 8192), 50)
    assert quick.limit is not None
    assert quick.limit <= 20
    assert (quick.lengths, quick.windows) == ((1024,), 2)
    assert (quick.samples, chosen.samples, chosen.lengths) == (2, 5, (1024,))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("nowhere --suite ruler", "nowhere"),
        ("base --suite mmlu", "'mmlu'"),
        ("base --suite mmlu --limit 2", "'mmlu'"),
        ("base --suite ruler --lengths 4Q", "'4Q'"),
        ("base --suite ruler --lengths 4K", "--beyond"),
        ("base --suite ruler --tasks niah --lengths 512", "'niah'"),
        ("base --suite perplexity --tasks niah_single_1", "--tasks"),
        ("base --suite perplexity --vs nowhere", "nowhere"),
        ("base --suite perplexity --text nowhere.txt", "nowhere.txt"),
        ("base --suite perplexity --source local --beyond --text nowhere.txt", "nowhere.txt"),
        ("base --suite perplexity --teacher base", "--vs"),
        ("base --suite commonsense --data nowhere", "nowhere"),
        ("base --suite perplexity --backend vllm", "vllm"),
        ("base --suite perplexity --output texts/text00.txt", "text00.txt"),
        ("texts --suite ruler", "config.json"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path, line: str, named: str) -> None:
    result = run(line if "--output" in line else f"{line} --output out")
    assert isinstance(result.exception, HyLoError), result.output
    assert named in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("base --text texts --vs hybrid --output out --limit 2", "--vs, --output, --limit: for suites alone"),
        ("base --text texts --chat --quick --backend hf", "--quick, --chat, --backend: for suites alone"),
        ("base --text texts --seed 0", "--seed: for suites alone"),
        ("base --text texts --length 513", "513 tokens are more than the 512"),
        ("base --suite perplexity --tokens 50", "--tokens goes with --text alone"),
        ("base --suite perplexity --limit 2 --source hub", "--limit, --source: of no use for perplexity"),
        ("base --suite perplexity --seed 1", "add to --suite: ruler"),
        ("base --suite gsm8k -t texts --length 64 --windows 2", "--length, --windows: of no use for gsm8k"),
        (
            "base --suite ruler --limit 2",
            "--limit: of no use for ruler; leave out, or add to --suite: commonsense, gsm8k",
        ),
        (
            "base --suite commonsense,gsm8k --beyond --samples 2",
            "--samples: of no use for commonsense, gsm8k",
        ),
    ],
)
def test_an_option_that_does_not_apply_is_refused(
    run: Run, line: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hylo.evaluate import agreement, suites

    for module in (agreement, suites):
        monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("weights were read"))
    result = run(line)
    assert isinstance(result.exception, HyLoError), result.output
    assert named in str(result.exception)
    assert "\n" not in str(result.exception)


def test_text_may_be_longer_than_a_model_was_made_for_where_that_is_asked_for(run: Run) -> None:
    result = run("base --text texts --length 600 --tokens 600 --beyond --precision float32 --json")
    assert json.loads(result.output)["tokens"] == 599
    # What is not said is what the model was made for.
    assert json.loads(run("base --text texts --tokens 600 --precision float32 --json").output)["tokens"] == 511


def test_answers_are_written_to_a_folder_or_not_at_all(run: Run) -> None:
    assert "--output" in str(run("base --suite perplexity --log-samples").exception)


def test_neither_suite_nor_text_is_a_wrong_command_line(run: Run) -> None:
    result = run("base")
    assert result.exit_code == 2
    assert "--suite" in result.output
