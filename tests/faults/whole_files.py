"""One small whole file of every format, to be damaged."""

import json

import numpy as np

from rkd_jax.data.chat_template import CHATML
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.interop import names, save_model
from rkd_jax.models.config import DecoderConfig
from rkd_jax.signals import cache_identity as identity
from rkd_jax.signals.cache import (
    CachedRecord,
    CachedResponse,
    CacheSettings,
    Manifest,
)
from rkd_jax.signals.cache_codec import Topk
from rkd_jax.signals.cache_format import fingerprint, pack_record
from rkd_jax.signals.cache_shards import summary, write_shard
from tests.signals.tiny_cache import ROWS, TOKENIZER, demonstrations

CONFIG = DecoderConfig(
    vocab_size=258,
    hidden_size=4,
    intermediate_size=6,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    max_length=16,
    tie_embeddings=False,
)
GGUF_CONFIG = DecoderConfig(
    vocab_size=8,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=32,
    tie_embeddings=False,
)
CACHE_SETTINGS = CacheSettings(top_k=5, log_prob_dtype="float32", oracle="length")


def model_folder(folder, *, sharded=False):
    """A model of a few kilobytes, its tokenizer, and a template in two places."""
    noise = np.random.default_rng(0)
    size, params = names.sizes(CONFIG), {}
    for weight in names.weights(CONFIG):
        shape = names.shape_of(weight.axes, size)
        shape = (CONFIG.num_layers, *shape) if weight.stacked else shape
        *parents, last = weight.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = noise.normal(size=shape).astype(np.float32)
    most = 4000 if sharded else 10**9
    save_model(folder, CONFIG, params, tokenizer=byte_tokenizer(), max_shard_bytes=most)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "chat_template": [
            {"name": "tools", "template": "{{ tools }}"},
            {"name": "default", "template": CHATML},
        ],
    }
    path.write_text(json.dumps(config))
    return folder


def gguf_file(path):
    """A llama with a vocabulary, one matrix of it quantised."""
    import gguf

    writer, config = gguf.GGUFWriter(path, "llama"), GGUF_CONFIG
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "1", "ab", "<s>", "</s>", "x", "y"])
    writer.add_token_types([1, 1, 1, 1, 3, 3, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(5)
    writer.add_chat_template("{{ messages[0].content }}</s>")
    noise = np.random.default_rng(0)
    for name, stored in names.stored_tensors(config, "gguf").items():
        values = noise.normal(size=stored.shape).astype(np.float32)
        if name.endswith("ffn_up.weight"):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cache_payloads():
    """The bytes of seven records, as a teacher could have had them written."""
    noise, payloads = np.random.default_rng(0), []
    for number, record in enumerate(demonstrations()):
        row = tokenize_record(record, TOKENIZER, ROWS, number)
        (targets,) = row.responses
        digest, checks = fingerprint(row.prompt, row.teacher_prompt, targets)
        count = len(targets)
        ids = np.argsort(noise.random((count, TOKENIZER.vocab_size)))[:, :5]
        log_probs = np.log(noise.dirichlet(np.ones(6), size=count))
        topk = Topk(ids, log_probs[:, :5], log_probs[:, 5])
        response = CachedResponse(digest, count, {"reward": 0.5}, checks, topk)
        payloads.append(pack_record(CachedRecord((response,)), CACHE_SETTINGS))
    return payloads


def cache_folder(folder):
    """A finished cache of `demonstrations`: three shards of 3, 3 and 1 records."""
    folder.mkdir()
    records, payloads, shards = demonstrations(), cache_payloads(), []
    for first in range(0, len(records), 3):
        path = folder / f"shard-{first // 3:05d}.array_record"
        write_shard(path, payloads[first : first + 3])
        shards.append(summary(path, CACHE_SETTINGS, first=first))
    Manifest(
        teacher="0123456789abcdef",
        reference=None,
        tokenizer=identity.tokenizer_hash(TOKENIZER),
        rows=identity.rows_hash(TOKENIZER, ROWS),
        data=identity.data_hash(records),
        kind="DemonstrationRecord",
        records=len(records),
        shard_records=3,
        settings=CACHE_SETTINGS.to_json(),
        row_settings=identity.row_settings(ROWS),
        max_response=ROWS.max_response,
        shards=tuple(shards),
    ).save(folder)
    return folder
