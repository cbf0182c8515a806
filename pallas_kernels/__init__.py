"""Attention over paged keys and values. Imports jax only, never fastserve_jax.

One interface, `ragged_paged_attention`, and one page layout, `KVLayout`; `xla` runs anywhere,
`reference` is the slow and obviously right form that tests hold it to. `cpu` has kernels for int8
products too, compiled with the package.
"""

from . import cpu
from .layout import KVLayout, write_kv
from .xla import ragged_paged_attention, row_of_token

__all__ = ["KVLayout", "cpu", "ragged_paged_attention", "row_of_token", "write_kv"]
