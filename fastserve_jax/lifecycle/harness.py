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

from fastserve_jax.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Harness:
    """What lm-eval is asked for; `folder` has tasks of one's own, as YAML files."""

    tasks: str  # by comma
    folder: Path | None = None
    limit: int | None = None  # documents of each task; None: all of them
    is_chat: bool = False  # asks by the model's chat template


def run_harness(
    asked: Harness, url: str, model: str, context: int, api_key: str | None
) -> dict[str, float]:
    """What it measured, as task/metric. Raises ConfigError where lm-eval is not here, or fails."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks need lm-eval: pip install 'lm-eval[api]'")
    with tempfile.TemporaryDirectory() as out:
        command = [*_command(asked, url, model, context), "--output_path", out]
        key = {"OPENAI_API_KEY": api_key} if api_key else {}
        done = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **key},
        )
        found = list(Path(out).rglob("results_*.json"))
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


def _command(asked: Harness, url: str, model: str, context: int) -> list[str]:
    given = f"model={model},base_url={url.rstrip('/')}/v1/completions,max_length={context},"
    given += "tokenizer_backend=remote,num_concurrent=8"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    command += ["--model_args", given, "--tasks", asked.tasks]
    command += ["--apply_chat_template"] if asked.is_chat else []
    command += ["--include_path", str(asked.folder)] if asked.folder else []
    return command + (["--limit", str(asked.limit)] if asked.limit else [])
