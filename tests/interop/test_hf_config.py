"""config.json <-> DecoderConfig: nothing is ignored silently."""

import dataclasses
import json

import pytest

from rkd_jax.interop.hf_config import (
    FAMILIES,
    IRRELEVANT,
    UnsupportedConfigError,
    family_of,
    from_hf,
    to_hf,
)
from rkd_jax.models.decoder import DecoderConfig
from rkd_jax.models.rope import RopeScaling

SMOLLM2 = {  # the file of SmolLM2-135M-Instruct
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
DECODER = DecoderConfig(
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
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BY_FAMILY = {
    "llama": dataclasses.replace(
        DECODER, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), tie_embeddings=False
    ),
    "mistral": dataclasses.replace(DECODER, sliding_window=4096, head_dim=96),
    "qwen2": dataclasses.replace(DECODER, attention_bias=True),
    "qwen3": dataclasses.replace(DECODER, qk_norm=True, activation="gelu"),
    "gemma": dataclasses.replace(
        DECODER, norm_offset=1.0, embed_scale=24.0, activation="gelu_tanh"
    ),
}


def _without(name):
    return {key: value for key, value in SMOLLM2.items() if key != name}


def test_smollm2():
    assert from_hf(SMOLLM2) == DECODER


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family):
    config = dataclasses.replace(
        BY_FAMILY[family], dtype="bfloat16", remat="full", attention="splash"
    )
    content = json.loads(json.dumps(to_hf(config, family=family, eos_token_id=7)))
    assert content["eos_token_id"] == 7
    assert content["architectures"] == [FAMILIES[family].architecture]
    back = from_hf(content, dtype="bfloat16")
    assert back == dataclasses.replace(config, remat="dots", attention="auto")
    assert family_of(config) == family


@pytest.mark.parametrize(("scaling", "theta"), [(None, 1e5), (LLAMA3, 5e5)])
def test_both_spellings_of_transformers(scaling, theta):
    four = SMOLLM2 | {"rope_theta": theta, "rope_scaling": scaling}
    parameters = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
    five = _without("rope_theta") | {"rope_parameters": parameters, "dtype": "float16"}
    del five["rope_scaling"], five["torch_dtype"]
    assert from_hf(five) == from_hf(four)
    expected = RopeScaling(8.0, 1.0, 4.0, 8192) if scaling else None
    assert (from_hf(four).rope_theta, from_hf(four).rope_scaling) == (theta, expected)


def test_older_scaling_spells_its_type_differently():
    scaling = {"type": "llama3"} | {k: v for k, v in LLAMA3.items() if k != "rope_type"}
    config = from_hf(SMOLLM2 | {"rope_scaling": scaling})
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_files_of_the_first_llama():
    old = _without("num_key_value_heads")
    del old["rope_theta"], old["tie_word_embeddings"]
    config = from_hf(old)
    assert (config.num_kv_heads, config.rope_theta) == (9, 1e4)
    assert not config.tie_embeddings


def test_gemma_prefers_hidden_activation():
    content = to_hf(BY_FAMILY["gemma"], family="gemma")
    content |= {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}
    assert from_hf(content).activation == "gelu_tanh"
    assert from_hf(content | {"hidden_activation": None}).activation == "gelu"


@pytest.mark.parametrize(("family", "width"), [("qwen3", 128), ("gemma", 256)])
def test_head_width_where_the_file_is_silent(family, width):
    content = to_hf(BY_FAMILY[family], family=family)
    del content["head_dim"]
    assert from_hf(content).head_dim == width


def test_an_unused_window_of_qwen2_is_not_applied():
    content = to_hf(BY_FAMILY["qwen2"], family="qwen2")
    content |= {"use_sliding_window": False, "sliding_window": 64}
    assert from_hf(content).sliding_window is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"architectures": ["LlamaModel"]}, r"architectures=\['LlamaModel'\]"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"sliding_window": 64}, "sliding_window=64"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\}"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"sliding_window_pattern": 2}, "sliding_window_pattern=2"),
        ({"vocab_size": "49152"}, "vocab_size='49152': expected a number"),
        ({"hidden_size": None}, "hidden_size=None: expected a number"),
        ({"num_attention_heads": 7, "head_dim": None}, "head_dim is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_scaling": LLAMA3 | {"mscale": 1.0}}, "rope_scaling.mscale=1.0"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor is missing"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta=100000"),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1e5}},
            "rope_parameters is given as well",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e5}}},
            "rope_parameters.full_attention",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused(change, message):
    with pytest.raises(UnsupportedConfigError, match=message):
        from_hf(SMOLLM2 | change)


@pytest.mark.parametrize("name", ["hidden_size", "rms_norm_eps", "model_type"])
def test_missing_attribute(name):
    with pytest.raises(UnsupportedConfigError, match=f"^{name} is missing"):
        from_hf(_without(name))


def test_mistral_must_state_its_window():
    content = to_hf(BY_FAMILY["mistral"], family="mistral")
    del content["sliding_window"]
    with pytest.raises(UnsupportedConfigError, match="sliding_window is missing"):
        from_hf(content)


@pytest.mark.parametrize(
    ("config", "family", "message"),
    [
        (BY_FAMILY["mistral"], "llama", "sliding_window=4096: llama models have None"),
        (BY_FAMILY["qwen2"], "llama", "attention_bias=True: llama models have False"),
        (BY_FAMILY["qwen3"], "qwen2", "attention_bias=False: qwen2 models have True"),
        (BY_FAMILY["gemma"], "llama", "norm_offset=1.0"),
        (dataclasses.replace(DECODER, logit_softcap=30.0), "gemma", "norm_offset=0.0"),
        (DECODER, "gpt2", "family='gpt2'"),
    ],
)
def test_a_family_that_cannot_express_a_field_is_refused(config, family, message):
    with pytest.raises(UnsupportedConfigError, match=message):
        to_hf(config, family=family)


def test_no_family_fits():
    config = dataclasses.replace(DECODER, logit_softcap=30.0)
    with pytest.raises(UnsupportedConfigError, match="no family fits: logit_softcap"):
        family_of(config)


def test_every_irrelevant_attribute_has_a_reason():
    assert all(len(reason) > 10 for reason in IRRELEVANT.values())
    assert from_hf(SMOLLM2 | dict.fromkeys(IRRELEVANT, "anything")) == DECODER


@pytest.mark.parametrize("family", FAMILIES)
def test_files_that_transformers_writes(family):
    transformers = pytest.importorskip("transformers")
    ours = BY_FAMILY[family]
    content = to_hf(ours, family=family)
    theirs = transformers.AutoConfig.for_model(**content)
    theirs.architectures = content["architectures"]
    assert from_hf(json.loads(theirs.to_json_string())) == ours
