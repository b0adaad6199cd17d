"""The bars that SmolLM2's recipe is held against, and what its figures are read from."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import smollm2
from jobs import Job
from smollm2 import BARS, all_recipes, check_runs, figures, recipe_values, rise, scores_of, verdicts
from variants import corpus_digest

from hylo.distill.recipe import parse_recipe
from hylo.errors import HyLoError

BASE = {"commonsense": 0.5, "perplexity": 10.0, "ruler-4096": 0.4, "ruler-16384": 0.02, "ruler-32768": 0.0}


def held(base: dict[str, float | None], hybrid: dict[str, float | None]) -> dict[str, Any]:
    rows = verdicts(base, hybrid, {})
    return {key: row for (key, *_), row in zip(BARS, rows, strict=True)}


def test_bars_on_both_sides() -> None:
    good = {"cache": 0.0667, "commonsense": 0.485, "perplexity": 10.8, "ruler-4096": 0.34, "ruler-16384": 0.04}
    rows = held(BASE, good | {"rise-essays": 1.1})
    for key in [*good, "rise-essays"]:
        assert rows[key]["holds"] is True, key
    assert rows["commonsense"]["value"] == pytest.approx(0.97)
    assert rows["cache"]["value"] == 0.0667
    bad = {"cache": 0.0701, "commonsense": 0.48, "perplexity": 10.9, "ruler-4096": 0.33, "ruler-16384": 0.03}
    rows = held(BASE, bad | {"rise-essays": 1.2})
    for key in [*bad, "rise-essays"]:
        assert rows[key]["holds"] is False, key


def test_what_is_not_measured_is_no_verdict() -> None:
    assert all(row["holds"] is None and row["value"] is None for row in held({}, {}).values())
    # Without the base a share is none; what is absolute is judged.
    rows = held({}, {"cache": 0.05, "commonsense": 0.5})
    assert (rows["cache"]["holds"], rows["commonsense"]["holds"]) == (True, None)


def test_a_base_that_scores_nothing_is_no_divisor() -> None:
    rows = held(BASE, {"ruler-32768": 0.1})
    assert (rows["ruler-32768"]["value"], rows["ruler-32768"]["holds"]) == (None, True)
    # Twice nothing is not enough.
    assert held(BASE, {"ruler-32768": 0.0})["ruler-32768"]["holds"] is False


def test_the_control_is_told_as_the_hybrid_is() -> None:
    row = verdicts(BASE, {"commonsense": 0.5}, {"commonsense": 0.4})[1]
    assert (row["value"], row["control"]) == (1.0, pytest.approx(0.8))


def test_a_curve_that_rises_past_8k() -> None:
    places = [{"start": start, "tokens": 1024, "nats": 2.0} for start in range(0, 32768, 1024)]
    assert rise(places) == pytest.approx(1.0)
    # The first 2K tokens, which have little before them, are not what the rest is measured by.
    places[0]["nats"] = 9.0
    assert rise(places) == pytest.approx(1.0)
    for place in places[8:]:
        place["nats"] = 2.0 + 0.6931
    assert rise(places) == pytest.approx(2.0, rel=1e-3)
    assert rise(places[:8]) is None


def test_scores_are_gathered_from_jobs_that_ended(tmp_path: Path) -> None:
    def write(name: str, suites: dict[str, Any], ended: bool = True) -> None:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"results": [{"suites": suites}]}))
        if ended:
            (folder / "job.json").write_text("{}")

    places = [{"start": start, "tokens": 1024, "nats": 2.0, "perplexity": 7.4} for start in range(0, 16384, 1024)]
    write("ruler-16384", {"ruler": {"lengths": {"16384": {"mean": {"value": 0.1}}}}})
    write("ruler-4096", {"ruler": {"lengths": {"4096": {"mean": {"value": 0.3}}}}})
    write("ruler-8192", {"ruler": {"lengths": {"8192": {"mean": {"value": 0.2}}}}}, ended=False)
    write("short", {"perplexity": {"perplexity": 9.0, "positions": places[:2]}})
    write("positions-held-out", {"perplexity": {"perplexity": 8.0, "positions": places}})
    write("commonsense", {"commonsense": {"mean": {"value": 0.4}}})
    write("bits", {"gsm8k": {"bits_per_byte": {"value": 0.9}}})
    write("ruler-vllm", {"ruler": {"lengths": {"4096": {"mean": {"value": 0.7}}}}})
    names = [path.name for path in tmp_path.iterdir()]
    assert scores_of(tmp_path, ["ruler-vllm"])["ruler"] == {"4096": {"mean": {"value": 0.7}}}
    scores = scores_of(tmp_path, set(names) - {"ruler-vllm"})
    assert list(scores["ruler"]) == ["4096", "16384"]
    assert scores["gsm8k_bits_per_byte"] == {"value": 0.9}
    assert figures(scores) == {
        "commonsense": 0.4,
        "perplexity": 9.0,
        "ruler-4096": 0.3,
        "ruler-16384": 0.1,
        "rise-held-out": pytest.approx(1.0),
    }


def test_tokens_are_scaled_and_unknown_recipes_refused() -> None:
    whole, tenth = (parse_recipe(recipe_values("hybrid", scale, ["seed=3"])) for scale in (1, 0.1))
    assert tenth.seed == 3
    for one, other in zip(whole.stages, tenth.stages, strict=True):
        assert other.tokens == pytest.approx(0.1 * one.tokens, abs=1)
    with pytest.raises(HyLoError, match="no recipe 'nothing'"):
        recipe_values("nothing", 1, [])
    with pytest.raises(HyLoError, match="less than one step"):
        recipe_values("hybrid", 1e-4, [])


@pytest.mark.parametrize("names", [["hybrid", "alt/hybrid.yaml"], ["base.yaml"], ["my recipe.yaml"], ["evaluate"]])
def test_runs_have_names_of_their_own(names: list[str]) -> None:
    with pytest.raises(HyLoError, match="a name of its own"):
        all_recipes(names, 1.0, [])


@pytest.mark.parametrize(
    ("scale", "changes", "named"),
    [
        (float("nan"), [], "--scale nan"),
        (float("inf"), [], "--scale inf"),
        (1.0, ["stages=null"], "without a stage of KL"),
        (1.0, ["stages.stage2.tokens=x"], "number of tokens"),
        (1.0, ["seed=[1"], "is no value"),
    ],
)
def test_bad_settings_are_one_line(scale: float, changes: list[str], named: str) -> None:
    with pytest.raises(HyLoError, match=named):
        recipe_values("hybrid", scale, changes)


def test_a_run_of_another_recipe_is_no_result(tmp_path: Path) -> None:
    values = recipe_values("hybrid", 0.1, [])
    run = tmp_path / "hybrid" / "run"
    run.mkdir(parents=True)
    made = parse_recipe(values).model_dump()
    (run / "run.json").write_text(json.dumps({"recipe": made | {"on_anomaly": "skip"}}))
    check_runs({"hybrid": values}, tmp_path)
    with pytest.raises(HyLoError, match="was made with other stages"):
        check_runs({"hybrid": recipe_values("hybrid", 0.2, [])}, tmp_path)


def test_corpora_are_told_by_what_they_hold(tmp_path: Path) -> None:
    for name, text in (("one", "a"), ("same", "a"), ("other", "b")):
        (tmp_path / name / "tokens" / "prose").mkdir(parents=True)
        (tmp_path / name / "held-out").mkdir()
        (tmp_path / name / "tokens" / "prose" / "00000").write_text(text)
    one, same, other = (corpus_digest(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same != other


def test_a_job_that_was_stopped_is_counted_and_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had written by then was measured; one that ended is not run a second time."""
    (tmp_path / "tokens").mkdir()
    place = tmp_path / "evaluate" / "base" / "ruler-vllm"
    code = (
        "import json, pathlib, sys; folder = pathlib.Path(sys.argv[1]); runs = folder / 'runs'\n"
        "count = len(runs.read_text()) if runs.exists() else 0; runs.write_text('x' * (count + 1))\n"
        "lengths = {str(2048 * 2 ** i): {'mean': {'value': 0.5}} for i in range(count + 1)}\n"
        "(folder / 'results.json').write_text(json.dumps({'results': [{'suites': {'ruler': {'lengths': lengths}}}]}))\n"
        "sys.exit(count == 0)\n"
    )
    job = Job("base ruler-vllm", [sys.executable, "-c", code, str(place)], place / "log.txt", tmp_path)
    monkeypatch.setattr(smollm2, "evaluation_jobs", lambda *_: [(job, place / "results.json")])
    asked = argparse.Namespace(data=tmp_path, gpus=[])
    models, folder = {"base": ("somewhere", "")}, tmp_path / "evaluate"
    for sound, lengths in ((False, ["2048"]), (True, ["2048", "4096"]), (True, ["2048", "4096"])):
        assert smollm2.evaluate(models, folder, asked) is sound
        assert list(scores_of(place.parent, ["ruler-vllm"])["ruler"]) == lengths
