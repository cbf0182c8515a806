"""The compiled kernels: found beside this file, asked whether this machine can, told to XLA."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import jax

from ..target import target

FUNCTIONS = (
    *("fastserve_int8_matmul", "fastserve_int8_best", "fastserve_int8_draw"),
    *("fastserve_attention", "fastserve_draw"),
)


def runs() -> bool:
    """Whether programs traced now may call the kernels. True for one CPU device that has them."""
    return target().platform == "cpu" and _runs_here()


@cache
def _runs_here() -> bool:
    library = _library()
    if library is None or jax.device_count() > 1:
        return False
    if not library.fastserve_cpu_runs():
        return False
    for name in FUNCTIONS:
        capsule = _capsule(ctypes.cast(getattr(library, name), ctypes.c_void_p), None, None)
        jax.ffi.register_ffi_target(name, capsule, platform="cpu", api_version=1)
    return True


def missing() -> str | None:
    """Why `runs()` is False, in a few words; None where it is not."""
    if runs():
        return None
    if (library := _library()) is None:
        return "not compiled: there was no C++ compiler for this processor at installation"
    if not library.fastserve_cpu_runs():
        return "this processor has no AVX-512 VNNI"
    return "only for one CPU device"


@cache
def _library() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # built for another system
                return None
    return None


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
