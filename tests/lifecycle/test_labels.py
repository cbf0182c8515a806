"""Labels from end to end: a table, an encoder that learns it, a version, its report, its server."""

import csv
import json
import subprocess
import sys

import pytest

from fastserve_jax.weights.load import find_encoder
from tests.lifecycle.words import write_words
from tests.models.test_encoder import SMALL, drawn, folder_of

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
