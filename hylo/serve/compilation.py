"""What vLLM's compiler has to be told of hybrids."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Inductor would widen products to multiples of 8, and hand their parts on with the strides of the wide ones. vLLM
# compiles what lies between recurrences piece by piece, for the strides that were traced, and checks none: parts of a
# projection that ends in, say, 9 heads' decays would be read askew.
OPTIONS: dict[str, Any] = {"shape_padding": False}


def tell(vllm_config: "VllmConfig") -> None:
    """Sets the options; before the model is compiled."""
    vllm_config.compilation_config.inductor_compile_config.update(OPTIONS)
