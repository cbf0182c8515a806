"""Fetches a model's folder from the Hugging Face hub, for those who installed the `hub` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastserve_jax.errors import ModelFileError, PullFailed

# What a model is made of: no code, no pickles, no second copy of the weights.
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE*",
    "NOTICE*",
)


def fetch_snapshot(name: str, files: Sequence[str] = _FILES) -> Path:
    """Downloads what is new of `org/name` into the hub's own cache and returns the folder.

    Raises ModelFileError without the extra, PullFailed when the hub does not give the model.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ModelFileError(
            f"hf:{name} needs huggingface_hub: pip install 'fastserve-jax[hub]'"
        ) from error
    if name.count("/") != 1:
        raise ModelFileError(f"hf:{name}: expected hf:org/name")
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except HFValidationError as error:
        raise ModelFileError(f"hf:{name}: not a name of the hub: {error}") from error
    except Exception as error:  # the hub's client raises many unrelated kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PullFailed(f"hf:{name}: cannot download: {reason}") from error
