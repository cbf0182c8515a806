"""python -m tests.aot.compile CHIP: every case by the chip's real compiler, a line of JSON for
each: what was compiled, in how long, and how much memory it takes; or the error."""

import json
import math
import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from fastserve_jax.chips import ENVIRONMENT, chips

os.environ.update(ENVIRONMENT)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import (
    KVLayout,
    cases,
    compiling_for,
    gather_pages,
    gpu,
    moe_grouped_matmul,
    quant_matmul,
    scatter_pages,
    tpu,
    write_kv,
)

PAGES, ROWS, WIDTH = 4096, 32, 64
SAID = tempfile.TemporaryDirectory()  # by a GPU's compiler, of each kernel
os.environ["MOSAIC_GPU_DUMP_TO"] = SAID.name
FAST_MEMORY = re.compile(r'used_scoped_memory_configs":\[\{"memory_space":"1".*?"size":"(\d+)"')
SHARED_MEMORY = re.compile(r"smem_scratch_bytes=(\d+)")
REGISTERS, SPILLED = re.compile(r"Used (\d+) registers"), re.compile(r"(\d+) bytes spill stores")
TOKENS = (32, 1024)  # rows of one token only; chunks beside them


def programs(chip):
    """Name, function and shapes of each."""
    yield from attention(chip)
    yield from others(chip)


def others(chip):
    """With the implementations that the chip takes."""
    for case in cases.PAGES:
        layers = [(case.layout(128 if ":" in chip else 1).shape, case.dtype)] * case.num_layers
        staged = ((case.size, case.num_layers, *layers[0][0][1:]), case.dtype)
        chosen = ((case.size,), "int32")
        yield f"gather {case.name}", gather, [chosen, *layers]
        yield f"scatter {case.name}", scatter, [staged, chosen, ((), "int32"), *layers]
        for tokens in TOKENS:
            new = ((tokens, case.num_kv_heads, case.head_dim), "float32")
            where = ((tokens,), "int32")
            pool = ((PAGES, *layers[0][0][1:]), case.dtype)
            yield f"write {case.name} {tokens}", write, [new, where, where, pool]
    for case in cases.MATMUL:
        given = [
            ((case.rows, case.inputs), "int8" if case.is_integer else "bfloat16"),
            ((case.outputs, case.inputs), case.dtype),
            ((case.groups, case.outputs), "float32"),
        ]
        if chip.startswith("a100") and case.dtype.startswith("float8"):
            continue  # which it does not have
        if case.is_integer:
            given.append(((case.rows, 1), "float32"))
        yield f"matmul {case.name}", quant_matmul, given
    for case in cases.MOE:
        rows = sum(case.group_sizes) + case.spare
        given = [
            ((rows, case.inputs), "bfloat16"),
            ((case.experts, case.inputs, case.outputs), "bfloat16"),
            ((case.experts,), "int32"),
        ]
        yield f"moe {case.name}", moe_grouped_matmul, given


def gather(sources, *layers):
    return gather_pages([*layers], sources)


def scatter(staged, targets, real, *layers):
    return scatter_pages([*layers], staged, targets, real)


def write(rows, pages, offsets, kv_pages):
    return write_kv(kv_pages, rows, rows, pages, offsets)


def attention(chip):
    is_tpu = ":" in chip
    for case in cases.ATTENTION:
        if case.page_size < 16 or case.head_dim % 16:
            continue  # less than a tile
        if chip.startswith("a100") and case.kv_dtype.startswith("float8"):
            continue  # which it does not have
        for dtype in ("bfloat16", "float32") if is_tpu else ("bfloat16",):
            for tokens in TOKENS:
                yield f"attention {case.name} {dtype} {tokens}", *program(case, dtype, tokens, chip)


def program(case, dtype, tokens, chip):
    lanes = 128 if ":" in chip else 1
    layout = KVLayout(PAGES, case.num_kv_heads, case.page_size, case.head_dim, lanes)
    options = {"scale": 0.1, "window": case.window, "soft_cap": case.soft_cap, "with_lse": True}
    shapes = [
        ((tokens, case.num_heads, case.head_dim), dtype),
        (layout.shape, case.kv_dtype or dtype),
        ((ROWS,), "int32"),
        ((ROWS, WIDTH), "int32"),
        ((ROWS + 1,), "int32"),
        ((2,), "int32"),
    ]
    names = []
    if case.sinks:
        names.append("sinks")
        shapes.append(((case.num_heads,), "float32"))
    if case.kv_dtype:
        names.append("kv_scales")
        shapes.append(((2, case.num_kv_heads), "float32"))
    if ":" in chip:
        attend = partial(tpu.ragged_paged_attention, **options)
    else:
        of_chip = {"has_tma": not chip.startswith("a"), "has_wgmma": chip.startswith("h")}
        attend = partial(gpu.ragged_paged_attention, **options, **of_chip)

    def run(*arrays):
        return attend(*arrays[:6], **dict(zip(names, arrays[6:], strict=True)))

    return run, shapes


def main(chip, only=""):
    """Prints a line for each case with `only` in its name, and returns them."""
    lines = []
    found = chips(chip)
    devices = found.devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    here = NamedSharding(mesh, PartitionSpec())
    for name, run, shapes in programs(chip):
        if only not in name:
            continue
        given = [jax.ShapeDtypeStruct(s, jnp.dtype(d), sharding=here) for s, d in shapes]
        began = time.perf_counter()
        line = {"chip": chip, "case": name}
        try:
            with (
                compiling_for(found.target),
                jax.default_device(devices[0]),
                jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            ):
                # What is in place: the layers, which are the arguments behind the first three.
                in_place = name.startswith(("scatter", "write"))
                donated = range(3, len(given)) if in_place else ()
                compiled = jax.jit(run, donate_argnums=tuple(donated)).lower(*given).compile()
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"[:1000]
        else:
            memory, text = compiled.memory_analysis(), compiled.as_text()
            line["temp_bytes"] = memory.temp_size_in_bytes
            line["argument_bytes"] = memory.argument_size_in_bytes
            line["alias_bytes"] = memory.alias_size_in_bytes
            kernels = [s for s in text.splitlines() if " custom-call(" in s]
            if name.startswith("matmul"):
                line["wide_copies"] = wide_copies(text, shapes[1][0])
            line["kernels"] = len(kernels)
            line["fast_bytes"] = most(FAST_MEMORY, "\n".join(kernels))  # a TPU's VMEM
            if ":" not in chip and kernels:
                line |= gpu_kernels()
        line["seconds"] = round(time.perf_counter() - began, 2)
        print(json.dumps(line), flush=True)
        lines.append(line)
    return lines


def wide_copies(text, weight):
    """Arrays that the program makes of as many elements as its weights have, in a wider type."""
    entry = text[text.index("ENTRY") :]
    made = re.findall(r"= (?:bf16|f16|f32|s32)\[([\d,]+)\]\S* (?!bitcast)", entry)
    return sum(math.prod(map(int, shape.split(","))) == math.prod(weight) for shape in made)


def gpu_kernels():
    """What a GPU's compiler said of the kernels of the program before: the largest of each."""
    files = list(Path(SAID.name).iterdir())
    said = "\n".join(f.read_text() for f in files if f.suffix in (".ptxas", ".txt"))
    for file in files:
        file.unlink()
    found = {"fast_bytes": SHARED_MEMORY, "registers": REGISTERS, "spilled_bytes": SPILLED}
    return {name: most(pattern, said) for name, pattern in found.items()}


def most(pattern, text):
    return max(map(int, pattern.findall(text)), default=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
