"""What a decoder needs that XLA has no good form of. Imports jax only, never fastserve_jax.

    ragged_paged_attention  over pages of keys and values, as KVLayout has them
    gather_pages, scatter_pages  whole pages of all layers, for the host tier
    quant_matmul            weights of fewer bits
    moe_grouped_matmul      rows through the matrices of their experts

Each has one interface, and an implementation that suits the platform: `tpu` and `gpu` are Pallas
kernels, plain XLA runs anywhere, and `reference` is the slow and obviously right form that tests
hold them to. `cpu` has kernels of its own, compiled with the package.
"""

from . import cpu
from .dispatch import prepare, ragged_paged_attention
from .layout import KVLayout, write_kv
from .moe import moe_grouped_matmul
from .page_copy import gather_pages, scatter_pages
from .quant_matmul import quant_matmul
from .target import Target, compiling_for, target
from .xla import row_of_token

__all__ = [
    "KVLayout",
    "Target",
    "compiling_for",
    "cpu",
    "gather_pages",
    "moe_grouped_matmul",
    "prepare",
    "quant_matmul",
    "ragged_paged_attention",
    "row_of_token",
    "scatter_pages",
    "target",
    "write_kv",
]
