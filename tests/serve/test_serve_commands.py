"""`hylo serve` and `hylo bench` on the command line."""

import importlib.util
import json
from pathlib import Path

import pytest
import typer
from click.testing import Result
from serving import published_config
from tiny import write_base
from typer.testing import CliRunner

from hylo.commands import bench, serve
from hylo.errors import HyLoError
from hylo.serve.launch import Request, most_requests, server_environment

app = typer.Typer()
serve.register(app)
bench.register(app)
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: pip install 'hylo[serve]'"
)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_serve_fills_in_what_hybrids_need(mixed_folder: Path) -> None:
    result = run("serve", mixed_folder, "--dry-run")
    assert result.exit_code == 0, result.output
    expected = f"vllm serve {mixed_folder} --max-model-len 512 --max-num-batched-tokens 8192 --max-num-seqs 256"
    assert result.stdout.strip() == expected


def test_serve_leaves_what_the_user_gave(mixed_folder: Path) -> None:
    extra = ["--port", "8001", "--max_num_seqs=4", "--enforce-eager"]
    result = run("serve", mixed_folder, "--dry-run", "--context", "1M", "--gpus", "2", *extra)
    assert result.exit_code == 0, result.output
    arguments = result.stdout.split()
    assert arguments[-4:] == extra
    assert "--max-num-seqs" not in arguments
    assert arguments[arguments.index("--max-model-len") + 1] == "1048576"
    assert arguments[arguments.index("--tensor-parallel-size") + 1] == "2"


def test_serve_reads_what_vllm_reads(mixed_folder: Path, tmp_path: Path) -> None:
    """A length given in vLLM's words, or in a file, is the length that the rest goes by."""
    (tmp_path / "my.yaml").write_text("max-model-len: 1048576\nmax_num_batched_tokens: 4096\n")
    for extra in (["--max-model-len", "1048576"], ["--max_model_len=1M"], ["--config", str(tmp_path / "my.yaml")]):
        words = run("serve", mixed_folder, "--dry-run", *extra).stdout.split()
        assert words[words.index("--max-num-seqs") + 1] == "32"
        assert words.count("--max-model-len") == extra.count("--max-model-len")
        assert ("--max-num-batched-tokens" in words) == (extra[0] != "--config")
        request = Request(str(mixed_folder), extra=tuple(extra))
        assert server_environment(request, {})["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"
    words = run("serve", mixed_folder, "--dry-run", "--no-enable-chunked-prefill").stdout.split()
    assert "--max-num-batched-tokens" not in words


def test_the_config_is_read_where_vllm_reads_it(
    mixed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the revision that is served, from the hub's cache; or from the path that is named."""
    longer = json.loads((mixed_folder / "config.json").read_text()) | {"max_position_embeddings": 2048}
    snapshots = tmp_path / "hub" / "models--some--hybrid" / "snapshots"
    for commit, config in (("a" * 40, (mixed_folder / "config.json").read_text()), ("b" * 40, json.dumps(longer))):
        (snapshots / commit).mkdir(parents=True)
        (snapshots / commit / "config.json").write_text(config)
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("a" * 40)
    (snapshots.parent / "refs" / "longer").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "my.yaml").write_text("revision: longer\n")
    for extra, length in (
        ([], "512"),
        (["--tokenizer-revision", "longer"], "512"),
        (["--revision", "longer"], "2048"),
        (["--config", tmp_path / "my.yaml"], "2048"),
        (["--hf-config-path", snapshots / ("b" * 40)], "2048"),
    ):
        words = run("serve", "some/hybrid", "--dry-run", *extra).stdout.split()
        assert words[words.index("--max-model-len") + 1] == length, extra
    request = Request("some/hybrid", context=1024, extra=("--revision=longer",))
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in server_environment(request, {})
    # Of a folder there is one.
    assert run("serve", mixed_folder, "--dry-run", "--revision", "longer").exit_code == 0


def test_a_block_of_a_kept_prefix_fits_a_step(tmp_path: Path) -> None:
    """Of the published 3B: a block is as large as a state, 12,432 tokens."""
    published_config("3b").save_pretrained(tmp_path / "3b")
    words = run("serve", tmp_path / "3b", "--dry-run", "--enable-prefix-caching").stdout.split()
    assert 12_432 <= int(words[words.index("--max-num-batched-tokens") + 1]) < 16_384


def test_longer_than_trained(mixed_folder: Path) -> None:
    trained = server_environment(Request(str(mixed_folder)), {})
    longer = server_environment(Request(str(mixed_folder), context=1024), {"HOME": "/"})
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in trained
    assert (longer["VLLM_ALLOW_LONG_MAX_MODEL_LEN"], longer["HOME"]) == ("1", "/")
    assert [most_requests(length) for length in (2**16, 2**20, 2**24)] == [256, 32, 8]


def test_bad_input_is_one_line(mixed_folder: Path, base_folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for arguments, message in (
        (("serve", missing), "does not exist"),
        (("serve", base_folder), "is a llama, no hybrid; serve it with: vllm serve"),
        (("serve", mixed_folder, "--context", "8X"), "8X"),
        (("serve", "--port", "8000", mixed_folder), "--port: expected the model first"),
        (("serve", mixed_folder, "--config", "nowhere.yaml"), "--config nowhere.yaml: "),
        (("serve", mixed_folder, "--gpus", "3"), "expected one of 1, 2"),
        (("serve", "some/hybrid", "--revision", "v2"), "--revision v2: the config.json of some/hybrid could"),
        (("serve", mixed_folder, "--hf-config-path", missing), "does not exist"),
        (("bench", mixed_folder, "--load", "8K"), "--load '8K'"),
        (("bench", mixed_folder, "--load", "8K,x"), "--load '8K,x': 'x' is no number"),
        (("bench", mixed_folder, "--contexts", "x"), "--contexts 'x': 'x' is no number"),
    ):
        error = run(*arguments).exception
        assert isinstance(error, HyLoError), (arguments, error)
        assert message in str(error) and "\n" not in str(error)


@needs_vllm
def test_bench_measures_both(mixed_folder: Path, tmp_path: Path) -> None:
    """Two real engines in two processes, a prompt that fits neither among the rest."""
    base = write_base(tmp_path / "base", head_dim=32)
    result = run(
        *("bench", mixed_folder, "--vs", base, "--contexts", "64,256", "--answer", "8", "--load", "32,8"),
        *("--requests", "4", "--memory", "0.05", "--dtype", "float32", "--eager", "--output", tmp_path / "out"),
    )
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    for role in ("model", "base"):
        assert found[role]["cache_tokens"] > 1000
        by_request = list(found[role]["cache_tokens_by_request"].values())
        # States weigh less on longer requests; a base has none.
        assert by_request[0] < by_request[-1] if role == "model" else by_request[0] == by_request[-1]
        for row in found[role]["contexts"]:
            assert row["ttft_s"] > 0 and row["tpot_ms"] > 0
        assert found[role]["load"]["output_tokens_per_s"] > 0
    assert (tmp_path / "out" / "bench.png").stat().st_size > 10_000
    assert "TTFT, s at 64" in result.stdout


@needs_vllm
def test_bench_tells_vllms_last_word(mixed_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_bytes((mixed_folder / "config.json").read_bytes())
    result = run("bench", tmp_path / "broken", "--output", tmp_path / "out", "--memory", "0.05", "--dtype", "float32")
    assert isinstance(result.exception, HyLoError)
    assert "Error: " in str(result.exception) and "model.log" in str(result.exception)
