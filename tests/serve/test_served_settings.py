"""What is known before an engine starts: registration, head sizes, ranks that can share a model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import HYBRIDS, hybrid_config

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")

from served_engine import engine, save_hybrid

from hylo import HyLoConfig
from hylo.errors import HyLoError
from hylo.serve import architecture
from hylo.serve.architecture import HyLoArchitecture, attention_head_size, keeps_latents, why_expanded
from hylo.serve.parallel import check_parallel, parallel_sizes
from hylo.serve.plugin import ARCHITECTURE, register
from hylo.serve.settings import check_dtypes, check_kernels
from hylo.serve.states import largest_state, state_shapes
from hylo.serve.weights import expected_shapes


def config(name: str) -> HyLoConfig:
    return hybrid_config(**HYBRIDS[name])


def test_registration_may_be_repeated() -> None:
    from vllm import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    register()
    register()
    assert ARCHITECTURE in ModelRegistry.get_supported_archs()
    assert MODEL_ARCH_CONFIG_CONVERTORS["hylo"] is HyLoArchitecture


def test_mla_is_expanded_where_there_are_no_kernels() -> None:
    assert not keeps_latents(config("mla"))
    assert why_expanded(config("mla")) == "vLLM has no kernels for latents on this device"
    assert why_expanded(config("gdn")) is None
    # The next head size that the kernels take.
    assert attention_head_size(config("mix")) == 32
    made = HyLoArchitecture(config("mix"), config("mix")).convert()
    assert (made.is_deepseek_mla, made.head_size) == (False, 32)


@pytest.mark.parametrize(("capability", "kept"), [(75, False), (80, True), (90, True)])
def test_mla_is_expanded_on_gpus_without_flash_attention(
    capability: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(is_cuda=lambda: True, has_device_capability=lambda least: capability >= least)
    monkeypatch.setattr(architecture, "current_platform", gpu)
    assert keeps_latents(config("mla")) == kept
    assert ("compute capability 8.0" in (why_expanded(config("mla")) or "")) != kept


def test_ranks_that_share_the_heads() -> None:
    tiny = config("mix_of_all")
    assert parallel_sizes(tiny) == [1, 2]
    check_parallel(tiny, 2)
    with pytest.raises(HyLoError, match=r"tensor parallel 4: 2 heads of attention do not divide .* one of 1, 2$"):
        check_parallel(tiny, 4)
    six = hybrid_config(["gdn"] * 2, mixer_geometry={"gdn": {"num_heads": 6, "head_k_dim": 8, "head_v_dim": 16}})
    assert parallel_sizes(six) == [1, 2, 3, 6]
    with pytest.raises(HyLoError, match=r"tensor parallel 8: 6 heads of gdn do not divide .* one of 1, 2, 3, 6$"):
        check_parallel(six, 8)


def test_states_are_as_large_as_planned() -> None:
    """What vLLM keeps of a request is what the model says that it has."""
    mixed = config("mix_of_all")
    linear = [name for name in mixed.token_mixers if name not in ("attention", "mla")]
    held = sum(state_shapes(mixed, name, 1).nbytes(torch.bfloat16) for name in linear)
    assert held == mixed.state_bytes()
    largest = largest_state(mixed, 2, torch.float32)
    assert largest.nbytes(torch.float32) == max(state_shapes(mixed, n, 2).nbytes(torch.float32) for n in linear)


def test_every_tensor_of_a_checkpoint_is_expected() -> None:
    shapes = expected_shapes(config("mix"))
    assert shapes["model.layers.0.mixer.q_conv1d.weight"] == (32, 1, 4)
    assert "lm_head.weight" in shapes
    tied = hybrid_config(["gdn"], tie_word_embeddings=True)
    assert "lm_head.weight" not in expected_shapes(tied)


def test_sizes_that_kernels_would_get_wrong() -> None:
    check_kernels(config("mix_of_all"))
    for sizes, named in (
        ({"conv_size": 5}, "gdn: conv_size is 5; vLLM's kernels take 2 to 4"),
        ({"head_k_dim": 320}, "gdn: keys of 320 values; vLLM's kernels take 256 at most"),
    ):
        geometry = {"gdn": {"num_heads": 4, "head_k_dim": 8, "head_v_dim": 8} | sizes}
        with pytest.raises(HyLoError, match=named):
            check_kernels(hybrid_config(["gdn"], mixer_geometry=geometry))


def test_caches_are_in_their_own_dtypes() -> None:
    def check(dtype: torch.dtype, cached: str = "auto", convolved: str = "auto", state: str = "auto") -> None:
        cache = SimpleNamespace(cache_dtype=cached, mamba_cache_dtype=convolved, mamba_ssm_cache_dtype=state)
        check_dtypes(dtype, cache, latents=True)

    check(torch.bfloat16)
    check(torch.bfloat16, "bfloat16", "bfloat16", "float32")
    check(torch.float16, "float16")
    for asked, named in (
        ((torch.bfloat16, "float16"), "kv-cache-dtype float16: of a hybrid it is bfloat16"),
        ((torch.bfloat16, "fp8"), "kv-cache-dtype fp8"),
        ((torch.bfloat16, "auto", "float32"), "mamba-cache-dtype float32: of a hybrid it is bfloat16"),
        ((torch.bfloat16, "auto", "auto", "bfloat16"), "mamba-ssm-cache-dtype bfloat16: of a hybrid it is float32"),
        ((torch.float32,), "dtype float32: latents are served in bfloat16 or float16"),
    ):
        with pytest.raises(HyLoError, match=named):
            check(*asked)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("mla", {"enable_prefix_caching": True}, "prefix caching: no layer of this model is linear"),
        ("mix", {"quantization": "fp8"}, "quantization fp8: hybrids are served as they were saved"),
        ("attention", {"kv_cache_dtype": "fp8"}, "kv-cache-dtype fp8: of a hybrid it is float32"),
        ("mix", {"mamba_ssm_cache_dtype": "float16"}, "mamba-ssm-cache-dtype float16"),
        # Its check of heads comes later, and does not look at linear layers.
        ("gdn", {"decode_context_parallel_size": 2, "tensor_parallel_size": 4}, "context parallel: "),
        ("mix", {"prefill_context_parallel_size": 2}, "context parallel: "),
        ("mix", {"kv_offloading_size": 1}, "KV connectors and offloading: "),
        ("mix", {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connectors"),
        # In vLLM's own words.
        ("mix", {"pipeline_parallel_size": 2}, "Pipeline parallelism is not supported for this model"),
        ("mix", {"enable_lora": True}, "ServedHyLo does not support LoRA"),
        ("mix", {"enable_expert_parallel": True}, "Number of experts in the model must be greater than 0"),
    ],
)
def test_what_is_not_served_is_refused(name: str, options: dict[str, Any], named: str, tmp_path: Path) -> None:
    save_hybrid(tmp_path / name, name)
    with pytest.raises((ValueError, NotImplementedError), match=named), engine(tmp_path / name, **options):
        pass


def test_the_class_of_transformers_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the checkpoint's own code is copied to.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    save_hybrid(tmp_path / "gdn", "gdn")
    options: dict[str, Any] = {"model_impl": "transformers", "trust_remote_code": True}
    with pytest.raises(ValueError, match="is not compatible with vLLM"), engine(tmp_path / "gdn", **options):
        pass


@pytest.mark.parametrize("variable", ["VLLM_BATCH_INVARIANT", "VLLM_USE_V2_MODEL_RUNNER"])
def test_what_the_environment_asks_for_is_refused(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_hybrid(tmp_path / "mix", "mix")
    # As the environment would set it: vLLM keeps what it read there before.
    monkeypatch.setattr(f"vllm.envs.{variable}", True, raising=False)
    with pytest.raises(ValueError, match=f"{variable}: .*; leave it out"), engine(tmp_path / "mix"):
        pass
