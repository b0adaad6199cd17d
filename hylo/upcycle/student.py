"""A finished hybrid that is to be trained further: whether it fits the base that it is compared with."""

from transformers import PreTrainedConfig

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.upcycle.bases import load_text_config, resolve_base


def student_config(reference: str, base: PreTrainedConfig, layerwise: bool) -> HyLoConfig:
    """Of the hybrid that a reference stands for.

    Args:
        base: the config of its base.
        layerwise: whether layers are compared one by one, too.

    Raises HyLoError where it is none, or differs from the base in what is compared.
    """
    folder = resolve_base(reference)
    if not folder.is_dir():
        raise HyLoError(f"student {reference} is a file; expected the folder of a hybrid")
    config = load_text_config(folder)
    if not isinstance(config, HyLoConfig):
        raise HyLoError(f"student {reference} is no hybrid but {config.model_type}; expected what hylo wrote")
    for name in ("vocab_size", *(("hidden_size", "num_hidden_layers") if layerwise else ())):
        ours, theirs = getattr(config, name), getattr(base, name)
        if ours != theirs:
            raise HyLoError(f"student {reference} has {name} {ours}, its base {theirs}")
    return config
