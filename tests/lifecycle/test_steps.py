"""Where a step's arrays lie on a mesh, from the first one on, and how often it is compiled."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import optax

from fastserve_jax.lifecycle.steps import Steps, make_mesh, place, place_batch

ROWS, SIZE = 8, 64


def loss(params, frozen, batch):
    made = batch["x"] @ params["mlp.down.weight"].T + params["norm.weight"]
    return jax.numpy.sum(made**2), (jax.numpy.int32(ROWS), jax.numpy.int32(0))


def found(axes):
    """Bytes of parameters, and of the optimiser's arrays, that each device has; programs."""
    mesh = make_mesh(jax.devices(), *axes)
    arrays = {"mlp.down.weight": np.ones((SIZE, SIZE), np.float32), "norm.weight": np.ones(SIZE)}
    params = place(arrays, mesh)
    steps = Steps(loss, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))
    now = steps.begin(params, mesh)
    held = [[held_by(device, tree) for device in jax.devices()] for tree in (params, now.moments)]
    step_of = steps.compiled(now)
    for _ in range(3):
        batch = place_batch({"x": np.ones((ROWS, SIZE), np.float32)}, mesh, 2)
        now, _ = step_of(now, {}, batch)
    return {"params": held[0], "moments": held[1], "programs": step_of._cache_size()}


def held_by(device, tree):
    return sum(
        shard.data.nbytes
        for array in jax.tree.leaves(tree)
        for shard in array.addressable_shards
        if shard.device == device
    )


def test_moments_lie_as_their_parameters_and_one_program_does():
    meshes = {"fsdp": (1, 4, 1), "tensor": (1, 1, 4), "both": (1, 2, 2), "data": (4, 1, 1)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.lifecycle.test_steps", *map(json.dumps, meshes.values())],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, line in zip(meshes, done.stdout.splitlines(), strict=True):
        told = json.loads(line)
        counts = 4  # bytes of how many steps there were, which every device knows
        assert told["moments"] == [2 * bytes_ + counts for bytes_ in told["params"]], name
        assert told["programs"] == 1, name


if __name__ == "__main__":
    for axes in sys.argv[1:]:
        print(json.dumps(found(json.loads(axes))))
