"""The model that comes with the package tells a story, and comes from the stories that are here."""

import jax
import jax.numpy as jnp
import numpy as np

from fastserve_jax.lifecycle.losses import Model
from fastserve_jax.lifecycle.stories import story
from fastserve_jax.models.decoder import parameters
from fastserve_jax.text.load import load_tokenizer
from fastserve_jax.weights.load import open_model


def test_it_expects_what_it_was_told(tmp_path):
    files = open_model("tiny", tmp_path)
    model, words = Model(files.config), load_tokenizer(files.tokenizer_source)
    shapes = {name: leaf.shape for name, leaf in parameters(model.empty).items()}
    arrays = {n: jnp.asarray(a, jnp.float32) for n, a in files.tensors(shapes)}
    assert sum(array.size for array in arrays.values()) < 2e6
    expects = jax.jit(lambda arrays, t: model.logits(arrays, t, jnp.zeros_like(t)))
    losses = []
    for number in range(900_000, 900_008):  # of which it has seen none
        ids = words.encode(story(number))[:128]
        tokens = jnp.asarray([[*ids, *[0] * (128 - len(ids))]])
        logits = np.asarray(expects(arrays, tokens)[0, : len(ids)], np.float64)
        shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-shares[np.arange(len(ids) - 1), ids[1:]].mean())
    assert np.mean(losses) < 0.3
