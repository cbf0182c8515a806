"""A DeviceRunner over random parameters, compiled small."""

import jax.numpy as jnp

from fastserve_jax.models.adapters import empty_adapters
from fastserve_jax.models.decoder import fill, parameters
from fastserve_jax.models.precision import Precision
from fastserve_jax.models.seq2seq import abstract
from fastserve_jax.runtime.compile import compile_all
from fastserve_jax.runtime.drafter import Drafter, draft_programs, empty_draft_pages
from fastserve_jax.runtime.host import empty_host_pages
from fastserve_jax.runtime.runner import DeviceRunner
from fastserve_jax.runtime.shapes import Program
from fastserve_jax.runtime.step import Steps, StepShape, empty_pages, programs
from tests.models.oracle import random_parameters

SHAPE = StepShape(max_slots=4, step_tokens=16, max_context=64, page_size=4, num_pages=48)


def build_drafter(config, shape, dtype=jnp.float32, seed=0):
    """A drafter for build_runner."""
    graph, params, _ = random_model(config, dtype, seed)
    compiled = compile_all(draft_programs(graph, config, shape, params, dtype))
    return Drafter(params, empty_draft_pages(config, shape, dtype), shape, compiled)


def random_model(config, dtype, seed, edit=lambda arrays: None):
    """-> graph, parameters, the same as float32 arrays after `edit` had its way with them."""
    graph, empty = abstract(config, Precision(dtype))
    shapes = {name: struct.shape for name, struct in parameters(empty).items()}
    arrays = random_parameters(shapes, seed)
    edit(arrays)
    params = fill(empty, {name: jnp.asarray(array, dtype) for name, array in arrays.items()})
    return graph, params, arrays


def build_runner(
    config,
    shape=SHAPE,
    dtype=jnp.float32,
    seed=0,
    edit=lambda arrays: None,
    lower=Program.lower,
    drafter=None,
):
    """-> runner, float32 arrays by canonical name, after `edit` had its way with them."""
    graph, params, arrays = random_model(config, dtype, seed, edit)
    return runner_of(graph, config, shape, params, dtype, lower, drafter), arrays


def runner_of(graph, config, shape, params, dtype, lower=Program.lower, drafter=None):
    compiled = compile_all(programs(Steps(graph, config, shape), params, dtype), lower=lower)
    kv_pages = empty_pages(config, shape, dtype)
    host_pages = empty_host_pages(shape.host_layout(config), dtype, None)
    room = shape.adapters
    adapters = empty_adapters(config, room, dtype) if room.count else None
    given = (config, params, kv_pages, shape, compiled, host_pages, drafter)
    return DeviceRunner(*given, adapters=adapters)
