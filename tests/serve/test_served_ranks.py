"""Tensor parallel: processes share the heads, and answer as one does."""

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")

from served_engine import TOLERANCE, engine, greedy, random_prompts, save_hybrid, worst_difference
from tiny import GEOMETRY

from hylo.errors import HyLoError

# Four heads of every kind, keys and values too.
_FOUR: dict[str, Any] = {
    "num_key_value_heads": 4,
    "mixer_geometry": GEOMETRY | {"mamba2": GEOMETRY["mamba2"] | {"num_kv_heads": 4}},
}


@pytest.mark.skipif(
    "hylo" not in {point.name for point in entry_points(group="vllm.general_plugins")},
    reason="the entry point is not installed: pip install the package again",
)
@pytest.mark.parametrize(("processes", "sizes"), [(2, {}), (4, _FOUR)])
def test_processes_answer_as_one(processes: int, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Every mixer, biases included; the workers are new processes, that know of hybrids by the entry point alone."""
    model = save_hybrid(tmp_path / "mix", "mix_of_all", num_hidden_layers=6, **sizes)
    prompts, new_tokens = random_prompts([1, 50, 17, 90]), [6, 6, 12, 6]
    with engine(tmp_path / "mix", tensor_parallel_size=processes, max_num_batched_tokens=32) as llm:
        answers = greedy(llm, prompts, new_tokens)
    assert worst_difference(model, prompts, answers) < TOLERANCE


def test_ranks_that_cannot_share_the_heads_are_refused(tmp_path: Path) -> None:
    save_hybrid(tmp_path / "mix", "mix")
    with (
        pytest.raises((HyLoError, ValueError), match="expected one of 1, 2"),
        engine(tmp_path / "mix", tensor_parallel_size=4),
    ):
        pass
