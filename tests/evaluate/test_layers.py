"""Layers alone, and layouts chosen by what they lose."""

import json
import re
from pathlib import Path

import pytest
import torch
import typer
from tiny import GEOMETRY, convert_base, make_tokenizer, sentences, write_base, write_texts
from typer.testing import CliRunner

from hylo import HyLoError, HyLoForCausalLM
from hylo.commands.layout import parse_share, register
from hylo.data.documents import Document
from hylo.data.windows import Windows, make_windows
from hylo.evaluate.agreement import evaluate, make_reference
from hylo.evaluate.layers import Evidence, index_layout, measure_layers, mixer_errors, mla_layers_within
from hylo.precision import autocast, default_device, resolve_precision
from hylo.upcycle.bases import load_model
from hylo.upcycle.calibrate import calibrate
from hylo.upcycle.layout import parse_layout

app = typer.Typer()
register(app)
SIZES = ["mla.kv_lora_rank=10", "mla.qk_nope_head_dim=4", "mla.qk_rope_head_dim=4"]


def windows_of(*seeds: int) -> Windows:
    documents = [Document(f"text{seed}", sentences(seed)) for seed in seeds]
    return make_windows(documents, make_tokenizer(), 32, limit_tokens=512)


@pytest.mark.parametrize("mixer", ["gdn", "mla"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_layer_alone_is_a_hybrid_with_that_layer_replaced(tmp_path: Path, mixer: str, layer: int) -> None:
    """Measured in one go for all layers, and by a hybrid that is attention elsewhere, converted and calibrated."""
    base = write_base(tmp_path / "base")
    text, unseen = windows_of(1, 2, 3), windows_of(8, 9)
    evidence = measure_layers(base, "gdn", GEOMETRY, text, unseen)
    mixers = ["attention"] * 4
    mixers[layer] = mixer
    convert_base(base, tmp_path / "hybrid", mixers, {mixer: GEOMETRY[mixer]})
    teacher, student = (load_model(tmp_path / name, torch.float32) for name in ("base", "hybrid"))
    assert isinstance(student, HyLoForCausalLM)
    batches = unseen.batches(2)
    with autocast(default_device(), resolve_precision("auto")):
        calibrate(student, teacher, text.batches(2), sequential=False, latents=mixer == "mla", gates=True)
        expected = evaluate(student, batches, make_reference(teacher, batches)).kl
    measured = (evidence.linear if mixer == "gdn" else evidence.mla)[layer]
    assert expected is not None and expected > 1e-3
    assert measured == pytest.approx(expected, rel=2e-4)


def test_the_largest_gains_are_chosen() -> None:
    evidence = Evidence([5.0, 1.0, 3.0, 0.5], [4.5, 0.1, 0.2, 0.4])
    assert evidence.gains == pytest.approx([0.5, 0.9, 2.8, 0.1])
    assert [evidence.best(n) for n in (1, 2, 3)] == [[2], [1, 2], [0, 1, 2]]
    assert evidence.kept([1, 2]) == pytest.approx(5.0 + 0.1 + 0.2 + 0.5)
    assert parse_layout(index_layout(evidence.best(2), "KDA"), 4) == ["kda", "mla", "mla", "kda"]


def test_a_cache_holds_so_many_layers(tmp_path: Path) -> None:
    config = convert_base(write_base(tmp_path / "base"), tmp_path / "hybrid", "4MLA", {"mla": GEOMETRY["mla"]}).config
    # 10 + 4 values a layer, of a base's 4 layers of 2 x 2 x 8.
    one = 14 / 128
    assert mla_layers_within(config, one) == 1
    assert mla_layers_within(config, 3.5 * one) == 3
    with pytest.raises(HyLoError, match=r"10\.00% holds no MLA layer .* 10\.94%"):
        mla_layers_within(config, 0.1)
    with pytest.raises(HyLoError, match="all 4 layers"):
        mla_layers_within(config, 0.5)


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), (" 12.5 %", 0.125), ("100%", 1.0)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "5", "0", "0%", "-1%", "five", "101%", "5%%"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(HyLoError, match="expected a share of the base's cache"):
        parse_share(text)


def test_the_command_prints_a_layout(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    base = write_base(tmp_path / "base")
    texts = write_texts(tmp_path / "text", 12)
    sizes = [part for size in SIZES for part in ("-g", size)]
    few = ["--tokens", "512", "--scored", "256", "--length", "32"]
    arguments = [str(base), "--kv", "25%", "--text", str(texts), *few, "--linear", "kda", *sizes]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert parse_layout(report["layout"], 4).count("mla") == 2 == len(report["mla_layers"])
    assert report["kv_cache_ratio"] == pytest.approx(28 / 128)
    assert report["kl_sum"] <= report["even_kl_sum"]
    shown = CliRunner().invoke(app, arguments)
    assert report["layout"] in shown.stdout and "21.88% of the base's" in shown.stdout
    for bad, message in (
        (["--kv", "9"], "expected a share"),
        (["--linear", "ATT"], "expected a block without a cache"),
        (["--linear", "GLA"], "unknown block|expected counts and block names"),
        (["--text", str(tmp_path / "nothing")], "does not exist"),
    ):
        refused = CliRunner().invoke(app, [*arguments, *bad])
        assert refused.exit_code and refused.exception is not None
        assert re.search(message, str(refused.exception)), refused.exception


@torch.no_grad()
def test_mixer_errors_are_shares_of_the_teachers_output(tmp_path: Path) -> None:
    """Zero for attention that is kept, one for a mixer that says nothing, four for one that says the opposite."""
    base = write_base(tmp_path / "base")
    convert_base(base, tmp_path / "hybrid", "4ATT")
    teacher, student = (load_model(tmp_path / name, torch.float32) for name in ("base", "hybrid"))
    assert isinstance(student, HyLoForCausalLM)
    student.model.layers[1].mixer.o_proj.weight.zero_()
    student.model.layers[2].mixer.o_proj.weight.neg_()
    errors = mixer_errors(student, teacher, windows_of(8, 9).batches(2))
    assert errors == pytest.approx([0, 1, 4, 0], abs=1e-5)
