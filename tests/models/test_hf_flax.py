"""HF Flax models against their torch originals, with tiny random weights."""

import json
import os
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.models import hf_flax
from rkd_jax.models.api import CausalLM, positions_from_mask
from rkd_jax.models.hf_flax import HFFlaxLM, load_hf_flax
from rkd_jax.models.hf_flax_files import read_weights
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.types import Prompts

torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "FlaxGPT2Model"):
    pytest.skip("transformers >= 5 has no Flax classes", allow_module_level=True)
safetensors = pytest.importorskip("safetensors.numpy")

V = 29
_LLAMA = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_GPT = {"vocab_size": V, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 32}
CONFIGS = {
    "gpt2": ("GPT2Config", {**_GPT, "n_layer": 2}),
    "llama": ("LlamaConfig", {**_LLAMA, "num_hidden_layers": 2}),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": None}),
    "gemma": ("GemmaConfig", {**_LLAMA, "head_dim": 8}),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": V,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 8,
        },
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": V,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 32,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 3,
        },
    ),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 2}),
    "bloom": (
        "BloomConfig",
        {"vocab_size": V, "hidden_size": 16, "n_layer": 1, "n_head": 4},
    ),
    # The faults that are repaired: tied heads, a context (14) below twice the head
    # width (8), windows of 3 keys and of 1.
    "llama tied, short": (
        "LlamaConfig",
        {
            **_LLAMA,
            "num_attention_heads": 2,
            "max_position_embeddings": 14,
            "tie_word_embeddings": True,
        },
    ),
    "mistral tied, window 3": (
        "MistralConfig",
        {**_LLAMA, "sliding_window": 3, "tie_word_embeddings": True},
    ),
    "mistral window 1": ("MistralConfig", {**_LLAMA, "sliding_window": 1}),
}

TOKENS = np.random.default_rng(0).integers(0, V, (3, 12))
LEFT = np.arange(12) >= np.array([[0], [4], [7]])  # True on real tokens
RIGHT = LEFT[:, ::-1].copy()


def _config(name, **changes):
    kind, fields = CONFIGS[name]
    return getattr(transformers, kind)(**(fields | changes))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name -> (torch model, folder, our model, our parameters), each built once."""
    built = {}

    def build(name):
        if name not in built:
            config = _config(name)
            config._attn_implementation = "eager"
            generator = torch.Generator().manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            for leaf in model.parameters():
                noise = 0.3 * torch.randn(leaf.shape, generator=generator)
                # Gemma's norms multiply by 1 + weight, the others by weight.
                leaf.data = noise + (leaf.ndim == 1 and name != "gemma")
            model.tie_weights()
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder)
            built[name] = (model, folder, *load_hf_flax(folder))
        return built[name]

    return build


def _torch_logits(model, mask):
    """Logits of the torch class, positions counted from the mask."""
    inputs = {"attention_mask": torch.tensor(mask.astype(int))}
    if model.config.model_type != "bloom":
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        inputs["position_ids"] = torch.tensor(positions)
    with torch.no_grad():
        return model(torch.tensor(TOKENS), **inputs).logits.numpy()


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_torch_under_either_padding(pairs, name):
    original, _, model, params = pairs(name)
    for mask in (LEFT, RIGHT):
        garbage = jnp.asarray(np.where(mask, TOKENS, V + 9), jnp.int32)
        logits = model.logits(params, garbage, segment_ids=jnp.asarray(mask, jnp.int32))
        assert logits.dtype == jnp.float32
        assert np.isfinite(logits).all()
        np.testing.assert_allclose(
            np.asarray(logits)[mask], _torch_logits(original, mask)[mask], atol=1e-4
        )


@pytest.mark.parity
@pytest.mark.parametrize("slots", [14, 8], ids=["from the start", "grown"])
@pytest.mark.parametrize("name", ["gpt2", "mistral tied, window 3", "gpt_neo", "bloom"])
def test_cached_halves_equal_one_forward(pairs, name, slots):
    _, _, model, params = pairs(name)
    tokens, mask = jnp.asarray(TOKENS, jnp.int32), jnp.asarray(LEFT, jnp.int32)
    whole = model.hidden(params, tokens, segment_ids=mask)
    cache = model.init_cache(params, 3, slots)
    halves = []
    for part in (slice(0, 8), slice(8, 12)):
        if part.start:
            cache = model.grow_cache(cache, 14)
        states, cache = model.hidden(
            params, tokens[:, part], segment_ids=mask[:, part], cache=cache
        )
        halves.append(states)
    assert int(cache.index) == 12
    np.testing.assert_allclose(
        np.concatenate(halves, axis=1)[LEFT], np.asarray(whole)[LEFT], atol=1e-5
    )


def _flax_class(original):
    """The Flax causal LM for a torch model, without parameters."""
    kind = getattr(transformers, f"Flax{type(original).__name__}")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return kind(original.config, _do_init=False)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["gpt2", "gptj"])  # a tied head, a head with bias
def test_hidden_times_head_is_the_logits_of_the_flax_class(pairs, name):
    original, _, model, params = pairs(name)
    assert isinstance(model, CausalLM)
    tokens = jnp.asarray(TOKENS, jnp.int32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        module = _flax_class(original).module
        positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
        theirs = jax.jit(module.apply)(
            {"params": params}, tokens, jnp.ones_like(tokens), positions
        ).logits
    hidden = model.hidden(params, jnp.asarray(TOKENS, jnp.int32))
    bias = model.head_bias(params)
    ours = np.asarray(hidden) @ np.asarray(model.head(params))
    ours = ours + (0.0 if bias is None else np.asarray(bias))
    assert (bias is None) == (name == "gpt2")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parity
def test_greedy_samples_equal_torch_generate(pairs):
    original, _, model, params = pairs("gpt2")
    prompts, mask = TOKENS[:, -6:], LEFT[:, -6:]
    with torch.no_grad():
        expected = original.generate(
            torch.tensor(np.where(mask, prompts, 0)),
            attention_mask=torch.tensor(mask.astype(int)),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )[:, 6:]
    sample = make_sampler(
        model, SamplingConfig(5, temperature=0.0, samples_per_prompt=2)
    )
    found = sample(
        params,
        Prompts(jnp.asarray(prompts, jnp.int32), jnp.asarray(mask)),
        jax.random.key(0),
    ).sequences.targets
    np.testing.assert_array_equal(found[:, 0], expected)
    np.testing.assert_array_equal(found[:, 1], expected)


@pytest.mark.parity
def test_gradient_equals_torch(pairs):
    original, _, model, params = pairs("opt")
    mask = torch.tensor(RIGHT.astype(int))
    log_probs = original(torch.tensor(TOKENS), attention_mask=mask).logits
    torch.log_softmax(log_probs, -1)[..., 3][mask.bool()].sum().backward()
    expected = original.model.decoder.layers[0].fc1.weight.grad.numpy().T

    @jax.jit
    @jax.grad
    def gradient(params):
        segments = jnp.asarray(RIGHT, jnp.int32)
        tokens = jnp.asarray(TOKENS, jnp.int32)
        logits = model.logits(params, tokens, segment_ids=segments)
        return jnp.sum(jax.nn.log_softmax(logits)[..., 3], where=segments == 1)

    found = gradient(params)["model"]["decoder"]["layers"]["0"]["fc1"]["kernel"]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_dtypes_of_parameters_states_and_logits(pairs):
    _, folder, *_ = pairs("llama")
    model, params = load_hf_flax(folder, dtype="bfloat16", param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    hidden = model.hidden(params, jnp.ones((1, 3), jnp.int32))
    assert hidden.dtype == jnp.bfloat16
    assert model.unembed(params, hidden).dtype == jnp.float32


def test_positions_default_to_the_count_of_real_tokens(pairs):
    _, _, model, params = pairs("gpt2")
    tokens, mask = jnp.asarray(TOKENS, jnp.int32), jnp.asarray(LEFT)
    segments = mask.astype(jnp.int32)
    counted = positions_from_mask(mask)
    np.testing.assert_array_equal(
        model.hidden(params, tokens, segment_ids=segments),
        model.hidden(params, tokens, segment_ids=segments, positions=counted),
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"rope_theta": 1e6}, r"rope_theta=1000000.0.*rkd_jax\.interop"),
        ("mistral", {"rope_theta": 1e6}, r"rope_theta=1000000.0.*rkd_jax\.interop"),
        ("gemma", {"rope_theta": 1e6}, r"rope_theta=1000000.0.*rkd_jax\.interop"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            r"rope_scaling.*rkd_jax\.interop",
        ),
        ("llama", {"head_dim": 8}, "head_dim=8"),
        ("mistral", {"head_dim": 8}, "head_dim=8"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("gemma", {"hidden_act": "gelu"}, "disagree"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scales attention"),
        ("gpt2", {"scale_attn_weights": False}, "scales attention"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("opt", {"enable_bias": False}, "enable_bias"),
        ("gptj", {"rotary_dim": None}, "rotary_dim"),
        ("bloom", {"n_head": 6, "hidden_size": 24}, "power of two"),
    ],
)
def test_t15_configs_that_flax_would_get_wrong_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        HFFlaxLM(_config(name, **changes))


def test_unknown_families_and_contexts_are_refused():
    with pytest.raises(ValueError, match="model_type 'qwen2'"):
        HFFlaxLM(transformers.Qwen2Config())
    with pytest.raises(
        ValueError, match="max_length 33 exceeds the model's context 32"
    ):
        HFFlaxLM(_config("llama"), max_length=33)
    model = HFFlaxLM(_config("llama"), max_length=8)
    with pytest.raises(ValueError, match="9 columns exceed the context of 8"):
        model.hidden({}, jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(ValueError, match="9 columns exceed the context of 8"):
        model.init_cache(None, 1, 9)
    assert HFFlaxLM(_config("bloom")).config.max_length == 2048


def test_packed_rows_are_refused(pairs):
    _, _, model, params = pairs("gpt2")
    packed = jnp.array([[0, 1, 1, 1], [1, 1, 2, 2]])
    with pytest.raises(ValueError, match="row 1 packs several segments"):
        model.hidden(params, jnp.zeros((2, 4), jnp.int32), segment_ids=packed)


def test_missing_flax_classes_say_what_to_install(monkeypatch):
    config = _config("llama")
    five = types.SimpleNamespace(__version__="5.1.0")
    monkeypatch.setattr(hf_flax, "_transformers", lambda: five)
    with pytest.raises(ImportError, match=r"5\.1\.0 has no FlaxLlama.*>=4\.57,<5"):
        HFFlaxLM(config)


def test_missing_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="not installed.*pip install"):
        load_hf_flax("anything")


def _copy(folder, target, change=lambda tensors: tensors):
    """The folder again, with ``change`` applied to its tensors."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = safetensors.load_file(folder / "model.safetensors")
    path = target / "model.safetensors"
    safetensors.save_file(change(dict(tensors)), path, metadata={"format": "pt"})
    return target


def _same(expected, found):
    jax.tree.map(np.testing.assert_array_equal, expected, found)


def test_all_ways_to_store_weights_give_the_same_parameters(pairs, tmp_path):
    original, folder, model, params = pairs("gpt2")
    _flax_class(original).save_pretrained(tmp_path / "msgpack", params=params)
    assert (tmp_path / "msgpack/flax_model.msgpack").is_file()
    original.save_pretrained(tmp_path / "shards", max_shard_size="6KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    original.transformer.save_pretrained(tmp_path / "base")  # names without a prefix
    mask = np.ones((1, 1, 32, 32), bool)  # old files carry constants and the tied head
    _copy(
        folder,
        tmp_path / "old",
        lambda tensors: (
            tensors
            | {"transformer.h.0.attn.bias": mask}
            | {"lm_head.weight": tensors["transformer.wte.weight"]}
        ),
    )
    for kind in ("msgpack", "shards", "base", "old"):
        _same(params, load_hf_flax(tmp_path / kind)[1])
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(model.init, jax.random.key(0))
    )


def _without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: _without(t, "transformer.h.1.mlp.c_fc.weight"),
            r"transformer/h/1/mlp/c_fc/kernel is missing \(1 in all\)",
        ),
        (
            lambda t: t | {"transformer.ln_f.weight": np.ones(8, np.float32)},
            r"transformer\.ln_f\.weight.* shape",
        ),
        (
            lambda t: t | {"transformer.h.2.ln_1.bias": np.ones(16, np.float32)},
            "transformer/h/2/ln_1/bias has no place",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(pairs, tmp_path, change, message):
    _, folder, *_ = pairs("gpt2")
    with pytest.raises(ValueError, match=message):
        load_hf_flax(_copy(folder, tmp_path / "bad", change))


def test_an_untied_head_must_be_there(pairs, tmp_path):
    _, folder, *_ = pairs("llama")
    bad = _copy(folder, tmp_path / "bad", lambda t: _without(t, "lm_head.weight"))
    with pytest.raises(ValueError, match="lm_head/kernel is missing"):
        load_hf_flax(bad)


def test_misshapen_msgpack_is_named(pairs, tmp_path):
    original, _, _, params = pairs("gpt2")
    _flax_class(original).save_pretrained(tmp_path, params=params)
    config = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 30}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"wte/embedding has shape \(29, 16\)"):
        load_hf_flax(tmp_path)


def test_folders_without_config_or_weights_are_named(pairs, tmp_path):
    original, *_ = pairs("gpt2")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_hf_flax(tmp_path)
    original.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin cannot be read"):
        load_hf_flax(tmp_path)


def test_r37_loading_and_running_needs_no_torch(pairs):
    original, folder, *_ = pairs("gpt2")
    program = textwrap.dedent(
        f"""
        import sys
        import jax.numpy as jnp
        from rkd_jax.models.hf_flax import load_hf_flax
        model, params = load_hf_flax({str(folder)!r})
        logits = model.logits(params, jnp.array({TOKENS[:1].tolist()}))
        assert "torch" not in sys.modules
        print(float(logits[0, -1, 5]))
        """
    )
    environment = os.environ | {"USE_TORCH": "0", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = _torch_logits(original, np.ones_like(LEFT))[0, -1, 5]
    np.testing.assert_allclose(float(done.stdout), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "../secret.msgpack"}, "'../secret.msgpack' is not a file name"),
        ({"a": 3}, "3 is not a file name"),
        ([], "not an index of weights"),
    ],
)
def test_an_index_lists_files_beside_it(tmp_path, table, message):
    index = tmp_path / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ValueError, match=f"{index.name}: {message}"):
        read_weights(str(tmp_path), "model", {})
