"""The host tier: KV pages kept in host memory, and the programs that copy them there and back.

    swap_out[n]  up to n device pages into host pages
    swap_in[n]   up to n host pages into device pages

A host page is one KV page of all layers, contiguous, as rows of 128: so no chip tiles over page
numbers, and a page is one copy at an offset. That is how host memory is read and written
throughout, because no accelerator gathers from it or scatters into it. What is written is donated
and changed in place. Knows page numbers only: not whose they are, nor why they move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike

from fastserve_jax.core.types import Copies
from pallas_kernels import gather_pages, scatter_pages

from .mesh import HOST, HOST_PAGES, PAGES, placed
from .shapes import Program, ints, like, stacked

SIZES = (4, 16)  # pages of one call; a call itself costs as much as three pages
_LANES = 128
_ENOUGH_WORK = 2048


@dataclass(frozen=True, slots=True)
class HostLayout:
    """All host pages: [num_pages, layers * rows of a layer, lanes]."""

    num_pages: int
    num_layers: int
    page_elements: int  # of one KV page in one layer

    @property
    def shape(self) -> tuple[int, int, int]:
        """One more: nobody's, for a replica that copies nothing while another does."""
        lanes = math.gcd(self.page_elements, _LANES)
        return (self.num_pages + 1, self.num_layers * self.page_elements // lanes, lanes)


def empty_host_pages(layout: HostLayout, dtype: DTypeLike, mesh: Mesh | None) -> jax.Array | None:
    """None where there is no host tier. From numpy: the device might have no room to make them."""
    if not layout.num_pages:
        return None
    if mesh is not None:
        # From numpy: a device might have no room to make them.
        return placed(mesh, HOST_PAGES, lambda _: np.zeros(layout.shape, dtype), "pinned_host")
    there = _in_host_memory(jax.devices()[0])
    pages: jax.Array = jax.device_put(np.zeros(layout.shape, dtype), there)
    return pages


def _in_host_memory(device: jax.Device) -> NamedSharding:
    mesh = Mesh(np.array([device]), ("x",))
    everywhere = PartitionSpec()  # type: ignore[no-untyped-call]
    return NamedSharding(mesh, everywhere, memory_kind="pinned_host")


class Moves(NamedTuple):
    """Sources and targets [n] int32, filled up with the last pair: to copy it again is harmless."""

    sources: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    real: jax.Array | np.generic  # int32: how many of them are not filling


@dataclass(frozen=True, slots=True)
class Swaps:
    """The two functions to be compiled. `kv_pages` is one array per layer, as KVLayout says."""

    on_cpu: bool

    def swap_out(
        self, host_pages: jax.Array, kv_pages: list[jax.Array], moves: Moves
    ) -> tuple[jax.Array, jax.Array]:
        """-> host pages (donated through), a number that is there when the copies are."""
        size, sources = moves.sources.shape[0], jnp.asarray(moves.sources)
        staged = gather_pages(kv_pages, sources).reshape(size, *host_pages.shape[1:])

        def store(i: jax.Array, host_pages: jax.Array) -> jax.Array:
            page = jax.device_put(_rows(staged, i), jax.memory.Space.Host)
            return _put(host_pages, page, _number(moves.targets, i))

        return self._each(moves, store, host_pages), _after(moves)

    def swap_in(
        self, kv_pages: list[jax.Array], host_pages: jax.Array, moves: Moves
    ) -> tuple[list[jax.Array], jax.Array]:
        """-> KV pages (donated through), a number that is there when the copies are."""
        _, rows, lanes = host_pages.shape
        own = rows // len(kv_pages)  # rows of one layer

        def fetch(i: jax.Array, first: int, rows: int) -> jax.Array:
            there = _rows(host_pages, _number(moves.sources, i), first, rows)
            page: jax.Array = jax.device_put(there, jax.memory.Space.Device)
            return page

        def restore(i: jax.Array, views: list[jax.Array]) -> list[jax.Array]:
            target, shape = _number(moves.targets, i), (1, *views[0].shape[1:])
            return [
                _put(view, fetch(i, layer * own, own).reshape(shape), target)
                for layer, view in enumerate(views)
            ]

        def stage(i: jax.Array, staged: jax.Array) -> jax.Array:
            return _put(staged, fetch(i, 0, rows), i)

        if self.on_cpu:  # to compile scatters of whole pages would take it ten times as long
            # The views are made outside the loop: a body that ends in one writes whole arrays. Of
            # an array with a dimension of one, XLA copies the whole when it is viewed again.
            own_shape = kv_pages[0].shape
            shape = own_shape if 1 in own_shape else (-1, own, lanes)
            views = self._each(moves, restore, [pages.reshape(shape) for pages in kv_pages])
            return [view.reshape(own_shape) for view in views], _after(moves)
        # A TPU's memory is tiled: the view would be a copy of the whole cache.
        size, targets = moves.sources.shape[0], jnp.asarray(moves.targets)
        empty = jnp.zeros((size, rows, lanes), host_pages.dtype)
        staged = self._each(moves, stage, empty)
        staged = staged.reshape(size, len(kv_pages), *kv_pages[0].shape[1:])
        return scatter_pages(kv_pages, staged, targets, jnp.asarray(moves.real)), _after(moves)

    def _each[T](self, moves: Moves, copy: Callable[[jax.Array, T], T], start: T) -> T:
        """Only a CPU stops at `real`: a GPU's dispatch would wait to learn how far to go."""
        stop = moves.real if self.on_cpu else moves.sources.shape[0]
        done: T = lax.fori_loop(0, stop, copy, start)
        return done


def _after(moves: Moves) -> jax.Array:
    """Some number, by way of a thousand operations: what has fewer, copies not being any, XLA:CPU
    runs before it returns to the caller."""
    return jnp.sum(jnp.arange(_ENOUGH_WORK) ^ jnp.asarray(moves.real))


def _number(numbers: jax.Array | np.ndarray, i: jax.Array) -> jax.Array:
    number: jax.Array = lax.dynamic_index_in_dim(jnp.asarray(numbers), i, keepdims=False)
    return number


def _rows(pool: jax.Array, page: jax.Array, first: int = 0, count: int | None = None) -> jax.Array:
    sizes = (1, pool.shape[1] if count is None else count, pool.shape[2])
    return lax.dynamic_slice(pool, (page, first, 0), sizes)


def _put(pool: jax.Array, page: jax.Array, number: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(pool, page, (number, *(0,) * (pool.ndim - 1)))


def swap_programs(
    layout: HostLayout, kv_pages: list[jax.Array], device: jax.Device
) -> Iterator[Program]:
    """Both ways in every size; none where there are no host pages."""
    if not layout.num_pages:
        return
    there, here = _in_host_memory(device), SingleDeviceSharding(device)
    host_pages = like(layout.shape, kv_pages[0].dtype, there)
    swaps = Swaps(on_cpu=device.platform == "cpu")
    for size in reversed(SIZES):
        moves = Moves(ints(size), ints(size), ints())
        # A CPU's loop ends where the copies do: its largest program serves any number.
        if size == SIZES[-1] or not swaps.on_cpu:
            given = (kv_pages, host_pages, moves)
            specs = (PAGES, HOST_PAGES, HOST), (PAGES, HOST)
            yield Program(f"swap_in[{size}]", swaps.swap_in, given, (0,), specs, placed=here)
        out = (host_pages, kv_pages, moves)
        specs = (HOST_PAGES, PAGES, HOST), (HOST_PAGES, HOST)
        placed = (there, here)
        yield Program(f"swap_out[{size}]", swaps.swap_out, out, (0,), specs, placed)


class HostTier:
    """The host pages and their programs; the KV pages are the caller's.

    Both ways return an array that is there when the copies are: unlike what was written, it is
    nobody's to donate. Copies are those of each replica.
    """

    def __init__(
        self,
        host_pages: jax.Array,
        num_host_pages: int,
        num_pages: int,
        programs: Mapping[str, jax.stages.Compiled],
    ) -> None:
        self._host_pages = host_pages  # donated to every swap out
        # What a replica without copies moves meanwhile: to nobody's page, and to none at all.
        self._idle = {"swap_out": (0, num_host_pages), "swap_in": (num_host_pages, num_pages)}
        self._programs = programs

    def swap_out(self, kv_pages: list[jax.Array], copies: Sequence[Copies]) -> jax.Array:
        done: jax.Array
        for program, moves in self._calls("swap_out", copies):
            self._host_pages, done = program(self._host_pages, kv_pages, moves)
        return done

    def swap_in(
        self, kv_pages: list[jax.Array], copies: Sequence[Copies]
    ) -> tuple[list[jax.Array], jax.Array]:
        """`kv_pages` are donated."""
        for program, moves in self._calls("swap_in", copies):
            kv_pages, done = program(kv_pages, self._host_pages, moves)
        return kv_pages, done

    def _calls(
        self, name: str, copies: Sequence[Copies]
    ) -> Iterator[tuple[jax.stages.Compiled, Moves]]:
        known = [size for size in SIZES if f"{name}[{size}]" in self._programs]
        for first in range(0, max(map(len, copies)), known[-1]):
            some = [own[first : first + known[-1]] for own in copies]
            size = next(size for size in known if size >= max(map(len, some)))
            program = self._programs[f"{name}[{size}]"]
            yield program, stacked([_moves(own, size, self._idle[name]) for own in some])


def _moves(copies: Copies, size: int, idle: tuple[int, int]) -> Moves:
    last = copies[-1] if copies else idle
    padded = np.array([*copies, *[last] * (size - len(copies))], np.int32)
    sources, targets = np.ascontiguousarray(padded.T)
    return Moves(sources, targets, np.int32(len(copies)))
