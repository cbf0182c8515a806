"""python -m tests.runtime.on_mesh: a step on a mesh of four CPU devices against the same on one,
for every family. Prints a line of JSON for each: how far hidden states and tokens are apart."""

import json
import os
from dataclasses import replace

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}

import jax
import jax.numpy as jnp
import numpy as np

from fastserve_jax.models.decoder import Batch, abstract, all_axes, fill, head_of, parameters
from fastserve_jax.models.parts import WHOLE, Parts
from fastserve_jax.models.precision import Precision
from fastserve_jax.runtime import sampling
from fastserve_jax.runtime.mesh import make_mesh, over
from fastserve_jax.runtime.shapes import stacked
from fastserve_jax.runtime.step import Rows, Steps, StepShape, programs
from tests.models.families import FAMILIES
from tests.models.oracle import random_parameters

SHAPE = StepShape(max_slots=4, step_tokens=16, max_context=32, page_size=4, num_pages=24)
WIDE = replace(FAMILIES["llama"], num_heads=8, num_kv_heads=2, intermediate_size=96, vocab_size=96)
MODELS = {"odd_vocabulary": (FAMILIES["qwen2"], 2)}  # which stays whole
MODELS |= {"wide": (WIDE, 4), "wide_by_two": (replace(WIDE, tied_head=False), 2)}


def divided(name, array, config, parts):
    """`array` of the whole as the parts have it, one behind the other."""
    kind = name.split(".")[-2]
    count = parts.count
    if kind == "qkv":
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        q, k, v = np.split(array, [heads * dim, (heads + kv_heads) * dim])
        own = parts.of(config).num_kv_heads
        pieces = []
        for part in range(count):
            first = part * kv_heads // count
            pieces.append(np.split(q, count)[part])
            pieces += [x[first * dim : (first + own) * dim] for x in (k, v)]
        return np.concatenate(pieces)
    if kind == "gate_up":
        halves = [np.split(half, count) for half in np.split(array, 2)]
        return np.concatenate([piece for both in zip(*halves, strict=True) for piece in both])
    return array


def batches(seed):
    """Of one replica: histories, and a step with a token for each of two rows and two chunks."""
    random = np.random.default_rng(seed)
    history = random.integers(0, 90, (SHAPE.max_slots, SHAPE.max_context)).astype(np.int32)
    table = random.permutation(SHAPE.num_pages)[: 4 * 6].reshape(4, 6).astype(np.int32)
    table = np.pad(table, ((0, 0), (0, SHAPE.pages_per_row - 6)))
    return history, [
        _batch(table, new=[5, 6, 3, 2], known=[0, 0, 0, 0]),
        _batch(table, new=[1, 1, 9, 4], known=[5, 6, 3, 2]),
    ]


def _batch(table, new, known):
    first = sum(count == 1 for count in new)
    return Batch(
        np.arange(4, dtype=np.int32),
        np.array(known, np.int32) + np.array(new, np.int32),
        table,
        np.cumsum([0, *new], dtype=np.int32),
        np.array([first, 4], np.int32),
    )


def run(steps, shapes, params, batches, mesh=None):
    """Hidden states of the last step [replicas * tokens, size], and tokens [replicas * rows]. Of
    what one device has `shapes` tell, and `params` are those of all."""
    replicas = len(batches)
    known = {p.name: p for p in programs(steps, shapes, jnp.float32)}
    forward, sample = (known[name] for name in ("forward[16]", "sample[4]"))
    if mesh is not None:
        forward, sample = over(forward, mesh), over(sample, mesh)

    def joined(trees):
        return jax.tree.map(lambda *xs: np.concatenate(xs), *trees)

    pages = [np.full(x.shape, np.nan, x.dtype) for x in forward.args[1]]
    histories = [history for history, _ in batches]
    for step in range(2):
        batch = stacked([two[step] for _, two in batches])
        leaves = jax.tree.leaves(params)
        pages, hidden = jax.jit(forward.function)(leaves, pages, joined(histories), batch)
    ends = np.array([0, 1, 10, 14], np.int32)
    at = np.array([6, 7, 12, 6], np.int32)
    rows = stacked([Rows(ends, np.arange(4, dtype=np.int32), at)] * replicas)
    state = sampling.empty_state(4 * replicas, SHAPE.max_context, steps.config.vocab_size)
    state = state._replace(history=jnp.asarray(joined(histories)))
    state = state._replace(temperature=jnp.asarray([0.0, 0.0, 0.9, 0.9] * replicas, jnp.float32))
    head = head_of(steps.config, params)
    _, drawn = jax.jit(sample.function)(head, state, hidden, rows)
    return np.asarray(hidden), np.asarray(drawn.tokens).reshape(-1)


def main():
    for name, (config, count) in MODELS.items():
        parts, replicas = Parts(count), 4 // count
        graph, empty = abstract(config, Precision(jnp.float32))
        arrays = random_parameters({n: s.shape for n, s in parameters(empty).items()}, 0)
        whole = fill(empty, {n: jnp.asarray(a, jnp.float32) for n, a in arrays.items()})
        own_graph, own = abstract(config, Precision(jnp.float32), parts)
        placed = fill(
            own, {n: jnp.asarray(divided(n, a, config, parts)) for n, a in arrays.items()}
        )
        given = [batches(seed) for seed in range(replicas)]
        mesh = make_mesh(jax.devices(), replicas, count)
        steps = Steps(own_graph, config, SHAPE, parts)
        hidden, tokens = run(steps, own, placed, given, mesh)
        alone = Steps(graph, config, SHAPE, WHOLE)
        apart = [run(alone, whole, whole, [one]) for one in given]
        line = {
            "model": name,
            "parts": count,
            "divided": sum(any(axes) for axes in all_axes(own)),
            "apart": float(np.abs(hidden - np.concatenate([h for h, _ in apart])).max()),
            "scale": float(np.abs(hidden).max()),
            "same_tokens": tokens.tolist() == np.concatenate([t for _, t in apart]).tolist(),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
