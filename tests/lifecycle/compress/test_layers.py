"""Layer by layer: what is seen is what goes in, and what was changed on paper changes nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from fastserve_jax.errors import ConfigError
from fastserve_jax.lifecycle.compress.effort import Effort
from fastserve_jax.lifecycle.compress.migrate import lost, migrate
from fastserve_jax.lifecycle.compress.prune import Pruning, prune, zeros
from fastserve_jax.lifecycle.compress.quantise import Quantising, quantise
from fastserve_jax.lifecycle.compress.seen import Text, Walk
from fastserve_jax.models.decoder import abstract, fill
from fastserve_jax.models.precision import INT4, INT8, W8A8, Precision, Stored
from fastserve_jax.models.whole import logits_of
from tests.lifecycle.compress import tiny


def test_inputs_are_those_of_the_matrix_without_padding():
    config = tiny.config()
    arrays, text = tiny.arrays(config), tiny.text()
    rows = {"tokens": text.tokens, "segments": text.segments}
    learned = text.segments < text.segments.max(1, keepdims=True)  # the last one is padding
    text = Text.of({**rows, "learned": learned})
    assert np.array_equal(text.counts, learned)
    walk = Walk(config, text)
    x = walk.begin(arrays)
    seen = walk.watch(0, arrays, x)["layers.0.attn.qkv"]
    rows = arrays["embed.weight"].astype(np.float64)[text.tokens[learned]]
    rows /= np.sqrt((rows**2).mean(1, keepdims=True) + config.norm_eps)
    rows *= arrays["layers.0.attn_norm.weight"]
    assert np.allclose(seen.gram, rows.T @ rows, atol=1e-2)
    assert np.allclose(seen.size, np.abs(rows).mean(0), atol=1e-4)
    assert np.allclose(seen.largest, np.abs(rows).max(0), atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_layers_one_by_one_are_the_decoder(family):
    config, text = tiny.config(family), tiny.text()
    arrays = tiny.arrays(config)
    walk = Walk(config, text)
    x = walk.begin(arrays)
    for layer in range(config.num_layers):
        x = walk.through(layer, arrays, x)
    norm = np.asarray(x, np.float64)
    if config.layer_norm:
        norm = norm - norm.mean(-1, keepdims=True)
    norm /= np.sqrt((norm**2).mean(-1, keepdims=True) + config.norm_eps)
    norm = norm * arrays["final_norm.weight"] + arrays.get("final_norm.bias", 0)
    assert np.allclose(
        norm @ arrays["embed.weight"].T, tiny.logits(config, arrays, text), atol=1e-3
    )


@pytest.mark.parametrize(("family", "kind"), [("gemma3", INT4), ("gpt2", W8A8), ("llama", W8A8)])
def test_migrating_changes_no_output_and_loses_less(family, kind):
    config, text = tiny.config(family), tiny.text()
    arrays = tiny.arrays(config)
    arrays["layers.0.mlp_norm.weight"][[3, 17]] *= 40  # outliers
    before = tiny.logits(config, arrays, text)
    walk, inner = Walk(config, text), "gate_up" if config.gated_mlp else "up"
    seen = walk.watch(0, arrays, walk.begin(arrays))
    stored = Stored(kind, 16 if kind == INT4 else 0)
    matrix = f"layers.0.mlp.{inner}"
    plain = lost(arrays[f"{matrix}.weight"], seen[matrix], stored)
    migrate(config, 0, arrays, seen, dict.fromkeys(seen, stored))
    assert np.abs(tiny.logits(config, arrays, text) - before).max() < 1e-3 * np.abs(before).max()
    assert lost(arrays[f"{matrix}.weight"], seen[matrix], stored) < 0.8 * plain


@pytest.mark.parametrize("method", ["nearest", "gptq", "awq"])
def test_a_model_in_eight_bits_is_nearly_itself(method):
    config, text = tiny.config(tied_head=False), tiny.text()
    arrays = tiny.arrays(config)
    asked = Quantising(INT8, method, kept=("layers.1.*",))
    made, stored = quantise(config, arrays, asked, text)
    assert "layers.1.mlp.down" not in stored
    assert {"embed", "head", "layers.0.attn.qkv"} <= stored.keys()
    graph, empty = abstract(config, Precision(jnp.float32, stored=tuple(stored.items())))
    state = fill(empty, {name: jnp.asarray(array) for name, array in made.items()})
    tokens, segments = (jnp.asarray(array[0]) for array in text[:2])
    served = np.asarray(logits_of(graph, config, state, tokens, segments))
    exact = tiny.logits(config, arrays, text)[0]
    assert np.abs(served - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_says_nothing_is_what_goes(family):
    config, text = tiny.config(family, intermediate_size=96), tiny.text()
    arrays, rng = tiny.arrays(config), np.random.default_rng(3)
    groups, each = config.num_kv_heads, config.num_heads // config.num_kv_heads * config.head_dim
    for layer in range(2):  # a third of the neurons, and half of the heads
        dead = rng.permutation(96)[:32]
        arrays[f"layers.{layer}.mlp.down.weight"][:, dead] = 0
        out = arrays[f"layers.{layer}.attn.out.weight"].reshape(32, groups, each)
        out[:, rng.permutation(groups)[: groups // 2]] = 0
    exact = tiny.logits(config, arrays, text)
    small, made = prune(config, arrays, Pruning("structured", 1 / 3, 0.5), text)
    assert (small.intermediate_size, small.num_kv_heads) == (64, groups // 2)
    assert made["layers.0.mlp.down.weight"].shape == (32, 64)
    wanted = {name: array.shape for name, array in tiny.arrays(small).items()}
    assert {name: array.shape for name, array in made.items()} == wanted
    # What is damped is not quite least squares.
    assert np.abs(tiny.logits(small, made, text) - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_second_order_pruning_keeps_more_than_magnitude(pattern):
    config, text = tiny.config(), tiny.text(8)
    arrays = tiny.arrays(config)
    exact, apart = tiny.logits(config, arrays, text), {}
    for method in ("second-order", "magnitude"):
        _, made = prune(config, arrays, Pruning(pattern, method=method), text)
        assert zeros(made) == pytest.approx(0.5, abs=0.01)
        apart[method] = np.mean((tiny.logits(config, made, text) - exact) ** 2)
    assert apart["second-order"] < apart["magnitude"]


def test_what_cannot_be_is_named():
    for wrong, said in (
        ({"to": "int3"}, "no type int3: there are int8"),
        ({"to": INT4, "method": "guess"}, "no method guess"),
        ({"to": INT4, "group": 7}, "groups are even"),
    ):
        with pytest.raises(ConfigError, match=said):
            Quantising(**wrong)
    for wrong, said in (
        ({"pattern": "3:4"}, "no pattern 3:4"),
        ({"pattern": "2:4", "share": 0.3}, "2:4 is a half"),
        ({"pattern": "2:4", "heads": 0.3}, "heads go in structured"),
        ({"pattern": "structured", "share": 1.0}, "less than 1"),
        ({"pattern": "structured", "method": "magnitude"}, "none in structured pruning"),
        ({"pattern": "unstructured", "share": 0.0}, "nothing goes"),
    ):
        with pytest.raises(ConfigError, match=said):
            Pruning(**wrong)
    config = tiny.config()
    with pytest.raises(ConfigError, match="nothing would go"):
        prune(config, tiny.arrays(config), Pruning("structured", 0.01), tiny.text())
    with pytest.raises(ConfigError, match="needs text"):
        quantise(config, tiny.arrays(config), Quantising(INT8), None)
    for asked, said in (
        (Quantising(INT8, "nearest", kept=("*",)), "every matrix is kept"),
        (Quantising(INT8, "nearest", kept=("embed", "*.down.weight")), r"called \*\.down\.weight$"),
        (Quantising(INT4, "nearest", 100), "in groups of 100: take one that divides 32, 64"),
    ):
        with pytest.raises(ConfigError, match=said):
            quantise(config, tiny.arrays(config), asked, None)
    for wrong, said in (
        ({"calibrate": 0}, "calibrate is at least 1, not 0"),
        ({"measure": -1}, "measure is at least 1"),
        ({"rounds": -1}, "rounds is at least 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            Effort(**wrong)
