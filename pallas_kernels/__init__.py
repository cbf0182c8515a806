"""Attention over paged keys and values. Imports jax only, never fastserve_jax.

One interface, `ragged_paged_attention`, and one page layout, `KVLayout`; `tpu` and `gpu` are
Pallas kernels, `xla` runs anywhere, `reference` is the slow and obviously right form that tests
hold them to. `cpu` has kernels for int8 products too, compiled with the package.
"""

from . import cpu
from .dispatch import lanes, ragged_paged_attention
from .layout import KVLayout, write_kv
from .xla import row_of_token

__all__ = ["KVLayout", "cpu", "lanes", "ragged_paged_attention", "row_of_token", "write_kv"]
