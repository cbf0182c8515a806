"""What `fastserve compress` costs and brings, beside what it promises: pass or fail.

    python -m bench.compress FOLDER TEXT [--calibration TEXT] [--only int8,int4,distil]

FOLDER is where prepared text and runs go; what was trained there is not trained again. SmolLM2-135M
in int8 and in int4 by GPTQ, perplexity of TEXT (wikitext-2's test set) by the programs that serve,
against bf16; and a model of half the size of `tiny`, trained alone and taught by it, with the same
data and steps. Ten minutes and more on two cores.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
from cyclopts import run

from bench.perplexity import losses, windows_of
from fastserve_jax.assemble import load
from fastserve_jax.cli import cache_folder
from fastserve_jax.config import load_settings
from fastserve_jax.lifecycle.train import points
from fastserve_jax.weights.registry import REGISTRY, Registry

MODEL = "smollm2-135m-instruct"
BARS = {"int8": 1.01, "w8a8": 1.01, "int4": 1.08}  # perplexity over bf16's, at most
METHODS = {"int8": "nearest", "w8a8": "nearest", "int4": "gptq"}
DISTIL = "distil"
HALF = {
    "steps": 300,
    "batch_rows": 8,
    "evaluate_every": 150,
    "shape.hidden_size": 96,
    "shape.num_layers": 3,
    "shape.num_heads": 4,
    "shape.num_kv_heads": 2,
    "shape.intermediate_size": 288,
    "optimiser.learning_rate": 3e-3,
    "optimiser.warmup_steps": 30,
}


def fastserve(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "fastserve_jax", *map(str, words)], check=True)


def nats(model: str, dtype: str, text: str, windows: int) -> float:
    overrides = [f"model.dtype={dtype}", "engine.max_context=528"]
    loaded = load(model, load_settings(overrides=overrides), cache_folder())
    with loaded.runner:
        return float(np.mean(asyncio.run(losses(loaded, windows_of(loaded, text, windows, 512)))))


def quantised(folder: Path, text: str, calibration: Path, kinds: list[str], windows: int) -> bool:
    """Whether all pass."""
    data, source = folder / "text", folder / "text.txt"
    lines = [line for line in calibration.read_text(encoding="utf-8").splitlines() if line.strip()]
    # In documents as long as what is measured, not in paragraphs.
    source.write_text(
        "\n\n".join("\n".join(lines[at : at + 60]) for at in range(0, len(lines), 60))
    )
    fastserve("data", "prepare", source, "--out", data, "--tokenizer", MODEL, "--holdout", 0.1)
    plain, fine = nats(MODEL, "bf16", text, windows), True
    for kind in kinds:
        name = f"bench-{kind}"
        asked = ["--to", kind, "--method", METHODS[kind], "--calibrate", 48, "--measure", 12]
        fastserve("compress", "quantise", MODEL, data, "--name", name, *asked)
        newest = str(Registry(cache_folder() / REGISTRY).versions(name)[-1])
        change = math.exp(nats(newest, "auto", text, windows) - plain)
        said = f"{kind} perplexity {change - 1:+.2%}, at most {BARS[kind] - 1:+.0%}"
        fine &= passes(change <= BARS[kind], said)
    return fine


def passes(is_fine: bool, said: str) -> bool:
    print(f"{'pass' if is_fine else 'FAIL'}: {said}")
    return is_fine


def distilled(folder: Path) -> bool:
    data, stories = folder / "stories", folder / "stories.txt"
    if not data.exists():
        fastserve("data", "stories", stories, "--count", 8000)
        fastserve(
            "data", "prepare", stories, "--out", data, "--tokenizer", "tiny", "--context", 256
        )
    found = {}
    for run_name, teacher in (("alone", ""), ("taught", "tiny")):
        out = folder / run_name
        if not (out / "model").exists():
            settings = HALF | {"data": data, "out": out, "distil.teacher": teacher}
            sets = [
                word for name, value in settings.items() for word in ("--set", f"{name}={value}")
            ]
            fastserve("train", *sets)
        found[run_name] = list(points(out))[-1].valid_loss or math.inf
    taught, alone = found["taught"], found["alone"]
    return passes(taught < alone, f"held-out loss {taught:.4f} taught, {alone:.4f} alone")


def main(
    folder: Path,
    text: Path,
    /,
    *,
    calibration: Path | None = None,
    only: str = "int8,w8a8,int4,distil",
    windows: int = 48,
) -> None:
    wanted = only.split(",")
    if unknown := {*wanted} - {*BARS, DISTIL}:
        sys.exit(
            f"compress: no {', '.join(sorted(unknown))}: there are {', '.join(BARS)}, {DISTIL}"
        )
    fine = True
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in BARS if kind in wanted]
    if kinds:
        source = calibration or text.with_name(text.name.replace("test", "valid"))
        fine &= quantised(folder, text.read_text(encoding="utf-8"), source, kinds, windows)
    if DISTIL in wanted:
        fine &= distilled(folder)
    sys.exit(not fine)


if __name__ == "__main__":
    run(main)
