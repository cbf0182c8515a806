"""python -m tests.serve.loading FOLDER HOST COORDINATOR: one of four hosts, each with one device,
loads its part of a model; prints what it has of it and the most memory that it ever had, in bytes.

A CPU device's memory is the host's, so with a device each, what a host has is what its device has,
and what reading took beside it.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu"}

import jax
import jax.numpy as jnp

from fastserve_jax.models.decoder import abstract
from fastserve_jax.models.precision import Precision
from fastserve_jax.reading import Division, read
from fastserve_jax.runtime.hosts import join, part
from fastserve_jax.runtime.mesh import make_mesh
from fastserve_jax.weights.load import open_model

HOSTS = 4


def most_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main(folder, host, coordinator):
    join(coordinator, HOSTS, int(host), 120)
    files = open_model(folder, Path("nowhere"))
    division = Division(make_mesh(jax.devices(), 1, HOSTS))
    precision = Precision(jnp.bfloat16)
    _, empty = abstract(files.config, precision, division.parts)
    params = read(files, precision, empty, division, Path("nowhere"), lambda *_: None)
    leaves = jax.block_until_ready(jax.tree.leaves(params))
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    line = {"held": held, "most": most_bytes(), "whole": files.size_bytes}
    print(json.dumps(line), flush=True)
    part()


if __name__ == "__main__":
    main(*sys.argv[1:])
