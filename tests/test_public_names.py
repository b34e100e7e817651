"""The names other people's code relies on: importable, and documented."""

import importlib
import inspect

import pytest

NAMES = {
    "rkd_jax.masking": "masked_mean masked_sum sequence_sum sequence_mean fill_masked "
    "segment_sum",
    "rkd_jax.packed": "PackedPreferenceBatch pair_sums target_segments refuse_packed",
    "rkd_jax.data.packing": "pack first_fit_decreasing collate_packed unpack unpacked "
    "padding_waste Padding",
    "rkd_jax.data.windows": "make_packed_batches make_bucketed_batches",
    "rkd_jax.sharding": "MeshConfig ShardingError make_mesh tree_shardings "
    "parameter_shardings mesh_of batch_sharding shard_batch row_shards mesh_shard",
    "rkd_jax.placement": "follow_parameters place_rows fetch fill_rows on_mesh jit_on "
    "on_own_rows describe_mesh",
    "rkd_jax.losses": "token_log_probs forward_kl reverse_kl generalized_jsd "
    "skew_forward_kl skew_reverse_kl total_variation topk_forward_kl "
    "topk_divergence dpo ipo simpo linear_token_log_probs linear_divergence "
    "linear_topk_divergence "
    "linear_soft_value linear_expectation linear_sequence_reverse_kl "
    "bradley_terry confidence_slack trajectory_return reward_to_go reward_gap "
    "triviality_threshold reward_player_loss leave_one_out_per_step next_value_sum "
    "dual_update leave_one_out reinforce on_policy_distillation "
    "soft_value potential_shaping tvkd check_shaping release_return bucket_log_probs "
    "drdo reward_distillation pessimistic_reduce reward_scale check_rewards "
    "gaussian_kl gaussian_log_prob avril ava_demonstration ava_preference log1mexp "
    "experiential_regularizer temporal_difference",
    "rkd_jax.losses.variational": "avril experiential_regularizer gaussian_kl "
    "gaussian_log_prob ava_demonstration ava_preference",
    "rkd_jax.models.mlp": "avril_networks AvrilNetworks MLP",
    "rkd_jax.models.attention_weights": "response_attention",
    "rkd_jax.objectives.avril": "make_avril",
    "rkd_jax.objectives.ava": "make_ava_d make_ava_p ava_token_rewards",
    "rkd_jax.losses.divergences": "forward_kl reverse_kl generalized_jsd "
    "skew_forward_kl skew_reverse_kl total_variation topk_forward_kl",
    "rkd_jax.losses.topk": "topk_divergence",
    "rkd_jax.losses.fused": "linear_token_log_probs linear_divergence "
    "linear_topk_divergence linear_soft_value linear_expectation Tiles",
    "rkd_jax.losses.preference": "dpo ipo simpo",
    "rkd_jax.losses.reward": "bradley_terry confidence_slack check_epsilon drdo "
    "reward_distillation pessimistic_reduce",
    "rkd_jax.losses.reward_distillation": "drdo reward_distillation pessimistic_reduce "
    "running_mean_loss reward_scale check_rewards",
    "rkd_jax.objectives.sft": "make_sft make_seqkd",
    "rkd_jax.objectives.kd": "make_kd",
    "rkd_jax.objectives.topk_kd": "make_topk_kd",
    "rkd_jax.objectives.dpo": "make_dpo",
    "rkd_jax.signals.teacher": "make_teacher_log_probs make_token_scorer "
    "make_sequence_scorer make_pair_scorer make_features",
    "rkd_jax.signals.topk": "make_topk topk_scores",
    "rkd_jax.signals.cache": "TeacherCache CacheWriter CacheSettings model_hash",
    "rkd_jax.objectives.drdo": "make_drdo make_drdo_oracle",
    "rkd_jax.objectives.edpo": "make_ddpo make_pdpo make_dpdpo make_edpo",
    "rkd_jax.losses.minmax": "trajectory_return reward_to_go reward_gap dual_update "
    "moment_gap advantage_sum anchored_advantages",
    "rkd_jax.losses.moments": "centered_q spread_topk one_step one_step_plus_long "
    "on_policy_moment off_policy_moment bounded_moment_distance gradient_penalty",
    "rkd_jax.losses.returns": "discount_weights trajectory_return reward_to_go",
    "rkd_jax.objectives.mm_pbkd": "make_mm_pbkd",
    "rkd_jax.objectives.mmkd": "make_mmkd",
    "rkd_jax.objectives.action_values": "action_moments QFunction FrozenPolicy Rows",
    "rkd_jax.objectives.q_anchor": "make_q_anchor pair_advantages",
    "rkd_jax.losses.policy_gradient": "leave_one_out reinforce on_policy_distillation "
    "sequence_reverse_kl",
    "rkd_jax.losses.value": "soft_value potential_shaping tvkd",
    "rkd_jax.types": "Pair Sequences LossOutput Objective",
    "rkd_jax.models.api": "CausalLM",
    "rkd_jax.models.decoder": "Decoder DecoderConfig",
    "rkd_jax.models.sampling": "SamplingConfig make_sampler",
    "rkd_jax.models.mixed_sampling": "make_mixed_sampler",
    "rkd_jax.models.beam": "make_beam_search Beams",
    "rkd_jax.models.bucketing": "bucketed",
    "rkd_jax.models.hf_flax": "load_hf_flax",
    "rkd_jax.models.surgery": "keep_layers align_vocab",
    "rkd_jax.interop": "load_model load_tokenizer save_model",
    "rkd_jax.data.records": "PromptRecord PreferenceRecord DemonstrationRecord",
    "rkd_jax.signals.oracles": "VaderOracle label_preferences load_oracle",
    "rkd_jax.signals.retrying_oracle": "RetryingOracle RetryConfig stopping",
    "rkd_jax.signals.reward_oracle": "RewardModelOracle make_return_scorer",
    "rkd_jax.signals.resampling": "bootstrap_weights length_bias_weights",
    "rkd_jax.models.heads": "RewardModel ScalarHead head_token_rewards "
    "head_sequence_rewards QHead head_q_values",
    "rkd_jax.objectives.pbkd": "make_pbkd",
    "rkd_jax.objectives.reward_model": "make_reward_model make_reward_ensemble "
    "init_members",
    "rkd_jax.signals.values": "make_shaping make_state_values make_release_signal "
    "mean_value length_correlation",
    "rkd_jax.objectives.tvkd": "make_tvkd make_tvkd_release",
    "rkd_jax.objectives.gkd": "make_gkd mix_rows imitated_responses",
    "rkd_jax.objectives.minillm": "make_minillm",
    "rkd_jax.objectives.xkd": "make_xkd_sequence make_xkd_gkd make_xkd_minillm",
    "rkd_jax.objectives.reward_inference": "RewardInference reward_regularizer",
    "rkd_jax.training": "init_state make_update fit Diverged",
    "rkd_jax.training.checkpoint": "Checkpoints",
    "rkd_jax.evaluation.report": "write_report",
    "rkd_jax.aot.topology": "chip_of slice_devices prefer_the_compiler",
    "rkd_jax.aot.compiling": "compile_step Compiled placed text_of",
    "rkd_jax.aot.hlo": "parse Program",
    "rkd_jax.aot.collectives": "collective_traffic Traffic",
    "rkd_jax.aot.traffic": "hbm_bytes",
    "rkd_jax.aot.flops": "matmul_flops",
    "rkd_jax.aot.report": "Plan Memory Work Roofline roofline",
    "rkd_jax.models.flops": "trunk_flops head_flops forward_flops",
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
