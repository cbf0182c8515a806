"""Kernels for TPUs (Mosaic), each held to `pallas_kernels.reference`."""

from .attention import ragged_paged_attention
from .matmul import quant_matmul
from .pages import gather_pages, scatter_pages
from .write import write_rows

__all__ = [
    "gather_pages",
    "quant_matmul",
    "ragged_paged_attention",
    "scatter_pages",
    "write_rows",
]
