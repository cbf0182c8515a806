"""Which models may draft for which, and that one is made ready beside the other."""

from dataclasses import replace

import pytest

from fastserve_jax import assemble, draft_model
from fastserve_jax.config import load_settings
from fastserve_jax.errors import ConfigError
from fastserve_jax.weights.load import open_model


@pytest.fixture
def files(shared, tmp_path):
    return open_model(str(shared("models/stories260K.gguf")), tmp_path)


def opened(monkeypatch, tmp_path, files, **changes):
    draft = replace(files, name="other", **changes)
    monkeypatch.setattr(draft_model, "open_model", lambda *_: draft)
    return draft_model.open_draft("other", tmp_path, files, lambda *_: None)


def test_the_same_vocabulary_will_do(monkeypatch, tmp_path, files):
    assert opened(monkeypatch, tmp_path, files).name == "other"


def test_another_size_is_refused(monkeypatch, tmp_path, files):
    config = replace(files.config, vocab_size=1513)
    with pytest.raises(ConfigError, match=r"other cannot draft for .*1,513 tokens, .* has 512"):
        opened(monkeypatch, tmp_path, files, config=config)


def test_other_ids_are_refused(monkeypatch, tmp_path, files):
    tokens = [*files.tokenizer_source["tokenizer.ggml.tokens"]]
    a, b = tokens.index("q"), tokens.index("k")
    tokens[a], tokens[b] = tokens[b], tokens[a]
    source = {**files.tokenizer_source, "tokenizer.ggml.tokens": tokens}
    with pytest.raises(ConfigError, match="other tokens for 'The quick"):
        opened(monkeypatch, tmp_path, files, tokenizer_source=source)


def test_without_speculation_it_is_refused():
    with pytest.raises(ConfigError, match=r"model\.draft is for guessing"):
        load_settings(None, ["model.draft=x", "engine.speculate=off"])


def test_it_is_loaded_measured_and_counted(shared, tmp_path):
    path = str(shared("models/stories260K.gguf"))
    sets = (f"model.draft={path}", "model.dtype=f32", "engine.max_slots=2", "engine.step_tokens=16")
    plans = []

    class Noting(assemble.Silent):
        def memory(self, plan):
            plans.append(plan)

    settings = load_settings(None, [*sets, "kv.pages=40", "kv.host_pages=0"])
    loaded = assemble.load(path, settings, tmp_path, Noting())
    with loaded.runner:
        assert loaded.draft_cost.run_s > 0
        assert loaded.limits.drafts == 2
        # Its own weights, and a whole context of pages for each of two rows.
        a_context = plans[0].page_bytes * loaded.limits.pages_for(loaded.limits.max_context)
        assert plans[0].draft_bytes == plans[0].weight_bytes + 2 * a_context
        assert "draft model" in str(plans[0])
