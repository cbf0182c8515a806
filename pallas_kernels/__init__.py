"""Attention over paged keys and values. Imports jax only, never fastserve_jax.

One interface, `ragged_paged_attention`, and one page layout, `KVLayout`; `xla` runs anywhere,
`reference` is the slow and obviously right form that tests hold it to.
"""

from .layout import KVLayout, write_kv
from .xla import ragged_paged_attention, row_of_token

__all__ = ["KVLayout", "ragged_paged_attention", "row_of_token", "write_kv"]
