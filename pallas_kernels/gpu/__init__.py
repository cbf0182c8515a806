"""Kernels for NVIDIA GPUs (Mosaic GPU), each held to `pallas_kernels.reference`."""

from .attention import ragged_paged_attention

__all__ = ["ragged_paged_attention"]
