"""AVRIL's objective against the released code's formulae, and as an imitator."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.models.mlp import MLP, avril_networks
from rkd_jax.objectives.avril import make_avril
from rkd_jax.training import init_state, make_update
from rkd_jax.types import TrajectoryBatch

LENGTHS = np.array([5, 1, 3, 2])
SIZE, ACTIONS = 4, 3


def trajectories(seed=0, filler=0.0):
    """Four ragged trajectories of random states and actions."""
    generator = np.random.default_rng(seed)
    mask = np.arange(5) < LENGTHS[:, None]
    states = generator.normal(size=(4, 5, SIZE))
    actions = generator.integers(0, ACTIONS, size=(4, 5))
    states = np.where(mask[..., None], states, filler)
    return TrajectoryBatch(*map(jnp.asarray, (states, actions, mask)))


def transitions(batch):
    """What the released code is fed: states [N, 2, S] and actions [N, 2]."""
    states, actions = np.asarray(batch.states), np.asarray(batch.actions)
    pairs = [(b, t) for b, n in enumerate(LENGTHS) for t in range(n - 1)]
    rows = [(states[b, t : t + 2], actions[b, t : t + 2]) for b, t in pairs]
    return tuple(np.stack(column) for column in zip(*rows, strict=True))


def networks_and_params(seed=0, state_action=False):
    """The released configuration, in float64 and with biases that are not 0."""
    networks = avril_networks(SIZE, ACTIONS, state_action=state_action)
    generator = np.random.default_rng(seed)

    def draw(shape):
        return jnp.asarray(generator.normal(size=shape.shape) * shape.shape[0] ** -0.5)

    shapes = jax.eval_shape(networks.init, jax.random.key(seed))
    return networks, jax.tree.map(draw, shapes)


def evaluate(objective, params, batch):
    """LossOutput and gradient of its total."""

    def total(params):
        out = objective.student_loss(params, None, None, batch, None, None)
        return out.total, out

    # Not jitted: every objective would be compiled anew, single operations are not.
    gradient, out = jax.grad(total, has_aux=True)(params)
    return out, gradient


# What the released code computes, derived again: one transition after the other, every
# term from its definition, and the mean over transitions.


def forward(params, x):
    *hidden, last = params["layers"]
    for layer in hidden:
        x = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        x = np.where(x > 0, x, np.expm1(np.minimum(x, 0.0)))
    return x @ np.asarray(last["kernel"]) + np.asarray(last["bias"])


def released_loss(params, states, actions, state_only):
    losses = []
    for (state, following), (a, b) in zip(states, actions, strict=True):
        q_values = forward(params["policy"], state)
        difference = q_values[a] - forward(params["policy"], following)[b]
        out = forward(params["encoder"], state)
        mean, log_std = out if state_only else (out[a], out[ACTIONS + a])
        std = np.exp(log_std)
        boltzmann = np.exp(q_values[a]) / np.exp(q_values).sum()
        kl = np.log(1 / std) + (std**2 + mean**2) / 2 - 0.5
        scale = std * np.sqrt(2 * np.pi)
        density = np.exp(-(((difference - mean) / std) ** 2) / 2) / scale
        losses.append(-np.log(boltzmann) + kl - np.log(density))
    return np.mean(losses)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("state_only", [True, False])
def test_value_and_gradient_of_the_released_code(state_only):
    batch = trajectories()
    networks, params = networks_and_params(state_action=not state_only)
    reward_input = "state" if state_only else "state_action"
    objective = make_avril(
        networks.q_values, networks.reward, reward_input=reward_input
    )
    out, gradient = evaluate(objective, params, batch)
    states, actions = transitions(batch)
    assert float(out.weight) == len(states) == 7
    expected = released_loss(params, states, actions, state_only)
    np.testing.assert_allclose(out.total / out.weight, expected, rtol=1e-12)

    generator = np.random.default_rng(1)
    for _ in range(6):
        step = jax.tree.map(lambda x: generator.normal(size=x.shape), params)

        def along(scale, step=step):
            moved = jax.tree.map(lambda x, d: np.asarray(x) + scale * d, params, step)
            return released_loss(moved, states, actions, state_only)

        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        products = jax.tree.map(lambda g, d: (np.asarray(g) * d).sum(), gradient, step)
        found = sum(jax.tree.leaves(products)) / float(out.weight)
        assert found == pytest.approx(slope, rel=1e-6)


@pytest.mark.usefixtures("x64")
def test_metrics_and_weighting_of_the_terms():
    batch = trajectories()
    networks, params = networks_and_params()
    make = {"q_network": networks.q_values, "encoder": networks.reward}
    out, _ = evaluate(make_avril(**make, td_weight=0.3), params, batch)
    found = {name: float(m.total / m.weight) for name, m in out.metrics.items()}
    assert all(float(m.weight) == 7 for m in out.metrics.values())
    loss = found["student/nll"] + found["student/reward_kl"]
    loss -= 0.3 * found["student/td_log_likelihood"]
    assert float(out.total / out.weight) == pytest.approx(loss, rel=1e-12)
    states, actions = transitions(batch)
    rows = np.arange(7)
    q_values = [
        forward(params["policy"], states[:, t])[rows, actions[:, t]] for t in (0, 1)
    ]
    error = np.abs(q_values[0] - q_values[1]).mean()
    assert found["student/td_error"] == pytest.approx(error, rel=1e-12)
    log_std = forward(params["encoder"], states[:, 0])[:, 1].mean()
    assert found["student/log_std"] == pytest.approx(log_std, rel=1e-12)


@pytest.mark.usefixtures("x64")
def test_irl_only_adds_the_last_actions_and_keeps_the_weights_of_the_sum():
    batch = trajectories()
    networks, params = networks_and_params()
    make = {"q_network": networks.q_values, "encoder": networks.reward}
    whole, _ = evaluate(make_avril(**make, drop_last="irl_only"), params, batch)
    dropped, _ = evaluate(make_avril(**make), params, batch)
    assert float(whole.weight) == LENGTHS.sum()
    rows = np.arange(4)
    last = np.asarray(batch.states)[rows, LENGTHS - 1]
    q_values = forward(params["policy"], last)
    taken = q_values[rows, np.asarray(batch.actions)[rows, LENGTHS - 1]]
    nll = (np.log(np.exp(q_values).sum(-1)) - taken).sum()
    np.testing.assert_allclose(whole.total, dropped.total + nll, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_padding_may_hold_nan_and_rows_add_up():
    networks, params = networks_and_params()
    objective = make_avril(
        networks.q_values, networks.reward, gamma=0.9, drop_last="irl_only"
    )
    clean, dirty = (
        evaluate(objective, params, trajectories(filler=f)) for f in (0.0, np.nan)
    )
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)

    batch = trajectories(filler=np.nan)

    def only(*rows):
        mask = batch.mask & jnp.isin(jnp.arange(4), jnp.asarray(rows, int))[:, None]
        part = TrajectoryBatch(batch.states, batch.actions, mask)
        return evaluate(objective, params, part)

    added = jax.tree.map(lambda a, b: a + b, only(0), only(1, 2, 3))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13),
        added,
        clean,
    )
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(only()))


@pytest.mark.usefixtures("x64")
def test_next_state_reads_the_state_that_follows():
    batch = trajectories(filler=np.nan)
    networks, params = networks_and_params()
    out, _ = evaluate(
        make_avril(networks.q_values, networks.reward, reward_input="next_state"),
        params,
        batch,
    )
    states, _ = transitions(batch)
    mean, log_std = forward(params["encoder"], states[:, 1]).T
    kl = 0.5 * (np.exp(2 * log_std) + mean**2 - 1) - log_std
    found = out.metrics["student/reward_kl"]
    np.testing.assert_allclose(found.total / found.weight, kl.mean(), rtol=1e-12)


def test_settings_are_checked():
    networks = avril_networks(SIZE, ACTIONS)
    make = {"q_network": networks.q_values, "encoder": networks.reward}
    with pytest.raises(ValueError, match="td_weight"):
        make_avril(**make, td_weight=-1.0)
    with pytest.raises(ValueError, match="reward_input"):
        make_avril(**make, reward_input="action")
    with pytest.raises(ValueError, match="next_state"):
        make_avril(**make, reward_input="next_state", terminal="anchor")
    objective = make_avril(**make, reward_input="state_action")
    params, batch = dict.fromkeys(("policy", "encoder")), trajectories()
    with pytest.raises(ValueError, match="match reward_input"):
        objective.student_loss(params, None, None, batch, None, None)
    with pytest.raises(ValueError, match="not positive"):
        MLP(inputs=3, outputs=0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("state_action", [False, True])
def test_the_posterior_of_the_networks_may_be_bounded(state_action):
    free, params = networks_and_params(state_action=state_action)
    batch = trajectories()
    actions = batch.actions if state_action else None

    def posterior(**options):
        networks = avril_networks(SIZE, ACTIONS, state_action=state_action, **options)
        return networks.reward(params["encoder"], batch.states, actions)

    mean, raw = (
        np.asarray(x) for x in free.reward(params["encoder"], batch.states, actions)
    )
    narrow = tuple(float(raw.min() + part * np.ptp(raw)) for part in (0.3, 0.6))
    clipped = posterior(limit="clip", log_std_range=narrow)
    np.testing.assert_allclose(clipped.log_std, np.clip(raw, *narrow), rtol=1e-12)
    smooth = posterior(limit="smooth")
    expected = -3.0 + 5.0 / (1.0 + np.exp(-raw))
    np.testing.assert_allclose(smooth.log_std, expected, atol=1e-13)
    for found in (clipped, smooth):
        np.testing.assert_array_equal(found.mean, mean)
    with pytest.raises(ValueError, match="limit='hard'"):
        posterior(limit="hard")


def test_released_sizes_and_initialisation():
    networks = avril_networks(4, 4, state_action=True)
    shapes = jax.tree.map(
        lambda leaf: leaf.shape, jax.eval_shape(networks.init, jax.random.key(3))
    )
    for name, outputs in (("policy", 4), ("encoder", 8)):
        kernels = [layer["kernel"] for layer in shapes[name]["layers"]]
        assert kernels == [(4, 64), (64, 64), (64, outputs)]
    layers = networks.q_network.init(jax.random.key(3))["layers"]
    assert not any(np.asarray(layer["bias"]).any() for layer in layers)
    kernel = np.asarray(layers[1]["kernel"])
    assert 1.9 * 64**-0.5 < np.abs(kernel).max() <= 2 * 64**-0.5
    # A normal cut at two standard deviations keeps 0.88 of its own.
    assert kernel.std() == pytest.approx(0.88 * 64**-0.5, rel=0.03)


# A known expert: a 4 x 4 grid, a goal in one corner, a swamp on the way

SIDE, GOAL = 4, 15
SWAMP = {5, 6, 9}


def grid():
    """next_state [16, 4] and reward [16, 4] of up, down, left, right."""
    following, reward = np.zeros((16, 4), int), np.zeros((16, 4))
    for s in range(16):
        row, column = divmod(s, SIDE)
        moves = [(-1, 0), (1, 0), (0, -1), (0, 1)]
        for a, (down, right) in enumerate(moves):
            row2 = min(max(row + down, 0), SIDE - 1)
            column2 = min(max(column + right, 0), SIDE - 1)
            following[s, a] = SIDE * row2 + column2
            reward[s, a] = 1.0 * (following[s, a] == GOAL) - 0.5 * (s in SWAMP)
    return following, reward


NEXT, REWARD = grid()
DISCOUNT = 0.9


def soft_expert(beta):
    """Boltzmann policy of the optimal action values, [16, 4]."""
    q_values = np.zeros((16, 4))
    for _ in range(200):
        q_values = REWARD + DISCOUNT * q_values.max(-1)[NEXT]
    weights = np.exp(beta * (q_values - q_values.max(-1, keepdims=True)))
    return weights / weights.sum(-1, keepdims=True)


def value(policy):
    """Discounted return of a policy from a uniform start, exactly."""
    transition = np.zeros((16, 16))
    for s, a in np.ndindex(16, 4):
        transition[s, NEXT[s, a]] += policy[s, a]
    reward = (policy * REWARD).sum(-1)
    return np.linalg.solve(np.eye(16) - DISCOUNT * transition, reward).mean()


def coordinates(states):
    """[..., 4]: position, and whether it is the swamp or the goal."""
    row, column = np.divmod(states, SIDE)
    swamp = np.isin(states, list(SWAMP))
    return np.stack([row / 3, column / 3, swamp, states == GOAL], -1).astype(np.float32)


def demonstrations(policy, count=48, steps=10, seed=0):
    generator = np.random.default_rng(seed)
    states = np.zeros((count, steps), int)
    actions = np.zeros((count, steps), int)
    states[:, 0] = generator.integers(0, 16, size=count)
    for t in range(steps):
        uniform = generator.uniform(size=(count, 1))
        actions[:, t] = (uniform > policy[states[:, t]].cumsum(-1)).sum(-1)
        if t + 1 < steps:
            states[:, t + 1] = NEXT[states[:, t], actions[:, t]]
    mask = np.ones((count, steps), bool)
    return TrajectoryBatch(
        *map(jnp.asarray, (coordinates(states), actions.astype(np.int32), mask))
    )


def test_it_imitates_a_known_expert_through_function_approximation():
    """Through the library's update; as good as the expert it has seen, by exact value.

    The weight 0.5 and not the code's 1: the posterior then has a floor.
    """
    expert = soft_expert(beta=8.0)
    networks = avril_networks(4, 4)
    objective = make_avril(
        networks.q_values, networks.reward, gamma=DISCOUNT, td_weight=0.5
    )
    optimizer = optax.adam(1e-2)
    state = init_state(
        networks.init(jax.random.key(0)),
        student_optimizer=optimizer,
        rng=jax.random.key(1),
    )
    update = make_update(objective, student_optimizer=optimizer)
    batch, metrics = demonstrations(expert), {}
    for _ in range(250):
        state, metrics = update(state, None, batch, None)
    params = state.student.params
    q_values = networks.q_values(
        params["policy"], jnp.asarray(coordinates(np.arange(16)))
    )
    q_values = np.asarray(q_values, np.float64)
    greedy = np.eye(4)[q_values.argmax(-1)]
    best = value(soft_expert(beta=1e3))
    uniform = value(np.full((16, 4), 0.25))
    assert uniform < 0.3 * best
    assert value(greedy) > 0.95 * best
    # sampled as it was trained, it is as good as the demonstrator
    boltzmann = np.exp(q_values - q_values.max(-1, keepdims=True))
    boltzmann /= boltzmann.sum(-1, keepdims=True)
    assert value(boltzmann) == pytest.approx(value(expert), rel=0.1)
    assert float(metrics["student/nll"]) < 0.6 * np.log(4)
    # A2: the variance of a posterior is at least 1 - lambda at its optimum.
    assert float(metrics["student/log_std"]) > 0.5 * np.log(0.5) - 0.05
