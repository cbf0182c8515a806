"""A decoder in numpy, float64, without a cache: every token sees the whole sequence again."""

import numpy as np


def random_parameters(shapes, seed=0):
    """Canonical names -> float32 arrays, scaled so that activations keep their size."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in shapes.items():
        array = rng.standard_normal(shape) / np.sqrt(shape[-1])
        if "norm" in name and name.endswith("weight"):
            array = 1 + 0.3 * rng.standard_normal(shape)
        elif "embed" in name or "positions" in name:
            array = rng.standard_normal(shape)
        arrays[name] = array.astype(np.float32)
    return arrays


def logits(config, arrays, tokens):
    """[len(tokens), vocab_size] for a ModelConfig and its parameters by canonical name."""
    w = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    at = np.arange(len(tokens))
    x = w["embed.weight"][tokens] * config.embedding_scale
    if config.learned_positions:
        x = x + w["positions.weight"][at]
    for layer in range(config.num_layers):
        p = f"layers.{layer}."
        y = attention(config, w, p + "attn.", norm(config, w, p + "attn_norm", x), at, layer)
        x = x + (norm(config, w, p + "post_attn_norm", y) if config.sandwich_norms else y)
        y = mlp(config, w, p + "mlp.", norm(config, w, p + "mlp_norm", x))
        x = x + (norm(config, w, p + "post_mlp_norm", y) if config.sandwich_norms else y)
    head = w["embed.weight"] if config.tied_head else w["head.weight"]
    return norm(config, w, "final_norm", x) @ head.T


def norm(config, w, name, x, layer=None):
    if config.layer_norm and layer is None:
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)
    return x * w[name + ".weight"] + w.get(name + ".bias", 0)


def linear(w, name, x):
    return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)


def attention(config, w, p, x, at, layer):
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    qkv = linear(w, p + "qkv", x).reshape(len(x), heads + 2 * kv_heads, dim)
    q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
    if config.qk_norm:
        q, k = norm(config, w, p + "q_norm", q, 0), norm(config, w, p + "k_norm", k, 0)
    window = config.window(layer)
    if not config.learned_positions:
        local = window and config.local_rope_base is not None
        frequencies = rope(config, config.local_rope_base if local else config.rope_base, local)
        q, k = turned(q, at, frequencies), turned(k, at, frequencies)
    k, v = np.repeat(k, heads // kv_heads, 1), np.repeat(v, heads // kv_heads, 1)
    scale = config.attention_scale or dim**-0.5
    scores = np.einsum("thd,shd->hts", q, k) * scale
    seen = at[None] <= at[:, None]
    if window:
        seen &= at[None] > at[:, None] - window
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return linear(w, p + "out", np.einsum("hts,shd->thd", weights, v).reshape(len(x), -1))


def rope(config, base, local):
    f = base ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if local or scaling is None:
        return f
    if scaling.kind == "linear":
        return f / scaling.factor
    out = []
    for value in f:
        wavelength = 2 * np.pi / value
        if wavelength < scaling.original_context / scaling.high:
            out.append(value)
        elif wavelength > scaling.original_context / scaling.low:
            out.append(value / scaling.factor)
        else:
            smooth = (scaling.original_context / wavelength - scaling.low) / (
                scaling.high - scaling.low
            )
            out.append((1 - smooth) * value / scaling.factor + smooth * value)
    return np.array(out)


def turned(x, at, frequencies):
    pairs = x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]
    pairs = pairs * np.exp(1j * at[:, None] * frequencies)[:, None]
    return np.concatenate([pairs.real, pairs.imag], -1)


def mlp(config, w, p, x):
    def activate(x):
        if config.activation == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    if config.num_experts:
        return np.stack([experts(config, w, p, row, activate) for row in x])
    if not config.gated_mlp:
        return linear(w, p + "down", activate(linear(w, p + "up", x)))
    gate, up = np.split(linear(w, p + "gate_up", x), 2, -1)
    return linear(w, p + "down", activate(gate) * up)


def experts(config, w, p, x, activate):
    """Of one row, one expert after the other."""
    scores = w[p + "router.weight"] @ x
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    chosen = np.argsort(-shares, kind="stable")[: config.experts_per_token]
    total = shares[chosen].sum() if config.norm_topk else 1.0
    out = np.zeros_like(x)
    for e in chosen:
        inner = activate(x @ w[p + "gate.weight"][e]) * (x @ w[p + "up.weight"][e])
        out += shares[e] / total * (inner @ w[p + "down.weight"][e])
    return out
