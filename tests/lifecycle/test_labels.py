"""Labels from end to end: a table, a model that learns it, a version, its report, its server."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from fastserve_jax.errors import ModelFileError
from fastserve_jax.lifecycle.commands import run_train
from fastserve_jax.lifecycle.measured import run_evaluate
from fastserve_jax.lifecycle.prepare import Wanted, prepare
from fastserve_jax.lifecycle.settings import Shape
from fastserve_jax.lifecycle.train import drawn as drawn_decoder
from fastserve_jax.lifecycle.vocabulary import copy_vocabulary
from fastserve_jax.weights.load import find_encoder, open_model
from fastserve_jax.weights.orbax import write_model
from fastserve_jax.weights.registry import REGISTRY, Registry
from tests.lifecycle import runs
from tests.lifecycle.words import write_words
from tests.models.test_encoder import SMALL, drawn, folder_of
from tests.serve.test_encoder import served

GOOD, BAD = "good cat", "bad dog"


def fastserve(folder, *arguments, status=0):
    done = subprocess.run(
        [sys.executable, "-m", "fastserve_jax", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("COLUMNS", "200")
    write_words(folder_of(tmp_path / "small", SMALL, drawn(SMALL)), SMALL.vocab_size)
    with (tmp_path / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("text", "label"))
        for number in range(240):
            said, label = ((GOOD, "praise"), (BAD, "blame"))[number % 2]
            middle = f"{('the', 'a', 'on', 'mat', 'and')[number % 5]} " * (number % 7)
            table.writerow((f"{middle}{said} {number}", label))
    return tmp_path


async def test_a_decoder_learns_labels_goes_on_and_is_served(folder, capsys):
    cache = folder / "cache"
    facts = prepare([folder / "table.csv"], folder / "data", Wanted(16, "bpe:300", 0.2, "labels"))
    config = Shape(32, 1, 4, 2, 64, tied_head=False).config(facts.vocab_size, 16)
    write_model(folder / "base", config, drawn_decoder(config, 0))
    copy_vocabulary(folder / "data" / "tokenizer", folder / "base")
    given = {"name": "mood", "steps": 40, "batch_rows": 16, "evaluate_every": 40}
    given |= {"log_every": 40, "optimiser.learning_rate": 3e-3}
    data = folder / "data"
    run_train(runs.settings(data, folder / "one", **given, base=str(folder / "base")), cache)
    lora = {"base": "mood", "lora.rank": 2, "steps": 8, "evaluate_every": 8, "log_every": 8}
    run_train(runs.settings(data, folder / "two", **given | lora), cache)
    registry = Registry(cache / REGISTRY)
    registry.promote("mood@2")
    run_evaluate("mood", data, "valid", False, cache)
    assert "blame" in capsys.readouterr().out
    first, second = registry.versions("mood")
    assert (first.parent, second.parent) == (str(folder / "base"), "mood@1")
    assert max(version.metrics["valid_loss"] for version in (first, second)) < 0.3
    (kept,) = registry.notes(second)
    assert kept["accuracy"] > 0.95
    assert find_encoder("mood", cache).config.labels == ("blame", "praise")
    arrays = [dict(find_encoder(f"mood@{n}", cache).tensors()) for n in (1, 2)]
    says = [own["classifier.weight"] for own in arrays]
    assert not np.array_equal(*says), "it is trained whole beside the small matrices"
    assert not any("head.weight" in own for own in arrays), "it has one that nobody asks"
    with pytest.raises(ModelFileError, match="mood@2 says labels: it writes no text"):
        open_model("mood", cache)
    async with served(registry.path(second), folder) as (session, _):
        asked = {"input": [f"the {GOOD} 7", f"a mat {BAD} 12", f"{BAD} 3"]}
        async with session.post("/classify", json=asked) as answer:
            said = [one["label"] for one in (await answer.json())["data"]]
        assert said == ["praise", "blame", "blame"]


def test_from_a_table_to_a_version(folder):
    made = ("table.csv", "--out", "data", "--labels", "--context", "16", "--holdout", "0.2")
    assert "240 documents" in fastserve(folder, "data", "prepare", *made, "--tokenizer", "small")
    sets = {
        "data": "data",
        "out": "run",
        "base": "small",
        "name": "mood",
        "steps": 60,
        "batch_rows": 16,
        "evaluate_every": 30,
        "optimiser.learning_rate": 3e-3,
    }
    given = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    assert "fastserve serve mood@1" in fastserve(folder, "train", *given)
    told = fastserve(folder, "evaluate", "mood", "data", "--json").splitlines()
    measured = json.loads(next(line for line in told if line.startswith("{")))
    assert measured["metrics"]["accuracy"] > 0.95
    assert find_encoder("mood", folder / "cache").config.labels == ("blame", "praise")
    told = fastserve(folder, "models", "show", "mood")
    assert "mood@1 by train" in told
    assert "made of mood@1 < small" in told
    refused = fastserve(folder, "models", "export", "mood", "out", status=2)
    assert "is an encoder" in refused
