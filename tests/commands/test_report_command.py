"""`hylo report`, in process."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hylo.commands.report import register
from hylo.errors import HyLoError

Run = Callable[..., Any]
# The least that a result of `hylo eval` has.
RESULTS: dict[str, Any] = {
    "format": "hylo-eval-1",
    "settings": {"suites": ["perplexity"], "limit": None, "seed": 0, "chat": False, "place": "local", "samples": 1},
    "environment": {"date": "2026-01-02", "device": "a machine", "versions": {"torch": "2.13.0"}},
    "results": [
        {
            "reference": "models/one",
            "family": "llama",
            "dtype": "torch.float32",
            "suites": {
                "perplexity": {
                    "text": "essays",
                    "length": 2048,
                    "windows": 1,
                    "perplexity": 12.5,
                    "nats": 2.526,
                    "seconds": 1.0,
                    "positions": [
                        {"start": start, "tokens": 1024, "nats": 2.5, "stderr": None, "perplexity": 12.5}
                        for start in (0, 1024)
                    ],
                }
            },
        }
    ],
}


@pytest.fixture
def run(tmp_path: Path, mixed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `report` in a folder with one result."""
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "hybrid").symlink_to(mixed_folder)
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(lambda: None)
    register(app)

    def call(line: str) -> Any:
        return CliRunner().invoke(app, ["report", *line.split()])

    return call


def test_a_result_becomes_a_page(run: Run, tmp_path: Path) -> None:
    for place in ("results.json", "."):
        result = run(f"{place} --output pages/page.html --title Mine")
        assert result.exit_code == 0, result.output
        assert result.output.startswith("page       pages/page.html (")
        page = (tmp_path / "pages" / "page.html").read_text()
        assert "<h1>Mine</h1>" in page
        assert "12.50" in page
        assert "a machine" in page


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("nowhere", "nowhere"),
        ("hybrid", "results.json"),
        ("results.json --output .", "report.html"),
        ("results.json --card nowhere", "nowhere"),
        ("results.json --output results.json/page.html", "page.html"),
        # What was measured is not written over.
        ("results.json --output results.json", "results.json is no page"),
        ("results.json --output results.json/page.html --card hybrid", "page.html"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path, line: str, named: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run(line)
    assert isinstance(result.exception, HyLoError), result.output
    assert named in str(result.exception)
    assert "\n" not in str(result.exception)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_is_replaced_whole_or_not_at_all(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.html").write_text("<!DOCTYPE html>before")

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        result = run("results.json --output page.html")
    assert "cannot write page.html: No space left on device" in str(result.exception)
    assert (tmp_path / "page.html").read_text() == "<!DOCTYPE html>before"
    assert not list(tmp_path.glob(".page*"))
    assert run("results.json --output page.html").exit_code == 0
    assert "12.50" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("value", [{"format": "hylo-eval-1"}, RESULTS | {"results": ["one"]}, RESULTS | {"results": 3}])
def test_results_that_lack_something_are_named(run: Run, tmp_path: Path, value: dict[str, Any]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(value))
    result = run("results.json")
    assert isinstance(result.exception, HyLoError)
    assert "results.json is not as hylo writes it" in str(result.exception)


def test_a_run_without_its_recipe_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    result = run("run")
    assert isinstance(result.exception, HyLoError)
    assert "run.json is not as hylo writes it: KeyError 'recipe'" in str(result.exception)


@pytest.mark.parametrize(
    "changes",
    [
        {"suites": {"perplexity": {"perplexity": "much"}}},
        {"suites": {"ruler": {"lengths": {"4K": 3}}}},
        {"suites": {"commonsense": [1, 2]}},
        {"suites": []},
        {"reference": 7, "suites": {"perplexity": None}},
    ],
)
def test_results_that_were_changed_by_hand_are_told_in_one_line(
    run: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    odd = RESULTS | {"results": [RESULTS["results"][0] | changes]}
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    result = run("odd.json --output odd.html")
    assert isinstance(result.exception, HyLoError), result.output
    assert str(result.exception).startswith("odd.json")
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "odd.html").exists()
