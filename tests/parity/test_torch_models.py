"""Tiny random torch models of every family, read, run and written back."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.interop import load_model, safetensors, save_model
from rkd_jax.models.api import positions_from_mask
from rkd_jax.models.decoder import Decoder

torch = pytest.importorskip("torch", reason="parity needs torch (CPU)")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

pytestmark = pytest.mark.parity

COLUMNS = 24
# Nothing here has its default value, so that no attribute can go unread unnoticed.
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama": ("Llama", {}),
    "llama_tied_multi_query": (
        "Llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "llama_full_heads_scaled_rope": (
        "Llama",
        {"num_key_value_heads": 4, "rope_scaling": LLAMA3},
    ),
    "mistral_window": ("Mistral", {"sliding_window": 5}),
    "mistral_no_window": ("Mistral", {"sliding_window": None, "hidden_act": "gelu"}),
    "qwen2": ("Qwen2", {"head_dim": None, "hidden_size": 64}),
    "qwen3_tied": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma": ("Gemma", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}


def _build(name: str):
    kind, changes = CASES[name]
    attributes = {k: v for k, v in (SHAPE | changes).items() if v is not None}
    if kind == "Mistral":
        attributes["sliding_window"] = changes["sliding_window"]
    config = getattr(transformers, f"{kind}Config")(**attributes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are trivial at first
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def rows():
    """Token ids and their mask; the rows start with 0, 3 and 11 columns of padding."""
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (3, COLUMNS))
    return tokens, np.arange(COLUMNS) >= np.array([[0], [3], [11]])


def _torch_logits(model, tokens, mask):
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        return model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(positions),
        ).logits.numpy()


@partial(jax.jit, static_argnums=0)
def _jitted_logits(decoder, params, tokens, mask):
    return decoder.logits(
        params,
        tokens,
        positions=positions_from_mask(mask),
        segment_ids=mask.astype(jnp.int32),
    )


def _our_logits(decoder, params, tokens, mask):
    tokens = jnp.asarray(tokens, jnp.int32)
    return np.asarray(_jitted_logits(decoder, params, tokens, jnp.asarray(mask)))


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request, tmp_path_factory):
    """A torch model and the folder it was saved to."""
    folder = tmp_path_factory.mktemp(request.param)
    model = _build(request.param)
    model.save_pretrained(folder)
    return model, folder


def test_logits_equal_torch(pair, rows):
    model, folder = pair
    tokens, mask = rows
    expected = _torch_logits(model, tokens, mask)
    decoder, params, tokenizer = load_model(folder)
    actual = _our_logits(decoder, params, tokens, mask)
    assert tokenizer is None
    assert np.abs(expected[mask]).max() > 1.0  # else 1e-4 would mean little
    np.testing.assert_allclose(actual[mask], expected[mask], atol=1e-4)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000], ids=["single", "sharded"])
def test_export_reloads_in_torch(pair, rows, tmp_path, max_shard_bytes):
    model, folder = pair
    config, params = safetensors.load(folder)
    family = model.config.model_type
    target = tmp_path / "export"
    save_model(target, config, params, family=family, max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert (len(files) > 2) == (max_shard_bytes == 20_000)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        target, output_loading_info=True
    )
    assert not any(report.values())
    assert type(again) is type(model)
    np.testing.assert_allclose(
        _torch_logits(again, *rows), _torch_logits(model, *rows), atol=1e-5
    )


def test_own_parameters_mean_the_same_in_torch(pair, rows, tmp_path):
    # Written by us first, so that no fault of reading can cancel one of writing.
    model, folder = pair
    tokens, mask = rows
    config, params = safetensors.load(folder)
    noise = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * noise.normal(size=leaf.shape), leaf.dtype),
        params,
    )
    save_model(tmp_path / "own", config, params, family=model.config.model_type)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    expected = _torch_logits(model, tokens, mask)
    actual = _our_logits(Decoder(config), params, tokens, mask)
    np.testing.assert_allclose(actual[mask], expected[mask], atol=1e-4)


def test_bfloat16_is_stored_and_read_exactly(tmp_path):
    model = _build("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    config, params = safetensors.load(tmp_path)
    assert config.param_dtype == "bfloat16"
    leaf = params["layers"]["mlp"]["down"]["kernel"]
    assert leaf.dtype == jnp.bfloat16
    expected = model.model.layers[2].mlp.down_proj.weight.detach().float().numpy().T
    np.testing.assert_array_equal(np.asarray(leaf[2].astype(jnp.float32)), expected)
