"""The kernels for TPUs and GPUs under their interpreters: values, races, and what is read."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import cases, gpu, reference, tpu
from tests.kernels.rows import build, options

KERNELS = {
    "tpu": partial(tpu.ragged_paged_attention, interpret=pltpu.InterpretParams(detect_races=True)),
    "gpu": partial(
        gpu.ragged_paged_attention, interpret=plgpu.InterpretGPUParams(detect_races=True)
    ),
}


RUNS = [
    pytest.param(chip, case, id=f"{chip}-{case.name}")
    for chip in KERNELS
    for case in cases.ATTENTION
    if chip == "tpu" or case.head_dim % 16 == 0
]


@pytest.mark.parametrize(("chip", "case"), RUNS)
def test_kernel_equals_reference_without_races(chip, case):
    arrays = build(case, jnp.float32, lanes=128 if chip == "tpu" else 1)
    used = int(arrays[4][-1])
    given = options(case)
    got = KERNELS[chip](*arrays, **given, with_lse=True)
    want = reference.ragged_paged_attention(*arrays, **given, with_lse=True)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(ours[:used]), np.asarray(theirs[:used]), atol=1e-5)
