"""A decoder that says labels against numpy: of the last token, whatever stands behind it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastserve_jax.models.decoder import fill, parameters
from fastserve_jax.models.labeller import abstract_labeller
from tests.models import oracle
from tests.models.families import FAMILIES


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_labels_are_those_of_numpy(family):
    config = replace(FAMILIES[family], labels=("a", "b", "c"))
    graph, empty = abstract_labeller(config, jnp.float32)
    shapes = {name: leaf.shape for name, leaf in parameters(empty).items()}
    arrays = oracle.random_parameters(shapes)
    state = fill(empty, {name: jnp.asarray(array) for name, array in arrays.items()})
    texts = [[1, 5, 9, 2], [7], [*range(3, 23)]]
    tokens = np.full((3, 24), 11, np.int32)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = ids
    run = jax.jit(lambda state, *given: nnx.merge(graph, state).logits(*given))
    found = run(state, tokens, np.array(list(map(len, texts)), np.int32))
    says = arrays | {"head.weight": arrays["classifier.weight"]}
    whole = replace(FAMILIES[family], tied_head=False)
    wanted = [oracle.logits(whole, says, ids)[-1] + arrays["classifier.bias"] for ids in texts]
    np.testing.assert_allclose(found, wanted, atol=2e-4)
