"""One decoder for every family: what differs is in ModelConfig. Knows pages as arrays only.

`Batch` names each row's place; the tokens of all rows lie ragged behind each other, rows with a
single token first. The KV cache comes in and goes out as a list with one array per layer, so that
a caller who donates it has it updated in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastserve_jax.errors import ConfigError
from pallas_kernels import KVLayout, cpu, ragged_paged_attention, row_of_token, write_kv

from .adapters import Adapters, Lora
from .config import ModelConfig, Seq2SeqConfig
from .experts import Experts
from .layers import (
    Embedding,
    LayerNorm,
    Linear,
    Matrix,
    Norm,
    RMSNorm,
    Rotation,
    activate,
    for_kernel,
    rope_frequencies,
    rotate,
    rotation,
)
from .parts import GATES, HEADS, INNER, QKV, WHOLE, Axes, Parts
from .precision import Precision

type Array = jax.Array | np.ndarray
type State = nnx.State[Any, Any]  # parameters by path


class Batch(NamedTuple):
    """One step's rows, all int32; see pallas_kernels.ragged_paged_attention for the middle four."""

    slots: Array  # [rows] where each row's tokens are kept
    kv_lens: Array  # [rows] with this step's tokens
    page_table: Array  # [rows, pages_per_row]
    cu_q_lens: Array  # [rows + 1]
    distribution: Array  # [2]
    sources: Array | None = None  # [rows] tokens that an encoder reads; None: there is no encoder


class Place(NamedTuple):
    """Where each token of the step stands; derived once, used by every layer."""

    rows: jax.Array  # [tokens]
    positions: jax.Array  # [tokens]
    pages: jax.Array  # [tokens]; out of range for padding, which write_kv drops
    offsets: jax.Array  # [tokens]
    live: jax.Array  # how many tokens are not padding


def place(batch: Batch, tokens: int, layout: KVLayout) -> Place:
    at = jnp.arange(tokens, dtype=jnp.int32)
    cu_q_lens, kv_lens = jnp.asarray(batch.cu_q_lens), jnp.asarray(batch.kv_lens)
    rows = row_of_token(cu_q_lens, tokens)
    real = rows < jnp.asarray(batch.distribution)[1]
    rows = jnp.where(real, rows, 0)
    positions = jnp.where(real, kv_lens[rows] - cu_q_lens[rows + 1] + at, 0)
    pages = jnp.asarray(batch.page_table)[rows, positions // layout.page_size]
    pages = jnp.where(real, pages, layout.num_pages)
    live = cu_q_lens[jnp.asarray(batch.distribution)[1]]
    return Place(rows, positions, pages, positions % layout.page_size, live)


class Attention(nnx.Module):
    def __init__(
        self, config: ModelConfig, window: int, precision: Precision, name: str, parts: Parts
    ) -> None:
        heads, dim = config.num_heads + 2 * config.num_kv_heads, config.head_dim
        size, dtype = config.hidden_size, precision.dtype
        qkv, out = (precision.of(f"{name}.{part}") for part in ("qkv", "out"))
        bias = dtype if config.qkv_bias else None
        self.qkv = Linear(heads * dim, size, qkv, bias, (QKV, None), parts)
        bias = dtype if config.linear_bias else None
        self.out = Linear(size, config.num_heads * dim, out, bias, (None, HEADS), parts)
        if config.qk_norm:
            self.q_norm = RMSNorm(dim, config.norm_eps, dtype)
            self.k_norm = RMSNorm(dim, config.norm_eps, dtype)
        self.config, self.window, self.dtype = config, window, dtype

    def __call__(
        self,
        x: jax.Array,
        kv_pages: jax.Array | None,
        batch: Batch | None,
        at: Place,
        turn: Rotation | None,
        norm: Norm,
        post_norm: Norm | None,
        lora: Lora | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """x + post_norm(attention of norm(x)), and the pages with the new keys and values. Without
        pages a token sees those before it of its own row, all of which are in x."""
        qkv, out = (None, None) if lora is None else (lora.of("attn.qkv"), lora.of("attn.out"))
        heads = self.qkv(x, at.live, norm=norm, beside=qkv)
        heads = heads.reshape(x.shape[0], -1, self.config.head_dim)
        mixed, kv_pages = self._mix(heads, kv_pages, batch, at, turn)
        return self.out(mixed, at.live, add=x, add_norm=post_norm, beside=out), kv_pages

    def _mix(
        self,
        heads: jax.Array,
        kv_pages: jax.Array | None,
        batch: Batch | None,
        at: Place,
        turn: Rotation | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        config, dim = self.config, self.config.head_dim
        scale = dim**-0.5 if config.attention_scale is None else config.attention_scale
        rows = () if batch is None else tuple(map(jnp.asarray, batch[1:5]))
        if kv_pages is not None and cpu.runs() and cpu.fits(dim, kv_pages.dtype):
            norms = (self.q_norm, self.k_norm) if config.qk_norm else (None, None)
            return cpu.paged_attention(
                heads,
                kv_pages,
                *rows,
                scale=scale,
                window=self.window,
                turn=turn,
                q_norm=for_kernel(norms[0]),
                k_norm=for_kernel(norms[1]),
            )
        q, k, v = jnp.split(
            heads, [config.num_heads, config.num_heads + config.num_kv_heads], axis=1
        )
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        q = q.astype(self.dtype)
        if kv_pages is None:
            mixed = attend(q, k.astype(self.dtype), v.astype(self.dtype), at, scale, self.window)
            return mixed.reshape(heads.shape[0], -1), None
        kv_pages = write_kv(kv_pages, k, v, at.pages, at.offsets)
        mixed = ragged_paged_attention(q, kv_pages, *rows, scale=scale, window=self.window)
        return mixed.reshape(len(heads), -1), kv_pages


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, at: Place, scale: float, window: int
) -> jax.Array:
    """[tokens, heads, head_dim] each, of rows behind each other: causal within a row."""
    ahead = at.positions[:, None] - at.positions
    mask = (at.rows[:, None] == at.rows) & (ahead >= 0)
    mask = mask & (ahead < window) if window else mask
    return jax.nn.dot_product_attention(q[None], k[None], v[None], mask=mask[None], scale=scale)[0]


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, precision: Precision, name: str, parts: Parts) -> None:
        inner, size = config.intermediate_size, config.hidden_size
        bias = precision.dtype if config.linear_bias else None
        if config.gated_mlp:
            dtype = precision.of(f"{name}.gate_up")
            self.gate_up = Linear(2 * inner, size, dtype, bias, (GATES, None), parts)
        else:
            dtype = precision.of(f"{name}.up")
            self.up = Linear(inner, size, dtype, bias, (INNER, None), parts)
        dtype = precision.of(f"{name}.down")
        self.down = Linear(size, inner, dtype, bias, (None, INNER), parts)
        self.activation, self.gated = config.activation, config.gated_mlp

    def __call__(
        self,
        x: jax.Array,
        live: jax.Array,
        norm: Norm,
        post_norm: Norm | None,
        lora: Lora | None = None,
    ) -> jax.Array:
        """x + post_norm(MLP of norm(x))."""
        of = (lambda name: None) if lora is None else lora.of
        added: dict[str, Any] = {"add": x, "add_norm": post_norm, "beside": of("mlp.down")}
        if self.gated:
            inner = self.gate_up(x, live, norm=norm, beside=of("mlp.gate_up"))
            return self.down(inner, live, gate=self.activation, **added)
        inner = activate(self.activation, self.up(x, live, norm=norm, beside=of("mlp.up")))
        return self.down(inner, live, **added)


class Layer(nnx.Module):
    def __init__(
        self,
        config: ModelConfig,
        window: int,
        precision: Precision,
        name: str,
        parts: Parts,
        whole: ModelConfig,
    ) -> None:
        norm = LayerNorm if config.layer_norm else RMSNorm
        size, eps, dtype = config.hidden_size, config.norm_eps, precision.dtype
        self.attn_norm, self.mlp_norm = norm(size, eps, dtype), norm(size, eps, dtype)
        self.attn = Attention(config, window, precision, f"{name}.attn", parts)
        self.mlp = (
            Experts(config, whole, precision.dtype, parts)
            if config.num_experts
            else MLP(config, precision, f"{name}.mlp", parts)
        )
        self.sandwich = config.sandwich_norms
        if self.sandwich:
            self.post_attn_norm, self.post_mlp_norm = (
                norm(size, eps, dtype),
                norm(size, eps, dtype),
            )

    def __call__(
        self,
        x: jax.Array,
        kv_pages: jax.Array | None,
        batch: Batch | None,
        at: Place,
        turn: Rotation | None,
        lora: Lora | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        post = (self.post_attn_norm, self.post_mlp_norm) if self.sandwich else (None, None)
        x, kv_pages = self.attn(x, kv_pages, batch, at, turn, self.attn_norm, post[0], lora)
        if isinstance(self.mlp, Experts):
            return self.mlp(x, at.live, self.mlp_norm, post[1]), kv_pages
        return self.mlp(x, at.live, self.mlp_norm, post[1], lora), kv_pages


class Decoder(nnx.Module):
    """Tokens and pages in, hidden states and pages out; the head is apart, for chosen rows.

    One of `parts`, where there are several: of `config`'s heads, columns and vocabulary its own.
    """

    def __init__(self, config: ModelConfig, precision: Precision, parts: Parts = WHOLE) -> None:
        size, dtype = config.hidden_size, precision.dtype
        own = parts.of(config)
        # A vocabulary that does not divide is whole on each.
        by_vocab = parts if own.vocab_size < config.vocab_size else WHOLE
        self.embed = Embedding(own.vocab_size, size, precision.of("embed"), by_vocab)
        if config.learned_positions:
            self.positions = Embedding(config.max_context, size, dtype)
        self.layers = nnx.List(
            [
                Layer(own, config.window(i), precision, f"layers.{i}", parts, config)
                for i in range(config.num_layers)
            ]
        )
        norm = LayerNorm if config.layer_norm else RMSNorm
        self.final_norm = norm(size, config.norm_eps, dtype)
        if not config.tied_head:
            self.head = Embedding(own.vocab_size, size, precision.of("head"), by_vocab)
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        tokens: jax.Array,
        kv_pages: list[jax.Array],
        batch: Batch,
        at: Place,
        adapters: Adapters | None = None,
        own: jax.Array | None = None,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """tokens [n] int32 -> hidden [n, hidden_size] in the model's dtype, normed for the head.
        With `adapters` each token uses its `own` columns; see adapters.py."""
        x, turns, written = self.embedded(tokens, at), rotations(self.config, at.positions), []
        for i, (layer, pages) in enumerate(zip(self.layers, kv_pages, strict=True)):
            graph, state = nnx.split(layer)
            turn = turns[self.config.window(i) > 0]
            lora = None if adapters is None or own is None else Lora(adapters[i], own)
            x, pages = _run_layer(graph, state, x, pages, batch, at, turn, lora)
            written.append(pages)
        return self.final_norm(x).astype(self.dtype), written

    def embedded(self, tokens: jax.Array, at: Place) -> jax.Array:
        x = self.embed(tokens) * self.config.embedding_scale
        return x + self.positions(at.positions) if self.config.learned_positions else x


def rotations(config: ModelConfig, positions: jax.Array) -> tuple[Rotation | None, Rotation | None]:
    """Of global layers, and of those with a window."""
    if config.learned_positions:
        return None, None
    whole = rope_frequencies(config.head_dim, config.rope_base, config.rope_scaling)
    turn = rotation(positions, whole)
    if config.local_rope_base is None:
        return turn, turn
    local = rope_frequencies(config.head_dim, config.local_rope_base, None)
    return turn, rotation(positions, local)


def _run(
    graph: nnx.GraphDef[Layer],
    state: State,
    x: jax.Array,
    kv_pages: jax.Array,
    batch: Batch,
    at: Place,
    turn: Rotation | None,
    lora: Lora | None,
) -> tuple[jax.Array, jax.Array]:
    x, written = nnx.merge(graph, state)(x, kv_pages, batch, at, turn, lora)
    assert written is not None, "pages came in"
    return x, written


# Layers of one kind are traced and lowered once, not once each: start-up counts.
_run_layer = jax.jit(_run, static_argnums=0)


def abstract(
    config: ModelConfig, precision: Precision, parts: Parts = WHOLE
) -> tuple[nnx.GraphDef[Decoder], State]:
    """The decoder's graph and its parameters as ShapeDtypeStructs; nothing is allocated. Of `parts`
    each has such ones. Raises ConfigError of a model with an encoder: that is seq2seq.py's."""
    if isinstance(config, Seq2SeqConfig):
        raise ConfigError(
            f"a {config.family} model has an encoder: it can be served, and not be trained, "
            "measured, planned, exported or drafted with"
        )
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, precision, parts)))
    return graph, state


def axes_of(variable: nnx.Variable[Any]) -> Axes:
    """By which axes a parameter is divided; see parts.py."""
    axes: Axes = variable.get_metadata("axes", ())
    return axes


def all_axes(state: State) -> list[Axes]:
    """In the order of the state's leaves."""
    variables = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return [axes_of(variable) for variable in variables]


def parameters(state: State) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter by its dotted name, as weight files are matched to it."""
    return {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(state)
    }


def fill(state: State, arrays: Mapping[str, jax.Array]) -> State:
    """The same state with its arrays; names as `parameters` gives them."""
    flat = [
        (path, variable.replace(arrays[".".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(flat)


def head_of(
    config: ModelConfig,
    state: State,
    read: Callable[[nnx.Variable[Any]], Any] = nnx.Variable.get_value,
) -> Matrix:
    """[vocab_size, hidden_size]; `layers.project` of hidden states with it gives logits."""
    embedding: Any = state["embed" if config.tied_head else "head"]
    scale = read(embedding["scale"]) if "scale" in embedding else None
    return Matrix(read(embedding["weight"]), scale)
