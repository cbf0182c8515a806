"""Random rows of an attention case in shuffled pages, with garbage wherever no row writes, and what
must come of them, token by token in float64."""

import jax.numpy as jnp
import numpy as np


def build(case, dtype, seed=0, lanes=1):
    """q, pages, kv_lens, page table, cu_q_lens, distribution."""
    rng = np.random.default_rng(seed)
    layout = case.layout(lanes)
    order = rng.permutation(layout.num_pages)
    kv_dtype = jnp.dtype(case.kv_dtype or dtype)
    garbage = 127 if kv_dtype == jnp.int8 else np.nan
    kv = np.full(layout.shape, garbage, np.float32)
    width = max(-(-total // case.page_size) for _, total in case.rows) + 2
    rows = len(case.rows) + 2  # two rows nobody uses
    table = np.full((rows, width), layout.num_pages - 1, np.int32)
    kv_lens, cu_q_lens, at = np.zeros(rows, np.int32), np.zeros(rows + 1, np.int32), 0
    for row, (new, total) in enumerate(case.rows):
        count = -(-total // case.page_size)
        table[row, :count] = order[at : at + count]
        at += count
        for position in range(total):
            page, offset = divmod(position, case.page_size)
            made = rng.standard_normal((case.num_kv_heads, 2 * case.head_dim))
            made = made * 40 if kv_dtype == jnp.int8 else made
            kv[table[row, page], :, offset, : 2 * case.head_dim] = made
        kv_lens[row], cu_q_lens[row + 1] = total, cu_q_lens[row] + new
    cu_q_lens[len(case.rows) + 1 :] = cu_q_lens[len(case.rows)]
    tokens = 1 << int(cu_q_lens[-1] - 1).bit_length()
    q = rng.standard_normal((tokens, case.num_heads, case.head_dim))
    ones = sum(new == 1 for new, _ in case.rows)
    arrays = (kv_lens, table, cu_q_lens, np.array([ones, len(case.rows)], np.int32))
    if kv_dtype == jnp.int8:
        kv = np.clip(np.round(kv), -127, 127)
    return jnp.asarray(q, dtype), jnp.asarray(kv, kv_dtype), *map(jnp.asarray, arrays)


def options(case, seed=0):
    """What else ragged_paged_attention is told of `case`."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.5, 2.0, (2, case.num_kv_heads))
    if case.kv_dtype == "int8":
        scales /= 40
    return {
        "scale": case.head_dim**-0.5,
        "window": case.window,
        "soft_cap": case.soft_cap,
        "sinks": jnp.asarray(rng.standard_normal(case.num_heads), jnp.float32)
        if case.sinks
        else None,
        "kv_scales": jnp.asarray(scales, jnp.float32) if case.kv_dtype else None,
    }


def oracle(q, kv, kv_lens, table, cu_q_lens, distribution, *, scale, window, soft_cap=0.0, **given):
    """Token by token in float64: what is mixed, and the logarithm of the sum of exponentials."""
    q, kv = np.asarray(q, np.float64), np.asarray(kv, np.float64)
    out, lse, page_size, dim = np.zeros(q.shape), np.zeros(q.shape[:2]), kv.shape[2], q.shape[2]
    sinks, scales = given.get("sinks"), given.get("kv_scales")
    scales = np.ones((2, kv.shape[1])) if scales is None else np.asarray(scales, np.float64)
    for row in range(int(distribution[1])):
        new, total = int(cu_q_lens[row + 1] - cu_q_lens[row]), int(kv_lens[row])
        places = [divmod(position, page_size) for position in range(total)]
        whole = np.stack([kv[table[row, page], :, offset] for page, offset in places])
        for i in range(new):
            at, token = total - new + i, int(cu_q_lens[row]) + i
            past = whole[max(0, at - window + 1) if window else 0 : at + 1]
            for head in range(q.shape[1]):
                of = head * kv.shape[1] // q.shape[1]
                keys, values = past[:, of, :dim] * scales[0, of], past[:, of, dim : 2 * dim]
                scores = keys @ q[token, head] * scale
                if soft_cap:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                sink = -np.inf if sinks is None else float(sinks[head])
                most = max(scores.max(), sink)
                weights = np.exp(scores - most)
                every = weights.sum() + np.exp(sink - most)
                out[token, head] = weights @ values * scales[1, of] / every
                lse[token, head] = most + np.log(every)
    return out, lse
