"""The kernels for TPUs and GPUs under their interpreters: values, races, and what is read."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import cases, gpu, reference, tpu
from pallas_kernels.gpu import kernel as gpu_kernel
from pallas_kernels.tpu import kernel as tpu_kernel
from tests.kernels.rows import build, options

KERNELS = {
    "tpu": partial(tpu.ragged_paged_attention, interpret=pltpu.InterpretParams(detect_races=True)),
    "gpu": partial(
        gpu.ragged_paged_attention, interpret=plgpu.InterpretGPUParams(detect_races=True)
    ),
}
KERNELS["hopper"] = partial(KERNELS["gpu"], has_wgmma=True)


# Minutes that tell little: their like is among the rest. `make aot` runs them.
SELDOM = ("qwen2_mixed", "gpt2_few", "mixtral_few", "gemma3_local", "llama3_8b_decode")
SELDOM += ("llama3_8b_long", "llama3_8b_int8", "qwen3_mixed", "smollm2_decode", "phi3_medium_few")
SELDOM += ("gemma3_global",)
SELDOM_ON_GPUS = ("phi2_few", "llama3_8b_fp8", "gemma3_local_narrow", "smollm2_mixed")
CHUNKS_ALONE = ("phi2_few", "llama3_8b_fp8", "gemma3_local_narrow")
LIKE_ANOTHER = pytest.mark.skipif(
    "not config.getoption('-m')", reason="its like is among the rest: make aot runs it, too"
)
RUNS = [
    pytest.param(
        chip,
        case,
        id=f"{chip}-{case.name}",
        marks=[LIKE_ANOTHER, pytest.mark.aot] if case.name in seldom else [],
    )
    for chip, seldom in (("tpu", SELDOM), ("gpu", SELDOM + SELDOM_ON_GPUS), ("hopper", SELDOM))
    for case in cases.ATTENTION
    if chip == "tpu" or case.head_dim % 16 == 0
    if chip != "hopper" or case.name in CHUNKS_ALONE  # rows of one token are multiplied as ever
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


# Wrong kernels, to see the checks fail


@pytest.fixture
def forgets():
    """An interpreter that has raised must forget what it was about."""
    yield
    pltpu.reset_tpu_interpret_mode_state()
    reset_gpu_interpret_mode_state()


def differs(chip):
    """Whether the kernel is caught: by its interpreter, or by what comes of it."""
    arrays = build(SMALL, jnp.float32, lanes=128)
    used = int(arrays[4][-1])
    want = reference.ragged_paged_attention(*arrays, scale=0.1)
    try:
        got = KERNELS[chip](*arrays, scale=0.1)
    except Exception as error:
        return "RACE" in str(error)
    return not np.allclose(np.asarray(got[:used]), np.asarray(want[:used]), atol=1e-3)


SMALL = cases.AttentionCase("small", 2, 1, 64, ((1, 300), (20, 397)))


def test_the_kernels_as_they_are_pass():
    assert not differs("tpu")
    assert not differs("gpu")
    assert not differs("hopper")


def test_copies_that_are_not_waited_for_are_caught(monkeypatch, forgets):
    monkeypatch.setattr(tpu_kernel, "_wait", lambda copy: None)
    assert differs("tpu")


def test_two_copies_into_one_buffer_are_caught(monkeypatch, forgets):
    copies = tpu_kernel.Kernel.copies

    def into_one(self, table, group, at, span, slot, act):
        copies(self, table, group, at, span, 0, act)

    monkeypatch.setattr(tpu_kernel.Kernel, "copies", into_one)
    assert differs("tpu")


def test_a_copy_over_what_is_still_read_is_caught(monkeypatch, forgets):
    monkeypatch.setattr(gpu_kernel.plgpu, "commit_smem", lambda: None)
    assert differs("gpu")


def test_a_barrier_that_is_not_waited_for_is_caught(monkeypatch, forgets):
    monkeypatch.setattr(gpu_kernel._Kernel, "wait", lambda self, slot, has_next: None)
    assert differs("gpu")


def test_values_that_are_not_cleared_are_caught(monkeypatch, forgets):
    monkeypatch.setattr(gpu_kernel._Kernel, "clear", lambda self, values, live: None)
    assert differs("hopper")


def test_garbage_that_is_not_masked_is_caught(monkeypatch, forgets):
    everything = lambda self, *given: jnp.ones((self.rules.rows, self.rules.keys), bool)  # noqa: E731
    monkeypatch.setattr(gpu_kernel._Kernel, "seen", everything)
    assert differs("gpu")
