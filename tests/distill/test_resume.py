"""`hylo upcycle` really killed, at random moments, and run again: the same weights and metrics, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from stages import MEASURED

STAGES = ("stage1", "stage2")


@pytest.fixture
def recipe(base_folder: Path, text_folder: Path, tmp_path: Path) -> Path:
    """Two stages of forty steps, with a checkpoint after each: half of the time one is being written."""
    stage = {"length": 32, "tokens": 32 * 2 * 40, "batch_size": 2, "learning_rate": 1e-3}
    values = {
        "base": str(base_folder),
        "layout": "GDN:0,2 MLA:1 ATT",
        "geometry": {"mla": {"kv_lora_rank": 10}},
        "data": {"train": [str(text_folder)], "holdout": 0.2},
        "stages": [
            stage | {"name": "stage1", "objective": "layerwise"},
            stage | {"name": "stage2", "objective": "kl", "train": "all"},
        ],
        "precision": "float32",
        "checkpoints": {"steps": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(recipe: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hylo.cli", "upcycle", str(recipe), "-o", str(output), "--until", "stage2"]
    # Sums are made in the same order only by as many threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def training(output: Path) -> set[Path]:
    """The stages that train, or did when they were killed."""
    return set(output.glob(".*.partial-*/metrics.jsonl"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def test_killed_at_random_moments(recipe: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(recipe, whole)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    moments = random.Random(int(os.environ.get("HYLO_TEST_SEED", "4")))
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
    codes = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
    told = []
    for number in signals:
        before = training(broken)
        process = start(recipe, broken)
        while process.poll() is None and not training(broken) - before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.8))
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        told.append(output)
        assert process.returncode in (0, codes[number]), output
        assert "Traceback" not in output
        if number != signal.SIGKILL:
            assert not list(broken.glob(".*.partial-*"))
    process = start(recipe, broken)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert any("going on from step" in output for output in told)
    for stage in STAGES:
        files = [folder / stage / "model.safetensors" for folder in (whole, broken)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert metrics(broken / stage) == metrics(whole / stage)
        assert [line["step"] for line in metrics(broken / stage)] == list(range(1, 41))
    assert sorted(path.name for path in broken.iterdir() if path.name != "tensorboard") == [
        *("convert", "run.json"),
        *STAGES,
    ]
