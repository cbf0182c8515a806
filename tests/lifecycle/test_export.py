"""What is exported is what it was, as our own readers have it, and as llama.cpp does."""

import json
import urllib.request
from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export
from safetensors.numpy import load_file

from fastserve_jax.errors import ConfigError
from fastserve_jax.lifecycle import export as module
from fastserve_jax.lifecycle.export import run_export
from fastserve_jax.lifecycle.losses import Model
from fastserve_jax.lifecycle.settings import Shape
from fastserve_jax.lifecycle.train import drawn
from fastserve_jax.lifecycle.vocabulary import train_vocabulary
from fastserve_jax.text.load import load_tokenizer
from fastserve_jax.weights.load import open_model
from fastserve_jax.weights.orbax import write_model
from tests.models.families import FAMILIES
from tests.weights import synthetic

TEXT = 'Once upon a time there was a little fox. It said: "Hello, world!" \u00e9\u4e16'


def model(folder, family, vocabulary="bpe"):
    arrays = synthetic.parameters(family, tied=family != "llama")
    file = synthetic.write_gguf(folder / "m.gguf", family, synthetic.gguf_tensors(family, arrays))
    config = open_model(str(file), folder).config
    arrays = {n: a.astype(ml_dtypes.bfloat16).astype(np.float32) for n, a in arrays.items()}
    write_model(folder / "model", config, arrays)
    train_vocabulary(iter([TEXT] * 20), vocabulary, 300, folder / "words")
    for path in (folder / "words").iterdir():
        path.rename(folder / "model" / path.name)
    return folder / "model", config, arrays


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["out.gguf", "out"])
def test_it_is_read_back_as_it_was(tmp_path, family, name):
    folder, config, arrays = model(tmp_path, family)
    run_export(str(folder), tmp_path / name, tmp_path)
    files = open_model(str(tmp_path / name), tmp_path)
    assert files.config == config
    found = dict(files.tensors({n: a.shape for n, a in arrays.items()}))
    for known, array in arrays.items():
        kept = array.astype(np.float16) if name.endswith("gguf") and array.ndim > 1 else array
        np.testing.assert_array_equal(found[known].astype(np.float32), kept.astype(np.float32))
    with pytest.raises(ConfigError, match="is there already"):
        run_export(str(folder), tmp_path / name, tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_library_of_safetensors_finds_what_hugging_face_would_write(tmp_path, family):
    folder, _, arrays = model(tmp_path, family)
    run_export(str(folder), tmp_path / "out", tmp_path)
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = synthetic.folder_tensors(family, arrays)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), array, err_msg=name)
    told = json.loads((tmp_path / "out" / "config.json").read_bytes())
    for name, value in synthetic.folder_config(family).items():
        known = pytest.approx(value) if isinstance(value, float) else value
        assert told[name] == (family != "llama" if name == "tie_word_embeddings" else known), name


@pytest.mark.parametrize("vocabulary", ["bpe", "sentencepiece"])
@pytest.mark.parametrize("name", ["out.gguf", "out"])
def test_it_speaks_the_same_words(tmp_path, vocabulary, name):
    folder, _, _ = model(tmp_path, "llama", vocabulary)
    run_export(str(folder), tmp_path / name, tmp_path)
    words = load_tokenizer(open_model(str(tmp_path / name), tmp_path).tokenizer_source)
    own = load_tokenizer(folder)
    assert words.encode(TEXT) == own.encode(TEXT)
    assert words.decode(own.encode(TEXT)) == own.decode(own.encode(TEXT))
    assert words.eos_ids == own.eos_ids


def test_what_others_do_not_know_is_refused(tmp_path):
    folder, _, _ = model(tmp_path, "gemma3")
    with pytest.raises(ConfigError, match="a gemma3 cannot be exported: llama, qwen2, qwen3 can"):
        run_export(str(folder), tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["out.gguf", "out"])
def test_it_is_there_whole_or_not_at_all(tmp_path, monkeypatch, name):
    folder, _, _ = model(tmp_path, "llama")
    out = tmp_path / "new" / name
    run_export(str(folder), out, tmp_path)
    assert [*out.parent.iterdir()] == [out]
    assert out.stat().st_mode & 0o44 == 0o44

    def full(*_):
        raise OSError(28, "No space left on device")

    for writer in ("write_gguf", "copy_vocabulary"):
        monkeypatch.setattr(module, writer, full)
    with pytest.raises(ConfigError, match=r"cannot write in .*No space left on device"):
        run_export(str(folder), out.with_name(f"b{name}"), tmp_path)
    assert [*out.parent.iterdir()] == [out]


def drawn_model(folder, family):
    """With as many tokens as its vocabulary."""
    config = replace(Shape(64, 2, 4, 2, 96, tied_head=False).config(300, 64), family=family)
    config = replace(config, qk_norm=family == "qwen3")
    arrays = {n: np.asarray(a, np.float32) for n, a in drawn(config, 0).items()}
    arrays = {n: 10 * a if a.ndim > 1 else a for n, a in arrays.items()}
    arrays = {n: a.astype(np.float16).astype(np.float32) for n, a in arrays.items()}
    train_vocabulary(iter([TEXT] * 20), "bpe", 300, folder / "words")
    write_model(folder / "model", config, arrays)
    for path in (folder / "words").iterdir():
        path.rename(folder / "model" / path.name)
    return folder / "model", config, arrays


def test_a_program_says_the_same(tmp_path):
    folder, config, arrays = drawn_model(tmp_path, "llama")
    run_export(str(folder), tmp_path / "out.stablehlo", tmp_path)
    program = export.deserialize((tmp_path / "out.stablehlo").read_bytes())
    held = {name: jnp.asarray(array) for name, array in arrays.items()}
    for shape in ((1, 5), (3, 17)):
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, shape), jnp.int32)
        wanted = Model(config).logits(held, tokens, jnp.zeros_like(tokens))
        np.testing.assert_allclose(program.call(tokens), wanted, atol=1e-4)


@pytest.mark.parametrize("family", ["llama3_scaled", "gemma3"])
def test_onnx_runtime_says_the_same(tmp_path, family):
    import onnxruntime

    config = FAMILIES[family]
    arrays = {n: np.asarray(a, np.float32) for n, a in drawn(config, 0).items()}
    arrays = {n: 10 * a if a.ndim > 1 else a for n, a in arrays.items()}
    write_model(tmp_path / "model", config, arrays)
    run_export(str(tmp_path / "model"), tmp_path / "out.onnx", tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"))
    held = {name: jnp.asarray(array) for name, array in arrays.items()}
    for count in (1, 40):
        tokens = np.random.default_rng(count).integers(0, config.vocab_size, count, np.int32)
        (found,) = session.run(["logits"], {"tokens": tokens})
        wanted = Model(config).logits(held, tokens[None], np.zeros((1, count), np.int32))[0]
        assert np.abs(np.asarray(wanted)).max() > 0.1
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_onnx_cannot_hold_is_refused(tmp_path, monkeypatch):
    for family, reason in (("mixtral", "mixture of experts"), ("llama", "0.0 GB in float32")):
        config = FAMILIES[family]
        write_model(tmp_path / family, config, drawn(config, 0))
        monkeypatch.setattr("fastserve_jax.lifecycle.export._MOST_ONNX_BYTES", 1000)
        with pytest.raises(ConfigError, match=reason):
            run_export(str(tmp_path / family), tmp_path / "out.onnx", tmp_path)
    assert not (tmp_path / "out.onnx").exists()


class LlamaCpp:
    """In this process, behind its own HTTP."""

    def __init__(self, path):
        import xllamacpp

        asked = xllamacpp.CommonParams()
        asked.model.path, asked.n_ctx, asked.port = str(path), 128, 0
        asked.verbosity, asked.warmup, asked.offline = -1, False, True
        self._server = xllamacpp.Server(asked)

    def ask(self, route, **body):
        request = urllib.request.Request(
            self._server.listening_address + route,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_llama_cpp_expects_the_same(tmp_path, family):
    folder, config, arrays = drawn_model(tmp_path, family)
    run_export(str(folder), tmp_path / "out.gguf", tmp_path)
    server, words = LlamaCpp(tmp_path / "out.gguf"), load_tokenizer(folder)
    ids = words.encode("time there was a little fox")
    assert server.ask("/tokenize", content="time there was a little fox")["tokens"] == ids
    ours, held = Model(config), {name: jnp.asarray(array) for name, array in arrays.items()}
    given = jnp.asarray([ids]), jnp.zeros((1, len(ids)), jnp.int32)
    logits = np.asarray(ours.logits(held, *given)[0], np.float64)
    seen = 0
    for at in range(1, len(ids) + 1):
        asked = {"prompt": ids[:at], "n_predict": 1, "temperature": 0, "n_probs": 5}
        answer = server.ask("/completion", cache_prompt=False, **asked)
        row = logits[at - 1]
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        for told in answer.get("completion_probabilities", ()):  # none of half a character
            seen += 1
            for top in told["top_logprobs"]:
                assert logprobs[top["id"]] == pytest.approx(top["logprob"], abs=0.02)
    assert seen > len(ids) // 3
