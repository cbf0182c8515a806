"""Programs from what an earlier start traced: the same results, in place, and nothing traced."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from fastserve_jax.core.types import Admission, Plan, Sampling, Work
from fastserve_jax.runtime.shapes import Program, ints, like
from fastserve_jax.runtime.step import StepShape
from fastserve_jax.runtime.traced import lower_kept
from tests.models.families import FAMILIES
from tests.runtime.build import build_runner


class Pair(NamedTuple):
    total: jax.Array
    pages: list[jax.Array]


export.register_namedtuple_serialization(Pair, serialized_name="tests.Pair")


def program(traced, factor=2.0, size=4, name="double[4]"):
    def double(pages, given):
        traced.append(name)
        return Pair(sum(page.sum() for page in pages), [p * factor + given["n"] for p in pages])

    args = ([like((size,), jnp.float32)] * 2, {"n": ints(), "unused": ints(3)})
    return Program(name, double, args, donated=(0,))


def run(lowered, size=4):
    pages = [jnp.arange(size, dtype=jnp.float32), jnp.ones(size)]
    result = lowered.compile()(pages, {"n": np.int32(1), "unused": np.zeros(3, np.int32)})
    return pages, result


def test_a_second_start_traces_nothing_and_computes_the_same(tmp_path):
    traced = []
    for _ in range(2):
        pages, result = run(lower_kept(program(traced), tmp_path, "facts"))
        assert isinstance(result, Pair)
        assert result.total == 10
        np.testing.assert_array_equal(result.pages, [[1, 3, 5, 7], [3, 3, 3, 3]])
        assert all(page.is_deleted() for page in pages), "not in place"
    assert traced == ["double[4]"]


def test_other_facts_names_and_arguments_are_traced_for_themselves(tmp_path):
    traced = []
    lower_kept(program(traced), tmp_path, "facts")
    _, result = run(lower_kept(program(traced, factor=3.0), tmp_path, "other facts"))
    assert result.pages[1].tolist() == [4] * 4
    _, result = run(lower_kept(program(traced, size=5), tmp_path, "facts"), size=5)
    assert result.total == 15
    lower_kept(program(traced, name="other"), tmp_path, "facts")
    assert len(traced) == len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", bytes.swapcase])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    traced = []
    lower_kept(program(traced), tmp_path, "facts")
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    for _ in range(2):
        assert run(lower_kept(program(traced), tmp_path, "facts"))[1].total == 10
    assert len(traced) == 2


def test_what_cannot_be_exported_is_traced_each_time(tmp_path):
    traced = []

    def inspected(x):
        traced.append(x)
        jax.debug.callback(lambda: None)
        return x + 1

    for _ in range(2):
        lower_kept(Program("inspected", inspected, (ints(2),)), tmp_path, "facts")
    assert len(traced) >= 2
    assert not list(tmp_path.iterdir())


def test_a_runner_draws_the_same_tokens_from_kept_programs(tmp_path):
    shape = StepShape(4, 16, 64, 4, 48, host_pages=8)
    rules = Sampling(max_tokens=4, temperature=0.8, seed=7, logprobs=2, prompt_logprobs=1)
    prompt = (1, 5, 9, 3, 7)
    plans = [
        Plan(0, (Admission(0, 0, prompt, 5, rules),), (Work(0, 0, 0, 5, 0, (3, 8), True),)),
        Plan(1, (), (Work(0, 0, 5, 1, 2, (), True),)),
    ]
    kept = partial(lower_kept, folder=tmp_path, facts=shape)
    found = []
    for lower in (Program.lower, kept, kept):
        runner, _ = build_runner(FAMILIES["llama"], shape, lower=lower)
        with runner:
            found.append([runner.run(plan) for plan in plans])
    assert found[0] == found[1] == found[2]
    names = len(list(tmp_path.iterdir()))
    assert names == len(shape.token_buckets) + len(shape.row_buckets) + len(["score", "admit"])


def test_a_gpus_kept_programs_find_what_its_kernels_call(tmp_path):
    """jax says where that lies when a module is imported, which nothing in a second start does."""
    lower_kept(program([]), tmp_path, "facts")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.runtime.test_traced import lower_kept, program\n"
        "from pallas_kernels import Target, compiling_for\n"
        "for name in [n for n in sys.modules if 'mosaic' in n]: del sys.modules[name]\n"
        "assert 'pallas_kernels.gpu' not in sys.modules\n"
        "with compiling_for(Target('gpu')):\n"
        f"    lower_kept(program([]), Path({str(tmp_path)!r}), 'facts')\n"
        "assert 'jax.experimental.mosaic.gpu' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
