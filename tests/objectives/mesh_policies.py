"""Policies trained alone, and with a reward head of their own, as `mesh_check.Case`s.

The name of a case is that of the function that makes its objective, without ``make_``,
and after a blank what the case has of its own.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax

from rkd_jax.losses import generalized_jsd, reverse_kl
from rkd_jax.models.heads import GaussianHead, QHead, RewardModel, ScalarHead
from rkd_jax.models.mlp import avril_networks
from rkd_jax.objectives.ava import make_ava_d, make_ava_p
from rkd_jax.objectives.avril import make_avril
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.drdo import make_drdo, make_drdo_oracle
from rkd_jax.objectives.edpo import make_ddpo, make_dpdpo, make_edpo, make_pdpo
from rkd_jax.objectives.gkd import make_gkd
from rkd_jax.objectives.kd import make_kd
from rkd_jax.objectives.minillm import make_minillm
from rkd_jax.objectives.reward_inference import RewardInference
from rkd_jax.objectives.sft import make_seqkd, make_sft
from rkd_jax.objectives.topk_kd import make_topk_kd
from rkd_jax.objectives.tvkd import make_tvkd, make_tvkd_release
from rkd_jax.objectives.xkd import (
    make_xkd_gkd,
    make_xkd_minillm,
    make_xkd_sequence,
)
from rkd_jax.types import (
    AnchoredPairs,
    EnsembleSignal,
    ImitationSignal,
    ReferenceSignal,
    ReleaseSignal,
    ShapingSignal,
    TeacherSignal,
    TeacherStates,
    TopkSignal,
    TrajectoryBatch,
)
from tests.objectives.mesh_check import Case
from tests.objectives.mesh_data import (
    AXES,
    MODEL,
    TEACHER,
    B,
    D,
    T,
    V,
    demonstrations,
    drawn,
    imitation,
    log_probs,
    normal,
    packed_preferences,
    preferences,
    student,
)

HEAD = ScalarHead(bound=1.0)  # without a bound a bias cancels out of every pair
GAUSSIAN, Q_HEAD = GaussianHead(), QHead(actions=V)
WIDTH = MODEL.config.hidden_size


def reference(*batch):
    """Summed log-probs of both responses."""
    return normal(*batch, 2, seed=20) - 9.0


def headed(**heads):
    """A student with heads on its states, and the names of its axes."""
    params = {name: drawn(head, WIDTH) for name, head in heads.items()}
    return {
        "student": {"policy": student(), **params},
        "axes": {"policy": AXES},
    }


# Likelihood and distillation


def taught(make, batch=demonstrations, **own):
    """A divergence to a teacher that gives its states."""
    objective = make(teacher=TEACHER)
    states = TeacherStates(normal(B, T, D, seed=21))
    return Case(objective, batch(), states, taught="teacher", **own)


def likely(*batch):
    """Five distinct tokens at every target."""
    every = np.broadcast_to(np.arange(V, dtype=np.int32), (*batch, T, V))
    return np.random.default_rng(22).permuted(every, axis=-1)[..., :5]


def topk_kd():
    signal = TopkSignal(likely(B), log_probs(B, T, 6)[..., :5])
    return Case(make_topk_kd(MODEL), demonstrations(), signal)


def mixed_samples():
    """Imitated responses with the weights of their tokens."""
    return dataclasses.replace(
        imitation(), importance_weights=np.exp(normal(B, T, seed=32))
    )


# Preferences


def edpo(make, models, *, samples=True, **own):
    """Pairs with the rewards of frozen models, and samples of the reference."""
    batch = AnchoredPairs(preferences(), demonstrations() if samples else None)
    signal = EnsembleSignal(reference(B), normal(B, 2, models, seed=23))
    return Case(make(MODEL, beta=0.5), batch, signal, **own)


def tvkd_release(variant, signal):
    objective = make_tvkd_release(MODEL, variant=variant, gamma=0.7)
    return Case(objective, preferences(), signal)


def drdo_oracle():
    params = {"trunk": student(), "head": drawn(HEAD, WIDTH)}
    return Case(
        make_drdo_oracle(RewardModel(MODEL, HEAD), alpha=0.1),
        preferences(),
        student=params,
        axes={"trunk": AXES},
    )


# Rewards inferred beside a policy


def xkd(make, batch=imitation, **own):
    return taught(
        functools.partial(make, MODEL, RewardInference(GAUSSIAN.apply)),
        batch,
        **headed(reward_head=GAUSSIAN),
        **own,
    )


def xkd_expected():
    """Q is a head, its next value over the teacher's distribution."""
    inference = RewardInference(
        GAUSSIAN.apply, q_source="q_head", q_head=Q_HEAD.apply, next_value="expected"
    )
    return Case(
        make_xkd_gkd(MODEL, inference),
        imitation(),
        ImitationSignal(log_probs(B, T, V, seed=24), log_probs(B, T, V, seed=25)),
        **headed(reward_head=GAUSSIAN, q_head=Q_HEAD),
    )


def avril():
    networks = avril_networks(8, 4, limit="smooth")
    rng = np.random.default_rng(26)
    batch = TrajectoryBatch(
        normal(B, T, 8, seed=27),
        rng.integers(0, 4, (B, T)).astype(np.int32),
        np.arange(T) < rng.integers(2, T + 1, (B, 1)),
    )
    objective = make_avril(networks.q_values, networks.reward, td_weight=0.5)
    params = networks.init(jax.random.key(3))
    return Case(objective, batch, student=params, axes=None)


def kd_of_log_probs():
    signal = TeacherSignal(log_probs(B, T, V))
    return Case(make_kd(MODEL, reverse_kl), demonstrations(), signal)


POLICIES = {
    "kd": lambda: taught(functools.partial(make_kd, MODEL, generalized_jsd)),
    "sft": lambda: Case(make_sft(MODEL), demonstrations()),
    "seqkd": lambda: Case(make_seqkd(MODEL), demonstrations()),
    "kd of log-probs": kd_of_log_probs,
    "topk_kd": topk_kd,
    "gkd": lambda: taught(functools.partial(make_gkd, MODEL), imitation),
    "minillm": lambda: taught(functools.partial(make_minillm, MODEL)),
    "minillm mixed": lambda: taught(
        functools.partial(make_minillm, MODEL), mixed_samples
    ),
    "dpo": lambda: Case(
        make_dpo(MODEL, beta=1.0), preferences(), ReferenceSignal(reference(B))
    ),
    "dpo packed": lambda: Case(
        make_dpo(MODEL, beta=1.0),
        packed_preferences(),
        ReferenceSignal(reference(*packed_preferences().label.shape)),
    ),
    "ddpo": lambda: edpo(make_ddpo, 1, samples=False),
    "dpdpo": lambda: edpo(make_dpdpo, 1),
    "edpo": lambda: edpo(make_edpo, 3),
    "edpo running": lambda: edpo(
        functools.partial(make_edpo, reduce="ema_min"),
        8,
        critic={"means": np.zeros(8, np.float32)},
        critic_optimizer=optax.sgd(0.1),
        critic_steps=1,
    ),
    "pdpo": lambda: edpo(make_pdpo, 1),
    "tvkd": lambda: Case(
        make_tvkd(MODEL, beta=0.5),
        preferences(),
        ShapingSignal(reference(B), normal(B, 2, seed=28)),
    ),
    "tvkd_release entropy": lambda: tvkd_release(
        "release_entropy",
        ReleaseSignal(topk_ids=likely(B, 2)),
    ),
    "tvkd_release reference": lambda: tvkd_release(
        "tpkd_ref",
        ReleaseSignal(reference=reference(B), next_values=normal(B, 2, seed=29)),
    ),
    "drdo": lambda: Case(
        make_drdo(MODEL, HEAD),
        preferences(),
        **headed(reward_head=HEAD),
    ),
    "drdo_oracle": drdo_oracle,
    "xkd_sequence": lambda: Case(
        make_xkd_sequence(MODEL, RewardInference(GAUSSIAN.apply)),
        demonstrations(),
        **headed(reward_head=GAUSSIAN),
    ),
    "xkd_gkd": lambda: xkd(make_xkd_gkd),
    "xkd_gkd expected": xkd_expected,
    "xkd_minillm": lambda: xkd(make_xkd_minillm),
    "avril": avril,
    "ava_d": lambda: Case(
        make_ava_d(MODEL, GAUSSIAN.apply),
        demonstrations(),
        **headed(reward_head=GAUSSIAN),
    ),
    "ava_p": lambda: Case(
        make_ava_p(MODEL, GAUSSIAN.apply),
        preferences(),
        **headed(reward_head=GAUSSIAN),
    ),
    "ava_p with a head": lambda: Case(
        make_ava_p(MODEL, GAUSSIAN.apply, q_head=Q_HEAD.apply, q_source="q_head"),
        preferences(),
        **headed(reward_head=GAUSSIAN, q_head=Q_HEAD),
    ),
}
