"""Small runs: stories, a model of a few thousand numbers, and the same settings everywhere.

python -m tests.lifecycle.runs FOLDER SETTINGS...   trains as JSON objects of settings say
"""

import json
import sys
from pathlib import Path

from fastserve_jax.config import read_settings
from fastserve_jax.lifecycle.prepare import Wanted, prepare
from fastserve_jax.lifecycle.settings import TrainSettings
from fastserve_jax.lifecycle.stories import stories
from fastserve_jax.lifecycle.train import points, train

SMALL = {
    "steps": 12,
    "batch_rows": 8,
    "log_every": 1,
    "evaluate_every": 4,
    "shape.hidden_size": 32,
    "shape.num_layers": 2,
    "shape.num_heads": 4,
    "shape.num_kv_heads": 2,
    "shape.intermediate_size": 64,
    "optimiser.learning_rate": 1e-2,
    "optimiser.warmup_steps": 2,
}


def data(folder):
    text = folder / "stories.txt"
    text.write_text("<|endoftext|>".join(stories(60)))
    prepare([text], folder / "data", Wanted(48, "bpe:300", 0.1))
    return folder / "data"


def settings(folder, run, /, **changes):
    given = SMALL | {"data": str(folder), "out": str(run)} | changes
    return read_settings(
        TrainSettings, None, [f"{name}={json.dumps(value)}" for name, value in given.items()]
    )


def losses(out):
    return [point.loss for point in points(Path(out))]


if __name__ == "__main__":
    from fastserve_jax.runtime.hosts import divide_cpu

    folder, wanted = sys.argv[1], [json.loads(changes) for changes in sys.argv[2:]]
    divide_cpu(wanted[0].get("mesh.cpu_devices", 1))
    for changes in wanted:
        train(settings(folder, changes.pop("out"), **changes))
