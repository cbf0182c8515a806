"""The encoder against numpy in float64, by random weights and by those that people use."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from fastserve_jax.encoding import Text
from fastserve_jax.errors import ModelFileError
from fastserve_jax.models.decoder import fill, parameters
from fastserve_jax.models.encoder import EncoderConfig, abstract_encoder
from fastserve_jax.runtime.encoder import EncoderRunner
from fastserve_jax.text.wordpiece import load_wordpiece
from fastserve_jax.weights.encoder import is_encoder, open_encoder, unpacked

SMALL = EncoderConfig(100, 32, 2, 4, 64, 24, 1e-12)
erf = np.vectorize(math.erf)


def drawn(config, seed=0):
    rng = np.random.default_rng(seed)
    _, empty = abstract_encoder(config, jnp.float32)
    return {n: rng.normal(0, 0.3, leaf.shape) for n, leaf in parameters(empty).items()}


def oracle(config, arrays, ids, segments=None):
    """One text, by the paper, in float64."""

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)
        return x * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

    def linear(x, name):
        return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

    x = arrays["embed.weight"][ids] + arrays["positions.weight"][: len(ids)]
    x = norm(x + arrays["segments.weight"][segments or [0] * len(ids)], "embed_norm")
    for i in range(config.num_layers):
        heads = linear(x, f"layers.{i}.qkv").reshape(len(ids), 3, config.num_heads, -1)
        q, k, v = heads.transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(config.head_dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        mixed = mixed.transpose(1, 0, 2).reshape(len(ids), -1)
        x = norm(x + linear(mixed, f"layers.{i}.out"), f"layers.{i}.attn_norm")
        inner = linear(x, f"layers.{i}.up")
        inner = inner * 0.5 * (1 + erf(inner / math.sqrt(2)))
        x = norm(x + linear(inner, f"layers.{i}.down"), f"layers.{i}.mlp_norm")
    pooled = x[0] if config.pooling == "first" else x.mean(0)
    return pooled / np.linalg.norm(pooled) if config.is_normed else pooled


def run(config, arrays, texts, segments=None):
    graph, empty = abstract_encoder(config, jnp.float32)
    state = fill(empty, {name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()})
    longest = max(map(len, texts)) + 3  # padding must count for nothing
    tokens, kinds = np.full((2, len(texts), longest), 7, np.int32)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = ids
        kinds[row] = 0
        if segments is not None:
            kinds[row, : len(ids)] = segments[row]
    lengths = np.array(list(map(len, texts)), np.int32)
    made = jax.jit(lambda s, *given: nnx.merge(graph, s).vectors(*given))
    return np.asarray(made(state, tokens, lengths, kinds))


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("is_normed", [True, False])
def test_vectors_are_those_of_numpy(pooling, is_normed):
    config = EncoderConfig(100, 32, 2, 4, 64, 24, 1e-12, pooling=pooling, is_normed=is_normed)
    arrays = drawn(config)
    texts, segments = [[1, 5, 9, 2], [1, 2], [*range(20)]], [[0, 0, 1, 1], [0, 0], [0] * 20]
    found = run(config, arrays, texts, segments)
    wanted = [oracle(config, arrays, *given) for given in zip(texts, segments, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


HF = {
    "embed": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "out": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def folder_of(path, config, arrays, **changes):
    """As Hugging Face has it."""
    stored = {"embeddings.position_ids": np.arange(config.max_context)[None]}
    for name, array in arrays.items():
        *above, stem, ending = name.split(".")
        layer = f"encoder.layer.{above[1]}." if above else ""
        array = array.astype(np.float32)
        if stem == "qkv":
            for part, own in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                stored[f"{layer}attention.self.{part}.{ending}"] = own
        else:
            stored[f"{layer}{HF[stem]}.{ending}"] = array
    path.mkdir()
    save_file({k: np.ascontiguousarray(v) for k, v in stored.items()}, path / "model.safetensors")
    values = {
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_context,
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.segment_kinds,
    }
    (path / "config.json").write_text(json.dumps(values | changes))
    (path / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]')
    return path


def test_a_folder_is_read(tmp_path):
    arrays = drawn(SMALL)
    folder = folder_of(tmp_path / "m", SMALL, arrays)
    assert is_encoder(folder)
    files = open_encoder(folder, "m")
    assert files.config == SMALL
    found = dict(files.tensors())
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[n], arrays[n].astype(np.float32)) for n in arrays)


def test_folders_that_are_no_encoder_of_ours(tmp_path):
    arrays = drawn(SMALL)
    for i, other in enumerate((["T5Model"], [], None, "BertModel")):
        assert not is_encoder(folder_of(tmp_path / f"{i}", SMALL, arrays, architectures=other))
    with pytest.raises(ModelFileError, match="hidden_act = 'relu' is not supported"):
        open_encoder(folder_of(tmp_path / "b", SMALL, arrays, hidden_act="relu"), "b")
    with pytest.raises(ModelFileError, match=r"config\.json"):
        open_encoder(folder_of(tmp_path / "c", SMALL, arrays, vocab_size=None), "c")
    del arrays["layers.1.up.bias"]
    files = open_encoder(folder_of(tmp_path / "d", SMALL, arrays), "d")
    with pytest.raises(ModelFileError, match=r"no tensor encoder\.layer\.1\.intermediate\.dense"):
        dict(files.tensors())


PAIRS = (
    ("The cat sleeps on the sofa.", "The cat is asleep on the sofa."),
    ("How do I reset my password?", "I forgot my password, how can I change it?"),
    ("A man is eating food.", "Someone eats a meal."),
    ("The train to Paris leaves at noon.", "At twelve there is a train to Paris."),
    ("She plays the violin in an orchestra.", "He is learning the guitar."),
    ("The bank raised its interest rates.", "Loans have become more expensive."),
    ("The bank raised its interest rates.", "We sat on the bank of the river."),
    ("It rained all week in the valley.", "The harvest was late this year."),
    ("The recipe needs two eggs.", "Bake it for forty minutes."),
    ("A dog chased the ball across the park.", "The court ruled against the company."),
    ("Water boils at a hundred degrees.", "The president gave a speech."),
    ("My phone's battery is empty.", "Whales are the largest animals."),
)


@pytest.mark.model
def test_minilm_ranks_pairs_as_numpy_does(model_path):
    """By the runner that serves; pairs that are closer than what bf16 rounds may change places."""
    files = open_encoder(unpacked(model_path("all-minilm-l6-v2")), "minilm")
    words = load_wordpiece(files.path)
    ids = [words.encode(text) for pair in PAIRS for text in pair]
    arrays = {name: array.astype(np.float64) for name, array in files.tensors()}
    wanted = np.array([oracle(files.config, arrays, own) for own in ids])
    numpys = (wanted[::2] * wanted[1::2]).sum(1)
    for dtype, near in ((jnp.float32, 1e-4), (jnp.bfloat16, 0.02)):
        graph, empty = abstract_encoder(files.config, dtype)
        state = fill(empty, {name: jnp.asarray(array, dtype) for name, array in arrays.items()})
        runner = EncoderRunner(graph, files.config, state, max_texts=64, step_tokens=2048)
        found = np.array(runner([Text(own, [0] * len(own)) for own in ids]))
        ours = (found[::2] * found[1::2]).sum(1)
        np.testing.assert_allclose(ours, numpys, atol=near)
        apart = numpys[:, None] - numpys > 2 * near
        assert apart.sum() > 60, "of 66"
        assert (ours[:, None] > ours)[apart].all()


@pytest.mark.model
def test_minilm_is_numpys_and_ranks_as_people_do(model_path):
    files = open_encoder(unpacked(model_path("all-minilm-l6-v2")), "minilm")
    words = load_wordpiece(files.path)
    texts = [
        "A man is eating food.",
        "Someone eats a meal.",
        "A woman plays the violin.",
        "The stock market fell sharply today.",
    ]
    ids = [words.encode(text) for text in texts]
    arrays = {name: array.astype(np.float64) for name, array in files.tensors()}
    found = run(files.config, arrays, ids)
    wanted = np.array([oracle(files.config, arrays, own) for own in ids])
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    likeness = found @ found[0]
    assert likeness[1] > 0.7 > 0.2 > max(likeness[2:])
