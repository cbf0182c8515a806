"""T5 as a Hugging Face folder of random weights, and plainly in numpy, float64, by stored names.

The oracle reads the stored tensors, so what it agrees with is a loader as well as a model.
"""

import io
import json
import math
import random

import numpy as np
import sentencepiece
from safetensors.numpy import save_file

VOCAB, PIECES, EXTRA = 64, 50, 4
SIZES = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-6,
    "vocab_size": VOCAB,
    "n_positions": 24,
}
KINDS = {
    "t5": {"feed_forward_proj": "relu"},  # tied, which a config.json need not say
    "flan-t5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "resaved": {  # the same, by Transformers 5
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": True,
        "scale_decoder_outputs": False,
    },
}


def config_of(kind):
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    known = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    return {**known, **SIZES, **special, **KINDS[kind], "is_encoder_decoder": True}


def is_scaled(config):
    return config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))


def tensors_of(config, seed=0):
    """By Hugging Face's names, scaled so that attention is neither flat nor one-hot."""
    rng = np.random.default_rng(seed)
    size, inner, ff = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    gated = config["feed_forward_proj"].startswith("gated")
    shapes = {"shared": (config["vocab_size"], size)}
    if not is_scaled(config):
        shapes["lm_head"] = (config["vocab_size"], size)

    def attention(name):
        shapes.update({f"{name}.{part}": (inner, size) for part in "qkv"})
        shapes[f"{name}.o"] = (size, inner)

    for stack, layers in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        shapes[bias] = (config["relative_attention_num_buckets"], config["num_heads"])
        shapes[f"{stack}.final_layer_norm"] = (size,)
        kinds = ["SelfAttention", *(["EncDecAttention"] if stack == "decoder" else [])]
        for i in range(config[layers]):
            block = f"{stack}.block.{i}.layer"
            for number, kind in enumerate(kinds):
                attention(f"{block}.{number}.{kind}")
                shapes[f"{block}.{number}.layer_norm"] = (size,)
            shapes[f"{block}.{len(kinds)}.layer_norm"] = (size,)
            dense = f"{block}.{len(kinds)}.DenseReluDense"
            for part in ("wi_0", "wi_1") if gated else ("wi",):
                shapes[f"{dense}.{part}"] = (ff, size)
            shapes[f"{dense}.wo"] = (size, ff)

    def made(name, shape):
        if name.endswith("norm"):
            return 1 + 0.3 * rng.standard_normal(shape)
        if name == "shared" and "lm_head" not in shapes:
            return 0.1 * rng.standard_normal(shape)  # or the last token would come again and again
        if "bias" in name or name in ("shared", "lm_head"):
            return rng.standard_normal(shape)
        scale = 0.5 if name[-2:] in (".q", ".k") else 1.0
        return scale * rng.standard_normal(shape) / np.sqrt(shape[-1])

    arrays = {name: made(name, shape) for name, shape in shapes.items()}
    return {f"{name}.weight": array.astype(np.float32) for name, array in arrays.items()}


def words(seed=3):
    """A corpus of few letters, so that so few pieces spell all of it."""
    rng = random.Random(seed)
    syllables = ["na", "to", "ri", "se", "lu", "mo", "ti", "ra"]
    return [
        " ".join("".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(8))
        for _ in range(200)
    ]


def vocabulary():
    """spiece.model: Unigram, pad 0, end 1, unknown 2, no beginning."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words()),
        model_writer=out,
        model_type="unigram",
        vocab_size=PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return out.getvalue()


def write_folder(folder, kind, seed=0, **changes):
    """-> config, tensors."""
    config = config_of(kind) | changes
    tensors = tensors_of(config, seed)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "spiece.model").write_bytes(vocabulary())
    named = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": EXTRA}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    # The checkpoints of old have copies that nothing reads.
    copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder",)}
    save_file(tensors | copies, folder / "model.safetensors")
    return config, tensors


class Oracle:
    """Everything again for each token, and nothing kept."""

    def __init__(self, config, tensors):
        self.config = config
        self.w = {name: array.astype(np.float64) for name, array in tensors.items()}

    def logits(self, source, target):
        """[len(target), vocab_size]; `target` with the token it begins behind."""
        x = self._stack("encoder", self.w["shared.weight"][source], None)
        y = self._stack("decoder", self.w["shared.weight"][target], x)
        if is_scaled(self.config):
            return y * self.config["d_model"] ** -0.5 @ self.w["shared.weight"].T
        return y @ self.w["lm_head.weight"].T

    def greedy(self, source, count):
        """`count` tokens, or as many as come up to the end and with it; their log-probabilities."""
        target, found = [self.config["decoder_start_token_id"]], []
        while len(found) < count and target[-1] != self.config["eos_token_id"]:
            last = self.logits(source, target)[-1]
            target.append(int(last.argmax()))
            found.append(last.max() - np.log(np.exp(last).sum()))
        return target[1:], found

    def _stack(self, stack, x, encoded):
        bias = self._bias(stack, len(x))
        count = self.config["num_layers" if stack == "encoder" else "num_decoder_layers"]
        for i in range(count):
            block = f"{stack}.block.{i}.layer"
            y = self._norm(f"{block}.0.layer_norm", x)
            x = x + self._attend(f"{block}.0.SelfAttention", y, y, bias)
            if encoded is not None:
                y = self._norm(f"{block}.1.layer_norm", x)
                x = x + self._attend(f"{block}.1.EncDecAttention", y, encoded, 0)
            last = 1 if encoded is None else 2
            y = self._norm(f"{block}.{last}.layer_norm", x)
            x = x + self._dense(f"{block}.{last}.DenseReluDense", y)
        return self._norm(f"{stack}.final_layer_norm", x)

    def _linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T

    def _norm(self, name, x):
        eps = self.config["layer_norm_epsilon"]
        return self.w[f"{name}.weight"] * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)

    def _attend(self, name, x, over, bias):
        heads = self.config["num_heads"]
        q = self._linear(f"{name}.q", x).reshape(len(x), heads, -1)
        k, v = (self._linear(f"{name}.{p}", over).reshape(len(over), heads, -1) for p in "kv")
        scores = np.einsum("qhd,khd->hqk", q, k) + bias
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self._linear(f"{name}.o", np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1))

    def _dense(self, name, x):
        if self.config["feed_forward_proj"] == "relu":
            return self._linear(f"{name}.wo", np.maximum(self._linear(f"{name}.wi", x), 0))
        left = self._linear(f"{name}.wi_0", x)
        left = 0.5 * left * (1 + np.tanh(math.sqrt(2 / math.pi) * (left + 0.044715 * left**3)))
        return self._linear(f"{name}.wo", left * self._linear(f"{name}.wi_1", x))

    def _bias(self, stack, count):
        """[num_heads, count, count]; what a decoder does not see is minus infinity."""
        table = self.w[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        bias = np.full((table.shape[1], count, count), -np.inf)
        for query in range(count):
            for key in range(count if stack == "encoder" else query + 1):
                bias[:, query, key] = table[self._bucket(key - query, stack == "encoder")]
        return bias

    def _bucket(self, ahead, both_ways):
        buckets, first = self.config["relative_attention_num_buckets"], 0
        if both_ways:
            buckets //= 2
            first = buckets if ahead > 0 else 0
        distance, exact = abs(ahead), buckets // 2
        if distance < exact:
            return first + distance
        farthest = self.config["relative_attention_max_distance"]
        beyond = math.log(distance / exact) / math.log(farthest / exact) * (buckets - exact)
        return first + min(exact + int(beyond + 1e-9), buckets - 1)
