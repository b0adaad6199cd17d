"""Every mixer, with all that a base may add to it, served as the model itself computes it."""

from pathlib import Path

import pytest
from tiny import HYBRIDS

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")

from served_engine import TOLERANCE, engine, greedy, random_prompts, save_hybrid, worst_difference


@pytest.mark.parametrize("name", HYBRIDS)
def test_answers_are_the_models_own(name: str, tmp_path: Path) -> None:
    """More prompts than run at once, longer than a step reads: batches mix decoding with pieces of prompts."""
    model = save_hybrid(tmp_path / name, name)
    lengths = [1, 100, 3, 17, 40, 2, 75, 9]
    new_tokens = [12, 5, 20, 1, 9, 16, 3, 7]
    prompts = random_prompts(lengths)
    with engine(tmp_path / name, max_num_batched_tokens=32) as llm:
        answers = greedy(llm, prompts, new_tokens)
    assert [len(answer.outputs[0].token_ids) for answer in answers] == new_tokens
    assert worst_difference(model, prompts, answers) < TOLERANCE
