"""Language models as pure functions of their parameters.

`api` is the contract every model fulfils, `decoder` the library's own model, `heads`
what sits on its states, `surgery` how a student is cut from a teacher. Imported by
name are `hf_flax`, and what writes responses: `sampling`, `mixed_sampling` for two
models at once, `beam` for the most probable ones, and `bucketing`, which keeps the
shapes of their batches few.
"""

from rkd_jax.models.api import (
    CausalLM,
    action_hidden,
    head_part,
    positions_from_mask,
    response_hidden,
    response_logits,
    sequence_hidden,
)
from rkd_jax.models.decoder import Decoder, DecoderConfig, KVCache, RopeScaling
from rkd_jax.models.heads import Gaussian, GaussianHead, QHead, RewardModel, ScalarHead
from rkd_jax.models.surgery import (
    DepthPruning,
    align_vocab,
    crop_vocab,
    greedy_depth_prune,
    keep_layers,
    mlp_importance,
    pad_vocab,
    shared_vocab_size,
    slice_width,
)
