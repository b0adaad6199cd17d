"""HyLo: turns a pretrained Transformer into a long-context hybrid, without retraining it.

Importing the package registers its model with transformers' Auto classes.
"""

import logging

# Imported by transformers where it is installed, torchao lists its kernels for other machines, on standard error.
_levels = [(logger, logger.level) for logger in map(logging.getLogger, ("torchao", "torch.utils._pytree"))]
for _logger, _ in _levels:
    _logger.setLevel(logging.ERROR)

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.modeling import HyLoForCausalLM, HyLoModel
from hylo.version import __version__

for _logger, _level in _levels:
    _logger.setLevel(_level)

AutoConfig.register(HyLoConfig.model_type, HyLoConfig, exist_ok=True)
AutoModel.register(HyLoConfig, HyLoModel, exist_ok=True)
AutoModelForCausalLM.register(HyLoConfig, HyLoForCausalLM, exist_ok=True)

__all__ = ["HyLoConfig", "HyLoError", "HyLoForCausalLM", "HyLoModel", "__version__"]
