"""Kernels for x86 processors with AVX-512 VNNI, compiled with the package.

Plain XLA runs everywhere and is what these are held to; they are taken where `runs()`. XLA cannot
be brought to these speeds: it reads a head of 262,144 rows at half the memory's rate, never blocks
a product by registers for few rows, spends a third of a decoder's step in small loops around its
products, and a draw from that vocabulary takes it as long as all the rest. Imports jax only.
"""

from .attention import fits, paged_attention
from .draw import Rules, draw, int8_draw
from .int8 import Norm, int8_best, int8_matmul
from .library import FUNCTIONS, missing, runs

__all__ = [
    "FUNCTIONS",
    "Norm",
    "Rules",
    "draw",
    "fits",
    "int8_best",
    "int8_draw",
    "int8_matmul",
    "missing",
    "paged_attention",
    "runs",
]
