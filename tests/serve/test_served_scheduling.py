"""What a scheduler does to a hybrid's caches: prompts in pieces, requests thrown out and resumed, shared prefixes."""

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")

from served_engine import TOLERANCE, engine, greedy, random_prompts, save_hybrid, worst_difference

from hylo.errors import HyLoError

# Layouts that between them have each kind of cache: keys and values, a window of them, and every kind of state.
NAMES = ["mix", "mix_of_all"]
# Enough for four prompts of one block a group of layers, too few for their answers. Block 0 is never used.
BLOCKS = {"mix": 12, "mix_of_all": 26}


def preemptions(llm: object) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


@pytest.mark.parametrize("name", NAMES)
def test_preempted_requests_go_on_where_they_were(name: str, tmp_path: Path) -> None:
    """A cache with room for the prompts but not for the answers."""
    model = save_hybrid(tmp_path / name, name)
    prompts, new_tokens = random_prompts([60, 55, 50, 61]), [80, 90, 70, 85]
    with engine(tmp_path / name, block_size=64, num_gpu_blocks_override=BLOCKS[name], disable_log_stats=False) as llm:
        answers = greedy(llm, prompts, new_tokens)
        assert preemptions(llm) > 0
    assert worst_difference(model, prompts, answers) < TOLERANCE


@pytest.mark.parametrize("name", ["mix", "kda", "mamba2_bias"])
def test_a_shared_prefix_is_read_once(name: str, tmp_path: Path) -> None:
    """Keys and values, latents and states at block boundaries are found again."""
    model = save_hybrid(tmp_path / name, name)
    shared = random_prompts([130])[0]
    prompts = [shared + tail for tail in random_prompts([5, 40, 70], seed=2)]
    with engine(tmp_path / name, enable_prefix_caching=True, block_size=32, max_num_batched_tokens=64) as llm:
        first = greedy(llm, prompts[:1], [6])
        answers = first + greedy(llm, prompts[1:], [6, 6])
        cached = [answer.num_cached_tokens for answer in answers]
    assert cached[0] == 0 and min(cached[1:]) >= 96, cached
    assert worst_difference(model, prompts, answers) < TOLERANCE


def test_prefixes_of_states_of_two_sizes_are_refused(tmp_path: Path) -> None:
    save_hybrid(tmp_path / "mix", "mix_of_all")
    with (
        pytest.raises((HyLoError, ValueError), match="prefix caching: the states of gdn, kda, mamba2 differ in size"),
        engine(tmp_path / "mix", enable_prefix_caching=True),
    ):
        pass


@pytest.mark.parametrize("name", NAMES)
def test_a_cancelled_request_leaves_its_slots(name: str, tmp_path: Path) -> None:
    """What is left of one request is not read by the next that gets its slots, if it begins with one token too."""
    from vllm import SamplingParams

    model = save_hybrid(tmp_path / name, name)
    prompts = random_prompts([20, 1, 30, 1, 1, 1])
    # Few blocks: all have been used before the last prompt.
    with engine(tmp_path / name, max_num_seqs=1, block_size=64, num_gpu_blocks_override=BLOCKS[name]) as llm:
        llm.llm_engine.add_request(
            "cancelled", {"prompt_token_ids": prompts[0]}, SamplingParams(max_tokens=50, detokenize=False)
        )
        for _ in range(5):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(["cancelled"])
        answers = greedy(llm, prompts, [10] * len(prompts))
    assert worst_difference(model, prompts, answers) < TOLERANCE


def test_guesses_are_refused(tmp_path: Path) -> None:
    save_hybrid(tmp_path / "mix", "mix")
    guesses = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    with (
        pytest.raises((HyLoError, ValueError), match="a hybrid's states cannot be taken back"),
        engine(tmp_path / "mix", speculative_config=guesses),
    ):
        pass
