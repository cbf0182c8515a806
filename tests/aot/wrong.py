"""python -m tests.aot.wrong CHIP: a kernel whose tiles no chip has room for; ends well if it is
refused, as it must be."""

import sys

from pallas_kernels.gpu.rules import Rules
from pallas_kernels.tpu import kernel as tpu_kernel
from tests.aot import compile as aot

tpu_kernel._KV_BYTES, tpu_kernel._MOST_KEYS = 1 << 30, 1 << 16
Rules.keys = property(lambda self: 1 << 10)
error = aot.main(sys.argv[1], "llama3_8b_decode bfloat16 32")[0].get("error", "")
print(error)
sys.exit(0 if "vmem" in error or "shared memory" in error.lower() or "smem" in error else 1)
