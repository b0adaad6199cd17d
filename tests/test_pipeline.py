"""The whole road on a tiny base: steps, going on, refusing, failing, and the report."""

import errno
import gc
import importlib.util
import json
import os
import resource
import shutil
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stages import KilledError, at_step, make_recipe
from tiny import sentences, write_base, write_texts

from hylo import HyLoForCausalLM, pipeline
from hylo.data.windows import make_windows
from hylo.distill.recipe import CheckpointsSection, Recipe, parse_recipe
from hylo.errors import HyLoError
from hylo.evaluate.agreement import evaluate, make_reference
from hylo.lock import locked
from hylo.pipeline import UpcycleRun
from hylo.upcycle.bases import load_model, load_tokenizer, weights_digest

STEPS = ["convert", "calibrate", "stage1", "stage2", "model", "evaluate", "report"]


@pytest.fixture(scope="module")
def recipe(base_folder: Path, text_folder: Path) -> Recipe:
    return make_recipe(base_folder, text_folder)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the start to the report."""
    output = tmp_path_factory.mktemp("runs") / "run"
    UpcycleRun(recipe, output).run()
    return output


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def step_files(output: Path) -> dict[str, tuple[int, str]]:
    return {path.parent.name: (path.stat().st_mtime_ns, path.read_text()) for path in output.glob("*/step.json")}


def names(output: Path) -> set[str]:
    """TensorBoard's folder is there where the package is."""
    return {path.name for path in output.iterdir()} - {"tensorboard"}


def test_every_step_leaves_its_folder(finished: Path) -> None:
    assert names(finished) == {*STEPS, "run.json"}
    assert set(step_files(finished)) == set(STEPS)
    for name in ("convert", "calibrate", "stage1", "stage2", "model"):
        model = load_model(finished / name)
        assert model.dtype == (torch.bfloat16 if name == "model" else torch.float32)
        assert (finished / name / "tokenizer.json").is_file()
    assert len((finished / "stage1" / "metrics.jsonl").read_text().splitlines()) == 4


def test_training_moved_the_model(finished: Path) -> None:
    weights = [load_model(finished / name).model.layers[0].mixer.o_proj.weight for name in STEPS[:4]]
    for before, after in pairwise(weights):
        assert not torch.equal(before, after)


def test_no_two_steps_have_the_same_weights(finished: Path) -> None:
    assert len({weights_digest(finished / name) for name in STEPS[:4]}) == 4


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_base_that_changed_is_noticed(base_folder: Path, text_folder: Path, tmp_path: Path, name: str) -> None:
    base = Path(shutil.copytree(base_folder, tmp_path / "base"))
    recipe = make_recipe(base, text_folder)
    run = tmp_path / "other"
    UpcycleRun(recipe, run).run(until="convert")
    (base / name).write_text((base / name).read_text() + " ")
    with pytest.raises(HyLoError, match="another recipe"):
        UpcycleRun(recipe, run).run(until="convert")


def test_a_second_run_does_nothing(finished: Path, recipe: Recipe) -> None:
    before = step_files(finished)
    results = UpcycleRun(recipe, finished).run()
    assert step_files(finished) == before
    assert list(results) == STEPS


def test_another_recipe_is_refused(run_folder: Path, base_folder: Path, text_folder: Path) -> None:
    before = step_files(run_folder)
    changed = make_recipe(base_folder, text_folder, learning_rate=2e-3)
    with pytest.raises(HyLoError, match=r"stage2.*--from stage2"):
        UpcycleRun(changed, run_folder).run()
    assert step_files(run_folder) == before
    # The recipe that made the folders stays beside them.
    assert (run_folder / "run.json").read_text().count("0.002") == 0
    UpcycleRun(changed, run_folder).run(first="stage2")
    after = step_files(run_folder)
    assert {name for name in STEPS if after[name] != before[name]} == set(STEPS[3:])


def test_first_redoes_from_there(run_folder: Path, recipe: Recipe) -> None:
    before = step_files(run_folder)
    UpcycleRun(recipe, run_folder).run(first="model")
    after = step_files(run_folder)
    assert {name for name in STEPS if after[name] != before[name]} == {"model", "evaluate", "report"}
    # The same recipe gives the same scores.
    assert json.loads(after["evaluate"][1])["result"] == json.loads(before["evaluate"][1])["result"]


def test_first_redoes_a_step_that_is_a_link(
    run_folder: Path, base_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    """What the link leads to, which may be another run's, is left alone."""
    elsewhere = tmp_path / "elsewhere"
    (run_folder / "stage2").rename(elsewhere)
    (run_folder / "stage2").symlink_to(elsewhere)
    (tmp_path / "checkpoints").mkdir()
    (run_folder / ".stage2.checkpoints").symlink_to(tmp_path / "checkpoints")
    before = (elsewhere / "step.json").read_text()
    changed = make_recipe(base_folder, text_folder, learning_rate=2e-3)
    run = UpcycleRun(changed, run_folder)
    run.run(first="stage2", until="stage2")
    assert not (run_folder / "stage2").is_symlink()
    assert json.loads((run_folder / "stage2" / "step.json").read_text())["fingerprint"] == run._fingerprints["stage2"]
    assert (elsewhere / "step.json").read_text() == before
    assert names(run_folder) == {*STEPS[:4], "run.json"}


def test_a_step_that_cannot_be_removed_is_told(
    run_folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(HyLoError, match=r"cannot remove .*/report.*: Permission denied"):
        run = UpcycleRun(recipe, run_folder)
        monkeypatch.setattr(run, "_write_run_file", lambda redo: None)
        run.run(first="report")


def test_a_step_of_another_recipe_is_not_done(run_folder: Path, base_folder: Path, text_folder: Path) -> None:
    run = UpcycleRun(make_recipe(base_folder, text_folder, learning_rate=2e-3), run_folder)
    done = {step.name: run._done(step) is not None for step in run.steps}
    assert done == {name: name in STEPS[:3] for name in STEPS}


def test_a_model_that_its_dtype_cannot_hold_is_not_saved(run_folder: Path, recipe: Recipe) -> None:
    file = run_folder / "stage2" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    narrow = recipe.model_copy(update={"save_dtype": "float16"})
    with pytest.raises(HyLoError, match=r"save_dtype: model\.norm\.weight holds 100000"):
        UpcycleRun(narrow, run_folder).run(first="model", until="model")
    assert not (run_folder / "model").exists()


def test_until_stops_and_a_later_run_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    output = tmp_path / "run"
    results = UpcycleRun(recipe, output).run(until="calibrate")
    assert list(results) == ["convert", "calibrate"]
    assert names(output) == {"convert", "calibrate", "run.json"}
    before = step_files(output)
    UpcycleRun(recipe, output).run(until="stage1")
    assert names(output) == {"convert", "calibrate", "stage1", "run.json"}
    assert {name: step_files(output)[name] for name in before} == before


def test_the_same_recipe_gives_the_same_weights(finished: Path, recipe: Recipe, tmp_path: Path) -> None:
    UpcycleRun(recipe, tmp_path / "run").run(until="stage2")
    ours, theirs = (load_model(folder / "stage2").state_dict() for folder in (finished, tmp_path / "run"))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_the_recipe_says_the_precision(
    finished: Path, recipe: Recipe, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what accelerate was configured with, whose variables may lie in the environment of a container."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    UpcycleRun(recipe, run_folder).run(first="stage2", until="stage2")
    ours, theirs = (folder / "stage2" / "model.safetensors" for folder in (run_folder, finished))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_that_cannot_write_its_own_file_may_be_started_again(recipe: Recipe, tmp_path: Path) -> None:
    """On a full disk, or killed in the middle of that file."""
    output = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(OSError, match=r"run\.json"):
            UpcycleRun(recipe, output).run(until="convert")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(output) == set()
    (output / ".run.json.partial").write_text("{")
    UpcycleRun(recipe, output).run(until="convert")
    assert names(output) == {"convert", "run.json"}


def test_a_stage_that_fails_leaves_nothing(base_folder: Path, text_folder: Path, run_folder: Path) -> None:
    diverging = make_recipe(base_folder, text_folder, learning_rate=1e30)
    with pytest.raises(HyLoError, match="stage2: "):
        UpcycleRun(diverging, run_folder).run(first="stage2")
    assert names(run_folder) == {"convert", "calibrate", "stage1", "run.json"}


@pytest.mark.parametrize("name", ["first", "until"])
def test_unknown_steps(recipe: Recipe, tmp_path: Path, name: str) -> None:
    with pytest.raises(HyLoError, match=r"'stage9'.*stage1, stage2"):
        UpcycleRun(recipe, tmp_path / "run").run(**{name: "stage9"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"evaluation": {"tokens": 256, "length": 512}}, "evaluation: no document is long enough"),
        ({"calibration": {"tokens": 256, "length": 512}}, "calibration: no document is long enough"),
        ({"documents": 1}, "stage1: no text is left to train on"),
        ({"cache": "file/cache"}, "stage1: cannot write to .*file/cache"),
        ({"packing": False, "documents": 40}, "stage1: no document is long enough"),
        ({"layout": "4ATT"}, "stage1: every layer of the layout is attention"),
        ({"family": "qwen3", "calibration": {"tokens": 256, "length": 16, "latents": True}}, "latents is true"),
    ],
)
def test_what_later_steps_would_refuse_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], named: str
) -> None:
    base = write_base(tmp_path / "base", family=changed.get("family", "llama"), head_dim=8)
    ours = ("family", "documents", "cache", "packing")
    changes = {key: value for key, value in changed.items() if key not in ours}
    (tmp_path / "file").touch()
    if "cache" in changed:
        monkeypatch.setenv("HYLO_CACHE", str(tmp_path / changed["cache"]))
    texts = tmp_path / "texts.jsonl"
    count = changed.get("documents", 40)
    texts.write_text("".join(json.dumps({"text": sentences(seed, 1)}) + "\n" for seed in range(count)))
    data = {"train": [str(texts)], "holdout": 0.2, "packing": changed.get("packing", True)}
    values = {"base": str(base), "layout": "3MLA1ATT", "data": data}
    length = 32 if changed.get("packing", True) else 512
    stage = {"name": "stage1", "objective": "kl", "length": length, "tokens": 2 * length, "learning_rate": 1e-3}
    recipe = parse_recipe(values | {"stages": [stage], "evaluation": {"tokens": 64, "length": 16}} | changes)
    with pytest.raises(HyLoError, match=named):
        UpcycleRun(recipe, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_a_prompt_with_ids_beyond_the_base(recipe: Recipe, base_folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(base_folder, tmp_path / "base"))
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    evaluation = recipe.evaluation.model_copy(update={"prompt": "<new> so"})
    asked = recipe.model_copy(update={"base": str(base), "evaluation": evaluation})
    with pytest.raises(HyLoError, match="evaluation: the tokenizer gives the prompt id 300"):
        UpcycleRun(asked, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["eval", "train"])
def test_a_tokenizer_with_ids_beyond_the_base(base_folder: Path, tmp_path: Path, where: str) -> None:
    base = Path(shutil.copytree(base_folder, tmp_path / "base"))
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    (tmp_path / "train").mkdir()
    (tmp_path / "eval.txt").write_text(sentences(7))
    recipe = make_recipe(base, write_texts(tmp_path / "train", 6))
    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"eval": make_recipe(base, tmp_path / "eval.txt").data.train})}
    )
    UpcycleRun(recipe, tmp_path / "run").run(until="convert")
    for file in [tmp_path / "eval.txt"] if where == "eval" else (tmp_path / "train").iterdir():
        file.write_text(f"<new> {file.read_text()}")
    with pytest.raises(HyLoError, match=r"gives '<new>' the id 300, and the model's config\.vocab_size is 300"):
        UpcycleRun(recipe, tmp_path / "other").run()
    assert not (tmp_path / "other").exists()


def test_text_that_is_long_enough_later_on_is_enough(base_folder: Path, tmp_path: Path) -> None:
    """What stands first would make no window."""
    texts = tmp_path / "texts.jsonl"
    lengths = [1] * 400 + [40] * 40
    texts.write_text("".join(json.dumps({"text": sentences(i, n)}) + "\n" for i, n in enumerate(lengths)))
    stage = {"name": "stage1", "objective": "kl", "length": 512, "tokens": 65_536, "learning_rate": 1e-3}
    data = {"train": [str(texts)], "packing": False}
    values = {"base": str(base_folder), "layout": "4GDN", "data": data, "stages": [stage]}
    run = UpcycleRun(parse_recipe(values | {"evaluation": {"tokens": 64, "length": 8}}), tmp_path / "run")
    with pytest.raises(HyLoError, match="no document is long enough"):
        run.corpus.prepare(tokens=512, length=512, seed=0)
    run.check()


def test_a_teacher_of_an_unknown_family(recipe: Recipe, base_folder: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(base_folder, tmp_path / "teacher"))
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    with pytest.raises(HyLoError, match="unheard-of"):
        UpcycleRun(recipe.model_copy(update={"teacher": str(teacher)}), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_a_second_run_leaves_the_first_alone(run_folder: Path, recipe: Recipe) -> None:
    """What it is at work on would look like the leftovers of a run that was killed."""
    partial = run_folder / ".stage2.partial-1234"
    partial.mkdir()
    with locked(run_folder), pytest.raises(HyLoError, match="another run is at work"):
        UpcycleRun(recipe, run_folder).run(first="stage2")
    assert partial.is_dir()
    assert (run_folder / "stage2").is_dir()
    # A lock that nobody holds any more is none.
    (run_folder / ".lock").touch()
    UpcycleRun(recipe, run_folder).run()
    assert names(run_folder) == {*STEPS, "run.json"}


def test_asking_to_stop_before_the_first_step_keeps_what_is_there(run_folder: Path, recipe: Recipe) -> None:
    before = step_files(run_folder)
    with pytest.raises(HyLoError):
        UpcycleRun(recipe, run_folder).run(first="stage2", until="convert")
    assert step_files(run_folder) == before


@pytest.fixture
def stopped(recipe: Recipe, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, killed in the third step of stage 2."""
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill)
        with pytest.raises(KilledError):
            UpcycleRun(with_checkpoints(recipe), run_folder).run(first="stage2")
    assert names(run_folder) == {"convert", "calibrate", "stage1", "run.json", ".stage2.checkpoints"}
    return run_folder


def kill() -> None:
    raise KilledError


def with_checkpoints(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"checkpoints": CheckpointsSection(steps=2)})


def test_a_stage_that_ran_out_of_memory_goes_on_with_less(
    stopped: Path, base_folder: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only spares memory is turned on in the middle, and where the stage is done makes it no other."""
    spared = make_recipe(base_folder, text_folder, gradient_checkpointing=True, mlp_chunk=8, offload=["activations"])
    UpcycleRun(spared, stopped).run(until="stage2")
    assert "stage2: going on from step 2 of 4" in capsys.readouterr().err
    UpcycleRun(make_recipe(base_folder, text_folder), stopped).run(until="stage2")
    assert "stage2: already done" in capsys.readouterr().err


def test_a_stopped_stage_goes_on(
    stopped: Path, finished: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """How often checkpoints are written, and what is done about anomalies, is no other recipe."""
    changed = recipe.model_copy(update={"on_anomaly": "skip", "report_to": []})
    UpcycleRun(changed, stopped).run()
    assert "stage2: going on from step 2 of 4" in capsys.readouterr().err
    assert names(stopped) == {*STEPS, "run.json"}
    ours, theirs = (folder / "stage2" / "model.safetensors" for folder in (stopped, finished))
    assert ours.read_bytes() == theirs.read_bytes()
    result = json.loads((stopped / "stage2" / "step.json").read_text())
    assert result["seconds"] >= result["result"]["seconds_before"]
    assert [log["step"] for log in result["result"]["logs"]] == [1, 2, 3, 4]


def test_checkpoints_of_another_recipe_are_left_alone(
    stopped: Path, base_folder: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = make_recipe(base_folder, text_folder, learning_rate=2e-3)
    UpcycleRun(changed, stopped).run(until="stage2")
    told = capsys.readouterr().err
    assert told.count("are of another recipe or text, and are not used") == 1
    assert "going on" not in told
    assert names(stopped) == {"convert", "calibrate", "stage1", "stage2", "run.json"}


def test_first_begins_a_stopped_stage_anew(stopped: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is another command than the one that was stopped."""
    UpcycleRun(recipe, stopped).run(first="stage2", until="stage2")
    assert "going on" not in capsys.readouterr().err
    assert ".stage2.checkpoints" not in names(stopped)


def test_the_same_command_with_first_goes_on(
    stopped: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a scheduler starts a job again that it stopped; what it had cleared is not cleared again."""
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill)
        with pytest.raises(KilledError):
            UpcycleRun(with_checkpoints(recipe), stopped).run(first="stage2")
    told = capsys.readouterr().err
    assert "going on with what --from stage2 began" in told
    assert "stage2: going on from step 2 of 4" in told
    UpcycleRun(with_checkpoints(recipe), stopped).run(first="stage2")
    before = step_files(stopped)
    # It is finished: now the same command is another time.
    UpcycleRun(with_checkpoints(recipe), stopped).run(first="report")
    after = step_files(stopped)
    assert {name for name in STEPS if after[name] != before[name]} == {"report"}
    UpcycleRun(with_checkpoints(recipe), stopped).run(first="report")
    assert step_files(stopped)["report"] != after["report"]


def test_a_damaged_checkpoint_stops_the_run(stopped: Path, recipe: Recipe) -> None:
    (weights,) = (stopped / ".stage2.checkpoints").rglob("model.safetensors")
    os.truncate(weights, 1000)
    with pytest.raises(HyLoError, match=r"stage2: .* is damaged .*1,000 bytes.*remove .*stage2.checkpoints"):
        UpcycleRun(recipe, stopped).run()
    assert names(stopped) == {"convert", "calibrate", "stage1", "run.json", ".stage2.checkpoints"}


def test_checkpoints_that_outlived_their_stage_go(run_folder: Path, recipe: Recipe) -> None:
    """A run killed while it removed them."""
    (run_folder / ".stage2.checkpoints" / "0123").mkdir(parents=True)
    UpcycleRun(recipe, run_folder).run()
    assert names(run_folder) == {*STEPS, "run.json"}


def test_a_reporter_that_is_not_installed(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    asked = recipe.model_copy(update={"report_to": ["wandb"]})
    with pytest.raises(HyLoError, match="wandb is not installed"):
        UpcycleRun(asked, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_report(finished: Path, recipe: Recipe, base_folder: Path) -> None:
    report = json.loads((finished / "report" / "report.json").read_text())
    assert set(report) == {
        *("base", "layout", "token_mixers", "mixer_geometry", "parameters", "base_parameters"),
        *("cache_bytes_per_token", "base_cache_bytes_per_token", "cache_ratio", "state_bytes_per_sequence"),
        *("evaluation", "scores", "samples", "prompt", "seconds", "training", "recipe", "environment"),
    }
    model, base = load_model(finished / "model"), load_model(base_folder)
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["base_parameters"] == sum(p.numel() for p in base.parameters())
    # In bfloat16: an MLA layer of 10 + 4 values and an attention layer of 2 x 2 x 8, against four of those.
    assert report["cache_bytes_per_token"] == 2 * (14 + 32)
    assert report["base_cache_bytes_per_token"] == 2 * 4 * 32
    assert report["cache_ratio"] == pytest.approx(46 / 128)
    assert list(report["scores"]) == ["base", "convert", "calibrate", "stage1", "stage2"]
    assert abs(report["scores"]["base"]["kl"]) < 1e-6
    assert report["scores"]["base"]["agreement"] == 1
    assert report["scores"]["calibrate"]["kl"] < report["scores"]["convert"]["kl"]
    assert set(report["samples"]) == {"base", "hybrid"}
    assert set(report["training"]) == {"stage1", "stage2"}
    assert set(report["seconds"]) == set(STEPS[:-1])
    assert report["recipe"] == json.loads(json.dumps(recipe.model_dump()))
    assert report["environment"]["peak_memory_bytes"] > 50e6


def test_evaluation_holds_one_model_at_a_time(
    run_folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def load(*arguments: Any) -> Any:
        nonlocal most
        gc.collect()
        alive.add(model := load_model(*arguments))
        most = max(most, len(alive))
        return model

    monkeypatch.setattr(pipeline, "load_model", load)
    UpcycleRun(recipe, run_folder).run(first="evaluate", until="evaluate")
    assert most == 1


def test_a_stage_gets_a_teacher_that_nothing_else_holds(
    run_folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the stage puts it where it is to be: what else held its weights on a GPU would keep them there."""
    read: list[weakref.ref[Any]] = []
    sent: list[Path] = []
    model_on_device = UpcycleRun._model

    def load(*arguments: Any) -> Any:
        read.append(weakref.ref(model := load_model(*arguments)))
        return model

    def send(self: UpcycleRun, folder: Path, *arguments: Any) -> Any:
        sent.append(folder)
        return model_on_device(self, folder, *arguments)

    def train(stage: Any, student: Any, teacher: Any, *_: Any, **__: Any) -> None:
        gc.collect()
        assert isinstance(teacher, HyLoForCausalLM)
        assert [model() for model in read] == [student, None]
        raise KilledError

    monkeypatch.setattr(pipeline, "load_model", load)
    monkeypatch.setattr(UpcycleRun, "_model", send)
    monkeypatch.setattr(pipeline, "train_stage", train)
    with pytest.raises(KilledError):
        UpcycleRun(recipe, run_folder).run(first="stage2")
    assert sent == [run_folder / "stage1"]


def test_plot(finished: Path) -> None:
    image = (finished / "report" / "report.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
    assert width > 1000
    assert height > 500
    assert len(image) > 20_000


def test_scores_of_the_finished_model_are_those_of_a_fresh_evaluation(finished: Path, recipe: Recipe) -> None:
    run = UpcycleRun(recipe, finished)
    held_out = run.corpus.evaluation
    batches = make_windows(held_out, run.tokenizer, 32, limit_tokens=256).batches(2)
    reference = make_reference(load_model(run.base_folder, torch.float32), batches)
    scores = evaluate(load_model(finished / "model", torch.float32), batches, reference)
    row = json.loads((finished / "report" / "report.json").read_text())["scores"]["stage2"]
    assert scores.tokens == row["tokens"]
    for key in ("perplexity", "kl", "agreement"):
        assert getattr(scores, key) == pytest.approx(row[key], rel=1e-4)


def test_without_calibration_and_stages(base_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    """The shortest recipe: convert, save, evaluate, report."""
    values = {"base": str(base_folder), "layout": "4GDN", "data": {"train": [str(text_folder)]}}
    recipe = parse_recipe(values | {"evaluation": {"tokens": 64, "length": 16}, "precision": "float32"})
    results = UpcycleRun(recipe, tmp_path / "run").run()
    assert list(results) == ["convert", "model", "evaluate", "report"]
    assert results["report"]["cache_ratio"] == 0
    assert results["report"]["samples"] == {}
    assert (tmp_path / "run" / "report" / "report.png").stat().st_size > 10_000
