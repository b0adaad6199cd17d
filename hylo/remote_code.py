"""What is saved beside a checkpoint so that it loads with `trust_remote_code=True` where nobody imported this package.

The saved files import the package and hold no code of the model: a checkpoint never carries an old copy of it.
"""

from pathlib import Path

# For config.json: where in the files below transformers finds each class.
AUTO_MAP = {
    "AutoConfig": "configuration_hylo.HyLoConfig",
    "AutoModel": "modeling_hylo.HyLoModel",
    "AutoModelForCausalLM": "modeling_hylo.HyLoForCausalLM",
}
_FILES = {"configuration_hylo.py": "HyLoConfig", "modeling_hylo.py": "HyLoForCausalLM, HyLoModel"}
# In a try block: of imports outside of one, transformers says that PyPI has the package of that name.
_CODE = '''"""This checkpoint's classes, from the package hylo."""

try:
    from hylo import {names}  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"this checkpoint needs the package hylo ({{error}}); install it from its repository with: pip install ."
    ) from None
'''


def write_remote_code(folder: Path) -> None:
    """Writes the files that AUTO_MAP names."""
    for file, names in _FILES.items():
        (folder / file).write_text(_CODE.format(names=names))
