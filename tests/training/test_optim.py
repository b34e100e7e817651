"""Schedules by formula, decay masks by name, AdamW and clipping by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.training import OptimConfig, make_optimizer, make_schedule
from rkd_jax.training.optim import decayed


@pytest.fixture(autouse=True)
def _promotion():
    """optax computes with Python and integer scalars; `make_update` allows it too."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def expected_rate(config, step):
    """The schedule written as a formula."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    span = config.total_steps - config.warmup_steps
    t = min(max(step - config.warmup_steps, 0) / span, 1.0)
    fall = 1 - t if config.schedule == "linear" else 0.5 * (1 + np.cos(np.pi * t))
    return config.learning_rate * (config.end_factor + (1 - config.end_factor) * fall)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_schedule_is_the_formula(schedule, warmup):
    config = OptimConfig(2e-3, schedule, warmup, 12, end_factor=0.1)
    rate = make_schedule(config)
    steps = range(15)
    np.testing.assert_allclose(
        [float(rate(jnp.int32(step))) for step in steps],
        [expected_rate(config, step) for step in steps],
        rtol=1e-5,
    )


def test_decay_spares_vectors_biases_and_norms_also_when_stacked():
    stacked = jnp.ones((3, 4))  # a norm's [D] under scanned layers
    params = {
        "embed": {"embedding": jnp.ones((5, 4))},
        "layers": {
            "attention_norm": {"scale": stacked},
            "attention": {
                "query": {"kernel": jnp.ones((3, 4, 2, 2)), "bias": stacked},
                "query_norm": {"scale": stacked},
            },
        },
        "gain": jnp.ones(4),
    }
    assert decayed(params) == {
        "embed": {"embedding": True},
        "layers": {
            "attention_norm": {"scale": False},
            "attention": {
                "query": {"kernel": True, "bias": False},
                "query_norm": {"scale": False},
            },
        },
        "gain": False,
    }


def test_two_steps_of_adamw_with_clipping_by_hand():
    config = OptimConfig(0.1, b1=0.8, b2=0.9, weight_decay=0.5, clip_norm=1.0)
    optimizer = make_optimizer(config)
    params = {"w": np.full((2, 2), 0.5), "b": np.full(2, 0.5)}
    grads = {"w": np.full((2, 2), 3.0), "b": np.array([1.0, -2.0])}
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    expected = {}
    for name, p in params.items():
        m = v = 0.0
        for t in (1, 2):
            g = grads[name] / norm
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
            p = p - 0.1 * (step + (0.5 * p if name == "w" else 0.0))
        expected[name] = p

    ours = {k: jnp.asarray(p, jnp.float32) for k, p in params.items()}
    state = optimizer.init(ours)
    step = jax.jit(optimizer.update)
    for _ in range(2):
        updates, state = step(
            {k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, state, ours
        )
        ours = {k: ours[k] + updates[k] for k in ours}
    for name in params:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5)


def test_no_clipping_leaves_the_gradient():
    grads = {"w": jnp.full((2,), 1e3)}
    updates = []
    for clip in (None, 1.0):
        optimizer = make_optimizer(OptimConfig(0.1, eps=1e3, clip_norm=clip))
        updates.append(optimizer.update(grads, optimizer.init(grads), grads)[0]["w"])
    # With eps = 1e3 Adam's first step is 0.1 g / (|g| + 1e3).
    np.testing.assert_allclose(updates[0], -0.1 * 1e3 / 2e3, rtol=1e-4)
    np.testing.assert_allclose(updates[1], -0.1 * 0.70711 / 1000.70711, rtol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"schedule": "cosin"}, "choose constant, cosine or linear"),
        ({"schedule": "cosine"}, "needs total_steps"),
        ({"schedule": "linear", "warmup_steps": 5, "total_steps": 5}, "warmup_steps=5"),
    ],
)
def test_bad_configuration_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(1e-3, **kwargs)
