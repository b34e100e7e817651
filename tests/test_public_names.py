"""The names other people's code relies on: importable, and documented."""

import importlib
import inspect

import pytest

NAMES = {
    "rkd_jax.masking": "masked_mean masked_sum sequence_sum sequence_mean fill_masked",
    "rkd_jax.losses": "token_log_probs forward_kl reverse_kl generalized_jsd "
    "skew_forward_kl skew_reverse_kl total_variation topk_forward_kl dpo ipo simpo "
    "bradley_terry confidence_slack trajectory_return reward_to_go reward_gap "
    "dual_update leave_one_out reinforce on_policy_distillation",
    "rkd_jax.losses.divergences": "forward_kl reverse_kl generalized_jsd "
    "skew_forward_kl skew_reverse_kl total_variation topk_forward_kl",
    "rkd_jax.losses.preference": "dpo ipo simpo",
    "rkd_jax.losses.reward": "bradley_terry confidence_slack check_epsilon",
    "rkd_jax.losses.minmax": "trajectory_return reward_to_go reward_gap dual_update",
    "rkd_jax.losses.policy_gradient": "leave_one_out reinforce on_policy_distillation",
    "rkd_jax.types": "Pair Sequences LossOutput Objective",
    "rkd_jax.models.api": "CausalLM",
    "rkd_jax.models.decoder": "Decoder DecoderConfig",
    "rkd_jax.models.sampling": "SamplingConfig make_sampler",
    "rkd_jax.models.hf_flax": "load_hf_flax",
    "rkd_jax.models.surgery": "keep_layers align_vocab",
    "rkd_jax.interop": "load_model save_model",
    "rkd_jax.data.records": "PromptRecord PreferenceRecord DemonstrationRecord",
    "rkd_jax.signals.oracles": "VaderOracle label_preferences load_oracle",
    "rkd_jax.training": "init_state make_update fit",
    "rkd_jax.training.checkpoint": "Checkpoints",
    "rkd_jax.evaluation.report": "write_report",
}
CASES = [(module, name) for module, names in NAMES.items() for name in names.split()]


@pytest.mark.parametrize(("module", "name"), CASES)
def test_it_is_there_and_says_what_it_does(module, name):
    value = getattr(importlib.import_module(module), name)
    text = inspect.getdoc(value)
    assert text
    assert text.splitlines()[0].endswith((".", ":"))
    if inspect.isfunction(value) and module.startswith(
        ("rkd_jax.masking", "rkd_jax.losses")
    ):
        assert any(word in text for word in ("[", "axis", "scalar", "mean"))


def test_the_model_protocol_has_the_promised_methods():
    from rkd_jax.models.api import CausalLM

    for method in ("init", "hidden", "head", "logits", "unembed", "init_cache"):
        assert inspect.getdoc(getattr(CausalLM, method))
