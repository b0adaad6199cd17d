"""A run of two processes, student and teacher in shards (FSDP2 over gloo), against the same run of one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stages import STAGE
from test_resume import metrics
from tiny import random_packed

from hylo.distill import parallel
from hylo.distill.checkpoints import Checkpoints
from hylo.distill.engine import StageTrainer
from hylo.distill.recipe import CheckpointsSection, StageSection
from hylo.distill.trainer import Carrying, train_stage
from hylo.upcycle.bases import load_model

STAGES = ("stage1", "stage2")
STEPS = 6


@pytest.fixture(scope="module")
def recipe(base_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients are clipped in stage 2, and cross-entropy is mixed in. Four windows a step divide over two ranks."""
    stage = {"length": 32, "tokens": 32 * 4 * STEPS, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-3}
    values = {
        "base": str(base_folder),
        "layout": "GDN:0,2 MLA:1 ATT",
        "geometry": {"mla": {"kv_lora_rank": 10}},
        "data": {"train": [str(text_folder)], "holdout": 0.2},
        "calibration": {"tokens": 512, "length": 32},
        "stages": [
            stage | {"name": "stage1", "objective": "layerwise"},
            stage
            | {
                "name": "stage2",
                "objective": "kl",
                "train": "all",
                "cross_entropy": 0.1,
                "max_grad_norm": 0.5,
                "gradient_checkpointing": True,
                # Some documents are longer, on one rank or the other.
                "teacher_length": 24,
            },
        ],
        "evaluation": {"tokens": 256, "length": 32},
        "precision": "float32",
        "checkpoints": {"steps": 1},
        "report_to": [],
    }
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def start(recipe: Path, output: Path, ranks: int) -> list[subprocess.Popen[str]]:
    """One process a rank, with the variables that torchrun sets; torchrun itself stops all where one is killed."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "hylo.cli", "upcycle", str(recipe), "-o", str(output)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return processes


def finish(processes: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(outputs)
    return outputs


def wait_for(output: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    """Until there is such a file, or the process has ended."""
    deadline = time.monotonic() + 200
    while not list(output.glob(pattern)):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    finish(start(recipe, output, 1))
    return output


def assert_as_alone(output: Path, alone: Path) -> None:
    """The same steps within rounding, and weights that differ by less than a hundredth of what training changed."""
    for stage in STAGES:
        for ours, theirs in zip(metrics(output / stage), metrics(alone / stage), strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                assert ours[key] == pytest.approx(value, rel=1e-4), (stage, ours["step"], key)
    before, ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (alone / "calibrate", output / "stage2", alone / "stage2")
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        moved = (value - before[name]).norm()
        assert (ours[name] - value).norm() <= 1e-2 * moved + 1e-6, name


def test_two_ranks_make_the_steps_of_one(recipe: Path, alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    told, quiet = finish(start(recipe, output, 2))
    assert "checkpoint" in told
    # The second rank leaves the talking to the first.
    assert "stage1" not in quiet
    assert_as_alone(output, alone)
    ours, theirs = (json.loads((run / "report" / "report.json").read_text())["scores"] for run in (output, alone))
    assert ours["stage2"]["kl"] == pytest.approx(theirs["stage2"]["kl"], rel=1e-3)


@pytest.mark.parametrize("then", [1, 2])
def test_killed_and_gone_on_with_by_as_many_ranks_or_fewer(
    recipe: Path, alone: Path, tmp_path: Path, then: int
) -> None:
    output = tmp_path / "run"
    processes = start(recipe, output, 2)
    wait_for(output, ".stage2.checkpoints/*/checkpoint-3", processes[0])
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    assert "going on from step" in finish(start(recipe, output, then))[0]
    assert_as_alone(output, alone)


def test_one_rank_that_is_asked_to_stop_stops_both(recipe: Path, alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    processes = start(recipe, output, 2)
    wait_for(output, ".stage1.checkpoints/*/checkpoint-2", processes[0])
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, 128 + signal.SIGTERM)
    finish(start(recipe, output, 2))
    assert_as_alone(output, alone)


def test_muon_on_two_ranks_makes_the_steps_of_one(recipe: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = yaml.safe_load(recipe.read_text())
    for stage in values["stages"]:
        stage["optimizer"] = "muon"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    alone, output = tmp_path / "alone", tmp_path / "run"
    finish(start(path, alone, 1))
    processes = start(path, output, 2)
    wait_for(output, ".stage2.checkpoints/*/checkpoint-3", processes[0])
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, 128 + signal.SIGTERM)
    finish(start(path, output, 2))
    for stage in STAGES:
        for ours, theirs in zip(metrics(output / stage), metrics(alone / stage), strict=True):
            # Singular values are set by products in bfloat16, which shards round otherwise.
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3), (stage, ours["step"])


def train_in_a_group_of_one(_: int, student: Path, teacher: Path, output: Path, port: int) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    stage = StageSection(**STAGE | {"tokens": 16 * 2 * 2})
    wrapped: list[str] = []
    training_step = StageTrainer.training_step

    def seen(self: StageTrainer, model: torch.nn.Module, *args: Any) -> torch.Tensor:
        wrapped.append(type(model).__name__)
        return training_step(self, model, *args)

    StageTrainer.training_step = seen
    parallel.begin()
    models = load_model(student, torch.float32), load_model(teacher, torch.float32)
    checkpoints = Checkpoints("stage2", output / "checkpoints", "0" * 16)
    carrying = Carrying(checkpoints, CheckpointsSection(steps=1))
    train_stage(stage, *models, random_packed(4, 16), output, dtype=torch.float32, seed=0, carrying=carrying)
    (output / "wrapped.json").write_text(json.dumps(wrapped))
    # The group that accelerate joined for the launcher.
    assert torch.distributed.is_initialized()
    os._exit(0)


def test_a_launcher_of_one_process_wraps_nothing(base_folder: Path, mixed_folder: Path, tmp_path: Path) -> None:
    """torchrun --nproc-per-node 1: the group that there then is has nobody to reduce gradients with."""
    arguments = (mixed_folder, base_folder, tmp_path, free_port())
    torch.multiprocessing.spawn(train_in_a_group_of_one, arguments, nprocs=1)
    assert json.loads((tmp_path / "wrapped.json").read_text()) == ["HyLoForCausalLM"] * 2
    assert (tmp_path / "checkpoints" / ("0" * 16) / "checkpoint-1" / "model.safetensors").is_file()


def test_windows_that_do_not_divide_are_refused(recipe: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = yaml.safe_load(recipe.read_text())
    values["stages"][0] |= {"batch_size": 1, "accumulation": 3, "tokens": 32 * 3}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    told, quiet = finish(start(path, tmp_path / "run", 2), code=1)
    line = "stage1: 3 windows a step (batch_size 1 x accumulation 3) do not divide over 2 ranks"
    assert line in " ".join(told.split())
    assert "Traceback" not in told + quiet
    assert not (tmp_path / "run" / "convert").exists()


def test_the_checkpoint_of_one_process_is_for_one(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    [process] = start(recipe, output, 1)
    wait_for(output, ".stage1.checkpoints/*/checkpoint-2", process)
    process.kill()
    process.communicate()
    told, quiet = finish(start(recipe, output, 2), code=1)
    assert "was written by one process; go on with one" in " ".join(told.split())
    assert "Traceback" not in told + quiet
