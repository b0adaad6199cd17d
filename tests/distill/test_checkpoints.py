"""Checkpoints inside a stage: going on from them changes nothing, and damage is told in one line."""

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stages import KilledError, Runs, assert_same, at_step, send
from torch.distributed.checkpoint.api import CheckpointException

from hylo.distill.checkpoints import Checkpoints
from hylo.distill.progress import StageMonitor
from hylo.distill.shards import _as_one_error, load_model_shards, load_optimizer_shards, save_shards
from hylo.errors import HyLoError
from hylo.files import read_json


@pytest.fixture
def runs(mixed_folder: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runs]:
    def make(folder: str = "run", **stage: Any) -> Runs:
        return Runs(mixed_folder, base_folder, tmp_path / folder, monkeypatch, **stage)

    return make


CASES: dict[str, dict[str, Any]] = {
    # Ten windows: five steps of two, so that the text is gone over more than twice.
    "end to end": {},
    "mixers alone": {"train": "mixers"},
    "layerwise": {"objective": "layerwise", "train": "mixers", "name": "stage1"},
    # Two steps and a half go over the text.
    "accumulated": {"batch_size": 1, "accumulation": 4, "tokens": 16 * 4 * 9},
    # A line of metrics is the mean of three steps, which a checkpoint may part.
    "logged seldom": {"weight_decay": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_gone_on_with_is_as_if_never_stopped(
    runs: Callable[..., Runs], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "logged seldom":
        monkeypatch.setattr("hylo.distill.trainer._LOGGED_STEPS", 4)
    whole, broken = runs("whole", **CASES[case]), runs("broken", **CASES[case])
    weights, logs = whole(every=10**6)
    steps = whole.stage.steps
    for step in (2, 5, 8):
        with pytest.raises(KilledError):
            broken(killed_at=step, every=4)
    assert broken.steps() == [4]
    resumed, told = broken(every=4)
    assert_same(weights, resumed)
    assert told == logs
    assert [log["step"] for log in logs] == list(range(steps // len(logs), steps + 1, steps // len(logs)))


def test_going_on_at_the_end_of_the_text(runs: Callable[..., Runs]) -> None:
    """The text is then gone over in the order of its next time."""
    whole, broken = runs("whole"), runs("broken")
    with pytest.raises(KilledError):
        broken(killed_at=6, every=5)
    assert_same(whole(every=10**6)[0], broken(every=5)[0])


def test_keeps_the_newest(runs: Callable[..., Runs]) -> None:
    run = runs()
    for keep, expected in ((1, [10]), (3, [6, 8, 10])):
        run.checkpoints.keep = keep
        run.checkpoints.clear()
        run()
        assert run.steps() == expected


def test_what_a_checkpoint_holds(runs: Callable[..., Runs]) -> None:
    """Weights in safetensors; pickles only of what the optimizer and the generators need, and none of arguments."""
    run = runs()
    run()
    (folder,) = run.checkpoints.folder.iterdir()
    pickles = {path.name for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".bin")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for name in pickles - {"rng_state.pth"}:
        torch.load(folder / name, weights_only=True)
    assert (folder / "model.safetensors").is_file()
    assert set(read_json(folder / "checkpoint.json")["files"]) == {
        path.name for path in folder.iterdir() if path.name != "checkpoint.json"
    }


def test_by_time(runs: Callable[..., Runs], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr("hylo.distill.engine.time.monotonic", lambda: float(next(clock)))
    run = runs()
    run.checkpoints.keep = 100
    run(every=10**6)
    # 15 minutes are 45 readings of that clock, which a step reads a few times.
    assert 0 < len(run.steps()) < 11


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize("step", [5, 12])
def test_a_signal_saves_and_ends(
    runs: Callable[..., Runs], number: signal.Signals, raised: type[BaseException], step: int
) -> None:
    whole, broken = runs("whole"), runs("broken")
    weights, logs = whole(every=10**6)
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with broken.monkeypatch.context() as patch:
        at_step(patch, step, send(number))
        with pytest.raises(raised) as ended:
            broken(every=10**6)
    if number == signal.SIGTERM:
        assert ended.value.code == 143  # type: ignore[attr-defined]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert broken.steps() == [step]
    resumed, told = broken(every=10**6)
    assert_same(weights, resumed)
    assert told == logs


def test_a_signal_after_the_last_step_saves_and_ends(runs: Callable[..., Runs]) -> None:
    """It was asked for while the stage trained; the next run has no step to make, and is asked to end too."""
    whole, broken = runs("whole"), runs("broken")
    weights, logs = whole(every=10**6)
    close = StageMonitor.close
    for _ in range(2):
        with broken.monkeypatch.context() as patch:
            patch.setattr(StageMonitor, "close", lambda self: (close(self), send(signal.SIGTERM)()))
            with pytest.raises(SystemExit) as ended:
                broken(every=5)
        assert ended.value.code == 143
        assert broken.steps() == [12]
    resumed, told = broken(every=5)
    assert_same(weights, resumed)
    assert told == logs


def test_a_second_interrupt_ends_at_once(runs: Callable[..., Runs]) -> None:
    run = runs()

    def twice() -> None:
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()
        send(signal.SIGINT)()

    with run.monkeypatch.context() as patch:
        at_step(patch, 3, twice)
        with pytest.raises(KeyboardInterrupt):
            run(every=10**6)
    assert run.steps() == []


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "truncated weights": ("model.safetensors", truncate),
    "truncated optimizer": ("optimizer.pt", truncate),
    "truncated list": ("checkpoint.json", truncate),
    "no list": ("checkpoint.json", Path.unlink),
    "empty list": ("checkpoint.json", lambda path: path.write_text("{}")),
    "no generators": ("rng_state.pth", Path.unlink),
    "overwritten weights": ("model.safetensors", scramble),
    "overwritten optimizer": ("optimizer.pt", scramble),
    "overwritten state": ("trainer_state.json", scramble),
}


@pytest.fixture(scope="module")
def two_checkpoints(mixed_folder: Path, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A stage killed with the checkpoints of steps 4 and 6."""
    with pytest.MonkeyPatch.context() as patch:
        run = Runs(mixed_folder, base_folder, tmp_path_factory.mktemp("two"), patch)
        run.checkpoints.keep = 2
        with pytest.raises(KilledError):
            run(killed_at=7)
    return run


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_falls_back_or_is_one_line(
    two_checkpoints: Runs, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, damage = DAMAGE[case]
    root = Path(shutil.copytree(two_checkpoints.checkpoints.root, tmp_path / "checkpoints"))
    checkpoints = Checkpoints("stage2", root, "0123456789abcdef0123", keep=2)
    damage(checkpoints.folder / "checkpoint-6" / name)
    capsys.readouterr()
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 4
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    for part in ("stage2", "checkpoint-6 is damaged", "the one at step 4"):
        assert part in told
    # It would count as the newest.
    assert [path.name for path in checkpoints.folder.iterdir()] == ["checkpoint-4"]
    damage(checkpoints.folder / "checkpoint-4" / name)
    with pytest.raises(HyLoError, match=r"stage2: .*checkpoint-4 is damaged.*no other; remove .* to begin") as error:
        checkpoints.latest()
    assert "\n" not in str(error.value)
    assert (checkpoints.folder / "checkpoint-4").is_dir()


def test_going_on_from_the_one_before(runs: Callable[..., Runs]) -> None:
    whole, broken = runs("whole"), runs("broken")
    broken.checkpoints.keep = 2
    with pytest.raises(KilledError):
        broken(killed_at=7)
    truncate(broken.checkpoints.folder / "checkpoint-6" / "optimizer.pt")
    weights, logs = broken()
    expected, told = whole(every=10**6)
    assert_same(weights, expected)
    assert logs == told


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where",
    ["torch.save", "transformers.PreTrainedModel.save_pretrained", "hylo.distill.checkpoints.sync_tree"],
)
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    runs: Callable[..., Runs], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = runs("whole"), runs("run")
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: patch.setattr(where, no_space))
        with pytest.raises(HyLoError, match=r"stage2: the checkpoint at step 6 .*No space.*step 4 stays") as error:
            run()
    assert "\n" not in str(error.value)
    assert run.steps() == [4]
    assert_same(run()[0], whole(every=10**6)[0])


def test_what_torch_says_of_a_full_disk(runs: Callable[..., Runs], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its versions do not agree, and none raises an OSError; what is no word of its writers stays a traceback."""
    run = runs()
    words = ["[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0", "basic_ios::clear: iostream error"]
    for said in words:
        with monkeypatch.context() as patch:
            patch.setattr("torch.save", lambda *_, said=said, **__: (_ for _ in ()).throw(RuntimeError(said)))
            with pytest.raises(HyLoError, match=r"the checkpoint at step 2 .*torch.save failed, as on a full disk"):
                run()
    with monkeypatch.context() as patch:
        patch.setattr("torch.save", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a bug")))
        with pytest.raises(RuntimeError, match="a bug"):
            run()


@pytest.mark.parametrize("limit", [1000, 100_000, 300_000])
def test_files_that_really_cannot_grow(runs: Callable[..., Runs], limit: int) -> None:
    """The system's own limit on a file's size, as a full disk: whatever writes, the error is the same one line."""
    run = runs()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    with run.monkeypatch.context() as patch:
        at_step(patch, 3, fill)
        try:
            with pytest.raises(HyLoError, match=r"stage2: the checkpoint at step 4 .*; the one at step 2 stays"):
                run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.steps() == [2]


def test_a_first_checkpoint_that_fails_leaves_nothing(runs: Callable[..., Runs]) -> None:
    run = runs()
    with run.monkeypatch.context() as patch:
        patch.setattr("torch.save", no_space)
        with pytest.raises(HyLoError, match="checkpoint at step 2"):
            run()
    assert not run.checkpoints.root.exists()


def test_another_fingerprint_finds_nothing(two_checkpoints: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    root = two_checkpoints.checkpoints.root
    capsys.readouterr()
    assert Checkpoints("stage2", root, "f" * 64).latest() is None
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "another recipe or text" in told
    assert two_checkpoints.steps() == [4, 6]
    assert Checkpoints("stage2", root.parent / "nothing", "f" * 64).latest() is None
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_shards_of_an_optimizer_before_its_first_step(tmp_path: Path) -> None:
    """As where the first steps are refused: writing and reading make no step of their own."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    save_shards(tmp_path / "0", model, optimizer)
    load_model_shards(tmp_path / "0", model)
    load_optimizer_shards(tmp_path / "0", model, optimizer)
    assert not optimizer.state
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    save_shards(tmp_path / "1", model, optimizer)
    other = torch.optim.AdamW(model.parameters(), lr=0.1)
    load_optimizer_shards(tmp_path / "1", model, other)
    assert [int(state["step"]) for state in other.state.values()] == [1, 1]


def test_what_a_rank_could_not_write_is_named(tmp_path: Path) -> None:
    """torch gathers the errors of all ranks, and writing names no file."""
    failed = CheckpointException("save", {1: (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), None)})
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"), _as_one_error(tmp_path):
        raise failed


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_lost_optimizer_is_an_error(tmp_path: Path) -> None:
    """And not one that had made no step."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_shards(tmp_path / "1", model, optimizer)
    shutil.rmtree(tmp_path / "1" / "optimizer-shards")
    with pytest.raises(OSError, match=str(tmp_path / "1")):
        load_optimizer_shards(tmp_path / "1", model, optimizer)
