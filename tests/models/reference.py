"""The decoder again: float64 numpy, loops over layers, heads and rows, no cache."""

import math

import jax
import numpy as np

from rkd_jax.models.decoder import Decoder, DecoderConfig, RopeScaling

LLAMA = DecoderConfig(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=20,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    max_length=64,
)
QWEN = DecoderConfig(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_length=64,
    rope_theta=1e6,
    norm_eps=1e-6,
    tie_embeddings=False,
    attention_bias=True,
    qk_norm=True,
    sliding_window=4,
)
GEMMA = DecoderConfig(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
    max_length=64,
    rope_theta=100.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
    norm_offset=1.0,
    activation="gelu_tanh",
    embed_scale=4.0,
    logit_softcap=2.0,
)


def random_params(config, seed=0):
    """Random float32 parameters with no idle norm or bias."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = generator.normal(size=leaf.shape)
        is_norm = path[-1].key == "scale"
        value = 1.0 - config.norm_offset + 0.3 * noise if is_norm else 0.3 * noise
        return value.astype(np.float32)

    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def logits(config, params, tokens, positions, segment_ids):
    """float64[B, L, V]."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    head = params["embed"]["embedding"].T
    if not config.tie_embeddings:
        head = params["head"]["kernel"]
    rows = []
    for row, position, segment in zip(tokens, positions, segment_ids, strict=True):
        x = params["embed"]["embedding"][row] * config.embed_scale
        for i in range(config.num_layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
            x = block(config, layer, x, position, segment)
        out = rms_norm(config, params["final_norm"]["scale"], x) @ head
        if config.logit_softcap:
            out = config.logit_softcap * np.tanh(out / config.logit_softcap)
        rows.append(out)
    return np.stack(rows)


def block(config, layer, x, positions, segments):
    """One layer on one row, [L, D] -> [L, D]."""
    attention, mlp = layer["attention"], layer["mlp"]
    h = rms_norm(config, layer["attention_norm"]["scale"], x)
    update = np.zeros_like(x)
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_kv_heads)
        q = project(attention["query"], h, head)
        k = project(attention["key"], h, shared)
        v = project(attention["value"], h, shared)
        if config.qk_norm:
            q = rms_norm(config, attention["query_norm"]["scale"], q)
            k = rms_norm(config, attention["key_norm"]["scale"], k)
        q, k = rope(config, q, positions), rope(config, k, positions)
        mixed = np.zeros_like(v)
        for i in range(len(x)):
            seen = visible(config, segments, i)
            if seen:
                scores = k[seen] @ q[i] / math.sqrt(config.head_dim)
                weights = np.exp(scores - scores.max())
                mixed[i] = weights / weights.sum() @ v[seen]
        update += mixed @ attention["output"]["kernel"][head]
    x = x + update
    h = rms_norm(config, layer["mlp_norm"]["scale"], x)
    gate = activation(config, h @ mlp["gate"]["kernel"])
    return x + (gate * (h @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]


def visible(config, segments, i):
    """Columns that column i attends to."""
    first = 0 if config.sliding_window is None else i - config.sliding_window + 1
    return [j for j in range(max(first, 0), i + 1) if segments[j] == segments[i] != 0]


def project(part, h, head):
    out = h @ part["kernel"][:, head]
    return out + part["bias"][head] if "bias" in part else out


def rms_norm(config, scale, x):
    power = (x**2).mean(-1, keepdims=True) + config.norm_eps
    return x / np.sqrt(power) * (scale + config.norm_offset)


def activation(config, x):
    if config.activation == "silu":
        return x / (1 + np.exp(-x))
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(inner))


def frequencies(config):
    """The published branches of Llama-3 scaling, one frequency at a time."""
    result = []
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        scaling = config.rope_scaling
        if scaling is not None:
            wavelength = 2 * math.pi / frequency
            original = scaling.original_max_length
            if wavelength > original / scaling.low_freq_factor:
                frequency /= scaling.factor
            elif wavelength >= original / scaling.high_freq_factor:
                smooth = (original / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency *= (1 - smooth) / scaling.factor + smooth
        result.append(frequency)
    return np.array(result)


def rope(config, x, positions):
    """Pair (i, i + head_dim / 2) as a complex number, multiplied by a phase."""
    half = config.head_dim // 2
    phase = np.exp(1j * np.outer(positions, frequencies(config)))
    turned = (x[:, :half] + 1j * x[:, half:]) * phase
    return np.concatenate([turned.real, turned.imag], axis=1)
