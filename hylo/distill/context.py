"""A stage's context length: the student's rotary embeddings set to YaRN before it trains."""

from hylo.distill.recipe import RopeScalingSection
from hylo.mixers import mixer_class
from hylo.mixers.mla import MultiHeadLatentAttention
from hylo.modeling import HyLoForCausalLM
from hylo.upcycle.families import yarn
from hylo.upcycle.initialise.nope import scale_nope


def set_context(student: HyLoForCausalLM, scaling: RopeScalingSection) -> None:
    """Changes the student's config, which is saved with it, and makes its rotary embeddings anew.

    The scaling takes the place of the one that the student has: factors do not multiply. What MLA does not rotate
    follows the change of YaRN's factor on cos and sin.
    """
    for key, value in yarn(student.config, scaling.model_dump()).items():
        setattr(student.config, key, value)
    embeddings = student.model.rotary_embeddings
    for name in embeddings:
        made = mixer_class(name).rotary_embedding(student.config)
        assert made is not None
        change = made.attention_scaling / embeddings[name].attention_scaling
        embeddings[name] = made.to(student.device)
        if name == "mla" and change != 1:
            for layer in student.model.decoder_layers:
                if isinstance(layer.mixer, MultiHeadLatentAttention):
                    scale_nope(layer.mixer, change**2)
