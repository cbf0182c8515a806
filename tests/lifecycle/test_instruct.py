"""Instruction tuning from end to end: a few conversations are taught, and the served chat gives the
answers that were taught; then some more to the version that came of it."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fastserve_jax.lifecycle.commands import run_train
from fastserve_jax.lifecycle.dataset import Dataset
from fastserve_jax.lifecycle.measured import run_answers
from fastserve_jax.lifecycle.prepare import Wanted, prepare
from fastserve_jax.lifecycle.settings import Shape
from fastserve_jax.lifecycle.shown import show_version
from fastserve_jax.lifecycle.train import drawn
from fastserve_jax.lifecycle.vocabulary import copy_vocabulary, train_vocabulary
from fastserve_jax.weights.orbax import write_model
from fastserve_jax.weights.registry import REGISTRY, Registry
from tests.lifecycle import runs
from tests.serve.conftest import SMALL, started

TAUGHT = {
    "Who are you?": "A little fox.",
    "What is the sky?": "Blue, most days.",
    "Say something.": "No.",
    "Where do you live?": "Under the old oak tree.",
}
MORE = {"Do you like rain?": "Only from inside."}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def base(folder: Path):
    """Of random numbers, with marks that no text can write."""
    train_vocabulary(iter([*TAUGHT, *TAUGHT.values()]), "bpe", 300, folder / "words")
    library = Tokenizer.from_file(str(folder / "words" / "tokenizer.json"))
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    library.save(str(folder / "words" / "tokenizer.json"))
    named = {"eos_token": "<|im_end|>", "add_bos_token": False, "chat_template": CHATML}
    (folder / "words" / "tokenizer_config.json").write_text(json.dumps(named))
    config = Shape(32, 1, 4, 2, 64).config(library.get_vocab_size(), 64)
    write_model(folder / "base", config, drawn(config, 0))
    copy_vocabulary(folder / "words", folder / "base")


def teach(folder, number, conversations, model, steps):
    path = folder / f"{number}.jsonl"
    lines = []
    for asked, answer in conversations.items():
        turns = (("user", asked), ("assistant", answer))
        lines.append(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}))
    path.write_text("\n".join(lines))
    data = folder / f"data{number}"
    facts = prepare([path], data, Wanted(48, "", 0.0), folder / "words")
    given = {"base": model, "name": "fox", "steps": steps, "batch_rows": facts.train_rows}
    given |= {"evaluate_every": steps, "optimiser.weight_decay": 0.0}
    run_train(runs.settings(data, folder / f"run{number}", **given), folder / "cache")
    return path, Dataset(data)


def test_the_served_chat_gives_the_answers_that_were_taught(tmp_path, capsys):
    base(tmp_path)
    cache = tmp_path / "cache"
    teach(tmp_path, 1, TAUGHT, str(tmp_path / "base"), 100)
    path, data = teach(tmp_path, 2, TAUGHT | MORE, "fox", 50)
    registry = Registry(cache / REGISTRY)
    _, second = registry.versions("fox")
    assert (second.parent, second.data) == ("fox@1", data.facts.fingerprint)
    registry.promote("fox@2")
    small = ("engine.max_slots=2", "engine.step_tokens=16", "engine.speculate=off")
    sets = [flag for name in (*SMALL, *small) for flag in ("--set", name)]
    with started("fox", cache, *sets) as server:
        assert server.model == "fox"
        run_answers("fox", path, server.url, None, 32, False, cache)
    (kept,) = registry.notes(second)
    assert kept["exact"] == 1.0, capsys.readouterr().out
    assert kept["bleu"] == pytest.approx(100)
    show_version("fox", cache)
    told = capsys.readouterr().out.replace("\n", "")
    assert f"made of fox@2 < fox@1 < {tmp_path / 'base'}" in told
