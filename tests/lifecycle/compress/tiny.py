"""A small decoder with random weights, text for it, and what it expects of that."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from fastserve_jax.lifecycle.compress.seen import Text
from fastserve_jax.lifecycle.losses import Model
from fastserve_jax.models.decoder import parameters
from tests.models.families import FAMILIES

SIZES = {"hidden_size": 32, "head_dim": 8, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 64}


def config(family="llama", **changes):
    kv = {"num_kv_heads": 4} if family == "gpt2" else {}
    sizes = SIZES | {"intermediate_size": 64} | kv | changes
    return dataclasses.replace(FAMILIES[family], **sizes)


def arrays(of, seed=0):
    rng = np.random.default_rng(seed)
    made = {}
    for name, leaf in parameters(Model(of).empty).items():
        drawn = rng.standard_normal(leaf.shape).astype(np.float32)
        is_norm = "norm.weight" in name
        made[name] = 1 + 0.2 * drawn if is_norm else drawn * leaf.shape[-1] ** -0.5
    return made


def text(rows=4, context=48, seed=1):
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 3, (rows, context)), 1)
    tokens = rng.integers(0, 64, (rows, context))
    return Text.of({"tokens": tokens, "segments": segments, "learned": np.ones_like(tokens) > 0})


def logits(of, weights, seen):
    given = {name: jnp.asarray(array) for name, array in weights.items()}
    made = Model(of).logits(given, jnp.asarray(seen.tokens), jnp.asarray(seen.segments))
    return np.asarray(made, np.float64)
