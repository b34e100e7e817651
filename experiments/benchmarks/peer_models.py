"""Students and teachers of the benchmarks' shapes as other libraries build them."""

from __future__ import annotations


def tunix_llama(model):
    """Tunix's Llama 3 of a decoder's shape."""
    from flax import nnx
    from tunix.models.llama3 import model as llama3

    config = model.config
    return llama3.Llama3(
        llama3.ModelConfig(
            num_layers=config.num_layers,
            vocab_size=config.vocab_size,
            embed_dim=config.hidden_size,
            hidden_dim=config.intermediate_size,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_kv_heads,
            rope_theta=int(config.rope_theta),
            norm_eps=config.norm_eps,
            weight_tying=True,
        ),
        rngs=nnx.Rngs(0),
    )


def torch_llama(model):
    """transformers' Llama of a decoder's shape, with random float32 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_length,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )


def word_tokenizer():
    """The least that TRL's constructor wants; the timed rows never pass through it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("<pad>", "<eos>", "<unk>", "a", "b"))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }} <eos> {% endfor %}"
    )
    return tokenizer
