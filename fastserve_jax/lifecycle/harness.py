"""lm-eval's tasks put to a running server, in a process of their own: it brings libraries that this
one has no need of. Knows no model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastserve_jax.api.models import ModelCard
from fastserve_jax.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Harness:
    """What lm-eval is asked for; `folder` has tasks of one's own, as YAML files."""

    tasks: str  # by comma
    folder: Path | None = None
    limit: int | None = None  # documents of each task; None: all of them
    is_chat: bool = False  # by the chat route, for tasks whose answers are written


def run_harness(asked: Harness, url: str, card: ModelCard, api_key: str | None) -> dict[str, float]:
    """What it measured, as task/metric. Raises ConfigError where lm-eval is not here, or fails."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks need lm-eval: pip install 'lm-eval[api]'")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = _settings(asked, url, card, api_key) | {"output_path": name}
        (folder / "settings.yaml").write_text(json.dumps(settings))  # a key is nothing for `ps`
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", "run", "--config", str(folder / "settings.yaml")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ({"OPENAI_API_KEY": api_key} if api_key else {}),
        )
        found = list(folder.rglob("results_*.json"))
        if done.returncode or not found:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise ConfigError(f"lm-eval failed: {said[-1][:300] if said else done.returncode}")
        results = json.loads(found[0].read_bytes())["results"]
    return {
        f"{task}/{name.removesuffix(',none')}": float(value)
        for task, measured in results.items()
        for name, value in measured.items()
        if isinstance(value, int | float) and name != "sample_len"
    }


def _settings(asked: Harness, url: str, card: ModelCard, api_key: str | None) -> dict[str, object]:
    length = card.max_model_len
    route = "chat/completions" if asked.is_chat else "completions"
    reached = {
        "model": card.id,
        "base_url": f"{url.rstrip('/')}/v1/{route}",
        "tokenizer_backend": None if asked.is_chat else "remote",
        "num_concurrent": 8,
        "max_length": length if isinstance(length, int) else 2048,
        "auth_token": api_key,
    }
    return {
        "model": "local-chat-completions" if asked.is_chat else "local-completions",
        "model_args": reached,
        "tasks": asked.tasks,
        "include_path": str(asked.folder) if asked.folder else None,
        "limit": asked.limit,
        "apply_chat_template": asked.is_chat,
    }
