"""What is known before an engine starts: registration, head sizes, ranks that can share a model."""

import pytest
from tiny import HYBRIDS, hybrid_config

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")

from hylo import HyLoConfig
from hylo.errors import HyLoError
from hylo.serve.architecture import HyLoArchitecture, attention_head_size, keeps_latents, why_expanded
from hylo.serve.parallel import check_parallel, parallel_sizes
from hylo.serve.plugin import ARCHITECTURE, register
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
    architecture = HyLoArchitecture(config("mix"), config("mix")).convert()
    assert (architecture.is_deepseek_mla, architecture.head_size) == (False, 32)


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
    import torch

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
