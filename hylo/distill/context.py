"""A stage's context length: the student's rotary embeddings set to YaRN before it trains."""

from hylo.distill.recipe import RopeScalingSection
from hylo.mixers import mixer_class
from hylo.modeling import HyLoForCausalLM
from hylo.upcycle.families import yarn


def set_context(student: HyLoForCausalLM, scaling: RopeScalingSection) -> None:
    """Changes the student's config, which is saved with it, and makes its rotary embeddings anew.

    The scaling takes the place of the one that the student has: factors do not multiply.
    """
    for key, value in yarn(student.config, scaling.model_dump()).items():
        setattr(student.config, key, value)
    embeddings = student.model.rotary_embeddings
    for name in embeddings:
        made = mixer_class(name).rotary_embedding(student.config)
        assert made is not None
        embeddings[name] = made.to(student.device)
