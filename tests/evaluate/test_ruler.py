"""RULER's prompts: lengths, keys, depths, answers; against what the harness's own copy says of them."""

import ast
import importlib.util
import json
import random
import re
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import make_tokenizer

from hylo.errors import HyLoError
from hylo.evaluate.data import LocalData
from hylo.evaluate.ruler import (
    TASKS,
    Sample,
    available_tasks,
    generate,
    left_out,
    make_samples,
    repeated_documents,
    samples_digest,
    score,
)
from hylo.evaluate.ruler.generate import fit
from hylo.evaluate.ruler.tasks import Draft
from hylo.evaluate.ruler.words import DEPTHS, all_words

OFFLINE = [name for name in TASKS if name != "qa_hotpotqa"]
NEEDLE = re.compile(r"One of the special magic (?:number|uuid)s? for (\S+) is: (\S+)\.")
ASKED = re.compile(r"magic \w+ for ([\w, -]+) mentioned in the provided text\?")
# The largest part of a prompt that can be left out, in tokens of SmolLM2: a word, a line, a document.
UNIT = {
    "niah_single_1": 25,
    "niah_multikey_2": 40,
    "niah_multikey_3": 100,
    "vt": 26,
    "fwe": 24,
    "cwe": 130,
    "qa_squad": 700,
}


@pytest.fixture(scope="module")
def samples(smollm2_tokenizer: Any) -> list[Sample]:
    return make_samples(smollm2_tokenizer, OFFLINE, [1024, 4096], 3)


def read(sample: Sample) -> str:
    """Answers from the prompt alone, by doing what it asks."""
    prompt = sample.prompt
    if sample.task.startswith("niah"):
        asked = ASKED.findall(prompt)[-1]
        keys = re.split(r", and |, ", asked)
        return " ".join(value for key, value in NEEDLE.findall(prompt) if key in keys)
    if sample.task == "vt":
        question = prompt[prompt.rindex("Memorize and track") :]
        value = re.search(r"assigned the value (\d+)", question)
        assert value is not None
        names = re.findall(rf"VAR (\w+) = {value[1]}", question)
        for name in names:
            names += re.findall(rf"VAR (\w+) = VAR {name} ", question)
        return " ".join(names)
    if sample.task == "cwe":
        listed = prompt[prompt.rindex("Below is a numbered") : prompt.rindex("Question:")]
        counts = Counter(re.findall(r"\d+\. (\S+)", listed))
        return " ".join(word for word, _ in counts.most_common(10))
    if sample.task == "fwe":
        text = prompt[prompt.index("coded words. ") + 13 : prompt.rindex("\nQuestion:")]
        counts = Counter(word for word in text.split() if word != "...")
        return " ".join(word for word, _ in counts.most_common(3))
    return prompt


def test_whoever_reads_the_prompt_scores_100_and_silence_0(samples: list[Sample]) -> None:
    for sample in samples:
        assert score(sample.task, read(sample), sample.wanted) == 1, (sample.task, sample.length)
        assert score(sample.task, "", sample.wanted) == 0
        assert score(sample.task, "I do not know.", sample.wanted) == 0


def test_prompts_fill_their_length_to_within_one_unit(samples: list[Sample], smollm2_tokenizer: Any) -> None:
    for sample in samples:
        assert sample.tokens == len(smollm2_tokenizer(sample.prompt)["input_ids"])
        assert sample.new_tokens == TASKS[sample.task].new_tokens
        unused = sample.length - sample.tokens - sample.new_tokens
        assert 0 <= unused < UNIT.get(sample.task, 8), (sample.task, unused)


def test_keys_and_values_stand_once(samples: list[Sample]) -> None:
    counted = 0
    for sample in samples:
        if not sample.task.startswith("niah"):
            continue
        found = NEEDLE.findall(sample.prompt)
        values = [value for _, value in found]
        assert len(set(values)) == len(values)
        keys = Counter(key for key, _ in found)
        assert set(keys.values()) == ({4} if sample.task == "niah_multivalue" else {1})
        counted += len(found)
    assert counted > 300


def test_needles_stand_at_their_depth_and_cover_all(smollm2_tokenizer: Any) -> None:
    for task in ("niah_single_1", "niah_single_2", "niah_multikey_3"):
        made = make_samples(smollm2_tokenizer, [task], [2048], len(DEPTHS))
        assert sorted(sample.depth for sample in made) == sorted(DEPTHS)
        for sample in made:
            context = sample.prompt[sample.prompt.index("afterwards.\n") + 12 : sample.prompt.rindex("\nWhat is")]
            at = context.index(f"is: {sample.wanted[0]}.") / len(context)
            # A needle takes some room itself, and stands between sentences.
            assert abs(100 * at - sample.depth) < 9, (task, sample.depth)


def test_a_seed_gives_the_same_prompts_in_any_number_of_processes(smollm2_tokenizer: Any) -> None:
    tasks = ["niah_multikey_1", "cwe", "qa_squad"]
    one = make_samples(smollm2_tokenizer, tasks, [1024, 2048], 12, workers=1)
    assert [(s.length, s.task, s.index) for s in one] == [
        (n, t, i) for n in (1024, 2048) for t in tasks for i in range(12)
    ]
    two = make_samples(smollm2_tokenizer, tasks, [1024, 2048], 12, workers=2)
    assert samples_digest(one) == samples_digest(two)
    fewer = make_samples(smollm2_tokenizer, tasks, [2048], 3, workers=1)
    assert fewer == [sample for sample in one if sample.length == 2048 and sample.index < 3]
    other = make_samples(smollm2_tokenizer, tasks, [1024, 2048], 12, seed=1, workers=1)
    assert not {sample.prompt for sample in other} & {sample.prompt for sample in one}


def test_lengths_are_those_of_the_tokenizer_that_is_given() -> None:
    """A tokenizer of few words needs several times the tokens for the same text."""
    tokenizer = make_tokenizer()
    for sample in make_samples(tokenizer, OFFLINE, [8192], 1):
        assert sample.tokens == len(tokenizer(sample.prompt)["input_ids"])
        assert sample.tokens + sample.new_tokens <= 8192
        assert score(sample.task, read(sample), sample.wanted) == 1


def test_a_chat_template_is_counted_and_the_answer_is_begun(smollm2_tokenizer: Any) -> None:
    (sample,) = make_samples(smollm2_tokenizer, ["niah_single_2"], [1024], 1, chat=True)
    assert sample.prompt.startswith("<|im_start|>")
    assert re.search(r"<\|im_start\|>assistant\nThe special magic number for \S+ mentioned.* is$", sample.prompt)
    assert sample.tokens == len(smollm2_tokenizer(sample.prompt, add_special_tokens=False)["input_ids"])
    assert not sample.special
    assert 1024 - 8 < sample.tokens + sample.new_tokens <= 1024
    with pytest.raises(HyLoError, match="chat template"):
        make_samples(make_tokenizer(), ["niah_single_2"], [1024], 1, chat=True)


def test_too_short_a_length_names_the_task(smollm2_tokenizer: Any) -> None:
    with pytest.raises(HyLoError, match="256 tokens are too few for RULER's vt"):
        make_samples(smollm2_tokenizer, ["vt"], [256], 1)
    with pytest.raises(HyLoError, match="'niah_4'"):
        available_tasks(LocalData(), ["niah_4"])


def test_too_short_a_length_is_told_before_anything_is_made(
    smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the others are, and however many processes would make them."""
    monkeypatch.setattr(generate, "ProcessPoolExecutor", lambda *_: pytest.fail("processes were started"))
    monkeypatch.setattr(generate.Maker, "__call__", lambda *_: pytest.fail("prompts were made"))
    for workers in (1, 2):
        with pytest.raises(HyLoError, match="100 tokens are too few"):
            make_samples(smollm2_tokenizer, OFFLINE, [65536, 100], 50, workers=workers)


def test_a_task_that_fits_no_sample_is_left_out_at_that_length_alone(smollm2_tokenizer: Any) -> None:
    tasks = ["niah_single_1", "vt"]
    made = make_samples(smollm2_tokenizer, tasks, [256, 1024], 2)
    assert [(sample.length, sample.task) for sample in made[::2]] == [
        (256, "niah_single_1"),
        (1024, "niah_single_1"),
        (1024, "vt"),
    ]
    assert left_out(made, tasks) == {256: {"vt": "no sample fits 256 tokens"}, 1024: {}}
    # The others are what they are by themselves.
    assert made[2:] == make_samples(smollm2_tokenizer, tasks, [1024], 2)


def test_a_question_that_does_not_fit_gives_way_to_the_next(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    """Of 40 questions a third are over a paragraph that is too long for 1K."""
    items = [
        {
            "question": f"Which town lies by river {i}?",
            "answer": f"Town{i}",
            "context": [[f"Title {i}", [f"Town{i} lies by river {i}. ", "It is old. " * (400 if i % 3 == 0 else 30)]]],
        }
        for i in range(40)
    ]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(items))
    data = LocalData.at(tmp_path)
    make = partial(make_samples, smollm2_tokenizer, ["qa_hotpotqa"], data=data)
    short, long = make([1024], 12), make([4096], 30)
    assert len(short) == 12
    assert [sample.index for sample in short] == list(range(12))
    assert all(sample.tokens + sample.new_tokens <= 1024 for sample in short)
    # In the order of the longer length, without those that are too long, and none twice.
    fitting = [sample.wanted for sample in long if int(sample.wanted[0][4:]) % 3]
    assert [sample.wanted for sample in short] == fitting[:12]
    assert make([1024], 12, workers=2) == short
    # A prompt of 32K needs more than these paragraphs.
    assert repeated_documents(short + long, data) == {}
    words = "qa_hotpotqa at 32,768 repeats some of its 40 paragraphs"
    assert repeated_documents(make([32768], 1), data) == {32768: [words]}
    # There are 26 in all; more are not made up.
    assert len({sample.wanted[0] for sample in make([1024], 35)}) == len(make([1024], 35)) == 26


def harness_constants(name: str) -> dict[str, Any]:
    """What the harness's file assigns, without running it: some of these files download when they are imported."""
    found = importlib.util.find_spec("lm_eval")
    assert found is not None
    folder = Path(found.submodule_search_locations[0]) / "tasks" / "ruler"
    values = {}
    for node in ast.parse((folder / name).read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return values


def test_prompts_are_worded_as_in_the_harness(samples: list[Sample]) -> None:
    by_task = {sample.task: sample.prompt for sample in samples if sample.length == 4096 and sample.index == 0}
    niah = harness_constants("niah_utils.py")["TEMPLATE"]
    begin, end = niah.split("{context}")
    for task, prompt in by_task.items():
        if not task.startswith("niah"):
            continue
        kind = "uuid" if task in ("niah_single_3", "niah_multikey_3") else "number"
        one = task not in ("niah_multivalue", "niah_multiquery")
        words = [begin, end]
        if one:
            words = [w.replace("Some", "A").replace("are all", "is").replace("are", "is") for w in words]
        kind = kind if one else f"{kind}s"
        assert prompt.startswith(words[0].format(type_needle_v=kind))
        query = ASKED.findall(prompt)[-1]
        question = words[1].format(type_needle_v=kind, query=query)
        prefix = f"The special magic {kind} for {query} mentioned in the provided text {'is' if one else 'are'}"
        assert prompt.endswith(f"{question} {prefix}")
    for task, file, key in (
        ("vt", "vt_utils.py", "variable_tracking"),
        ("cwe", "cwe_utils.py", ""),
        ("fwe", "fwe_utils.py", ""),
    ):
        config = harness_constants(file)["CONFIG"]
        config = config[key] if key else config
        assert config["tokens_to_generate"] == TASKS[task].new_tokens
        prompt = by_task[task]
        begin, end = config["template"].split("{context}")
        # The worked examples of vt and cwe begin as the question does.
        assert prompt.startswith(begin)
        assert prompt.count(begin) == (1 if task == "fwe" else 2)
        asked = (
            re.escape(end + config["answer_prefix"].rstrip()).replace(r"\{query\}", r"\d+").replace(r"\{num_v\}", "5")
        )
        assert re.search(f"{asked}$", prompt)
    qa = harness_constants("qa_utils.py")
    begin, end = qa["CONFIG"]["template"].split("{context}")
    assert by_task["qa_squad"].startswith(begin + "Document 1:\n")
    assert re.search(re.escape(end).replace(r"\{query\}", ".*") + " Answer:$", by_task["qa_squad"])


def drawn_by(sample: Sample) -> random.Random:
    """The generator that a sample was made with, at its start."""
    return random.Random(f"0/{sample.task}/{sample.length}/{sample.index}")


def test_variable_tracking_is_the_harness_s_prompt_to_the_letter(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own code, drawing from the same generator, makes the worked example, its answer and the question."""
    from lm_eval.tasks.ruler import vt_utils

    for sample in [sample for sample in samples if sample.task == "vt"]:
        rng = drawn_by(sample)
        monkeypatch.setattr(vt_utils, "random", rng)
        drawing = SimpleNamespace(randint=lambda low, high, rng=rng: rng.randint(low, high - 1))
        monkeypatch.setattr(vt_utils, "np", SimpleNamespace(random=drawing))
        example, question = sample.prompt.split("\n\n\n\n")
        begun, names = vt_utils.generate_input_output(example.count("grass"), 1, 4, is_icl=True)
        asked, _ = vt_utils.generate_input_output(question.count("grass"), 1, 4)
        # As `sys_vartrack_w_noise_random` lays them together.
        built = f"{begun} {' '.join(names)}\n\n" + "\n\n" + asked
        assert sample.prompt == built.rstrip()


def test_common_words_is_the_harness_s_prompt_to_the_letter(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worked example stands in RULER's prompt: the harness makes it, and then leaves it out."""
    from lm_eval.tasks.ruler import cwe_utils

    monkeypatch.setattr(cwe_utils, "WORDS", all_words())
    for sample in [sample for sample in samples if sample.task == "cwe"]:
        rng = drawn_by(sample)
        monkeypatch.setattr(cwe_utils, "random", rng)
        monkeypatch.setattr(cwe_utils, "RNG", rng)
        listed = sample.prompt[sample.prompt.rindex("Below is a numbered") : sample.prompt.rindex("Question:")]
        example, question, _ = cwe_utils.generate_input_output(
            len(set(re.findall(r"\d+\. (\S+)", listed))), sample.length
        )
        assert sample.prompt == f"{example}\n{question}"


def test_hotpotqa_comes_from_a_folder(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    items = [
        {
            "question": f"Which town lies by river {i}?",
            "answer": f"Town{i}",
            "context": [[f"Title {i}-{j}", [f"Town{i} lies by river {i}. ", "It is old. " * 30]] for j in range(3)],
        }
        for i in range(20)
    ]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(items))
    data = LocalData.at(tmp_path)
    assert available_tasks(data) == (list(TASKS), {})
    for sample in make_samples(smollm2_tokenizer, ["qa_hotpotqa"], [2048], 2, data=data):
        assert sample.prompt.count(f"{sample.wanted[0]} lies by") == 3
        assert 2048 - 200 < sample.tokens + sample.new_tokens <= 2048
    tasks, missing = available_tasks(LocalData())
    assert tasks == OFFLINE
    assert "hotpotqa.json" in missing["qa_hotpotqa"]


@pytest.mark.parametrize("start", [1, 7, 500, 10_000])
def test_fit_finds_the_largest_that_fits_from_anywhere(start: int) -> None:
    tried = []

    def make(units: int) -> tuple[Draft, str, int]:
        tried.append(units)
        return Draft("", "", []), str(units), 13 + 3 * units + units % 2

    found = fit(make, 1000, start, 3.0, 1)
    assert found is not None
    assert 1000 - 4 < found[2] <= 1000
    assert len(tried) < 8
    assert fit(make, 15, start, 3.0, 1) is None
