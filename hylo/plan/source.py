"""The config of a base, without its weights: from a hub id, a folder, a bare config.json or a GGUF file."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import PreTrainedConfig

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.files import expand_user, read_json
from hylo.upcycle.bases import load_config, resolve_base
from hylo.upcycle.families import check_family, check_named_family
from hylo.upcycle.gguf_rope import restore_rope


def read_config(reference: str, revision: str | None = None) -> PreTrainedConfig:
    """Reads a base's (or a hybrid's) config; of a hub id downloads config.json alone, of a `revision` of it.

    Raises HyLoError where there is none, or on a family or sizes that cannot be planned for.
    """
    if reference.startswith("package:") or reference.endswith(".gguf"):
        file = resolve_base(reference)
        config = load_config(file.parent, gguf_file=file.name)
        check_family(config, file)
        restore_rope(config, file)
        return config
    file = _config_file(reference, revision)
    check_named_family(read_json(file), file, HyLoConfig.model_type)
    config = load_config(file)
    if not isinstance(config, HyLoConfig):
        check_family(config, file)
    return config


def _config_file(reference: str, revision: str | None) -> Path:
    path = expand_user(reference)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise HyLoError(f"{path.parent} holds no config.json; expected a Hugging Face model folder")
    if path.is_file():
        return path
    parts = reference.split("/")
    if len(parts) != 2 or not all(parts) or reference.startswith((".", "~")):
        raise HyLoError(f"{reference} does not exist; expected a model folder, a config.json, a .gguf file or a hub id")
    try:
        return Path(hf_hub_download(reference, "config.json", revision=revision))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if revision is not None:
            named = f"--revision {revision}: the config.json of {reference}"
        else:
            named = f"{reference} is no local path, and its config.json"
        raise HyLoError(f"{named} could not be had: {reason}") from None
