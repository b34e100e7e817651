"""The initial state: copied buffers, final shardings, independent keys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.sharding import MeshConfig, make_mesh, tree_shardings
from rkd_jax.training import OptimConfig, init_state, make_optimizer, step_keys
from rkd_jax.training.state import state_shardings

PARAMS = {"w": jnp.arange(8.0).reshape(4, 2), "b": jnp.ones(2)}
ADAM = make_optimizer(OptimConfig(1e-2, weight_decay=0.1))


def pointers(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


def test_state_shares_no_buffer_with_what_it_was_made_from(rng):
    state = init_state(
        PARAMS,
        student_optimizer=ADAM,
        critic_params=PARAMS,
        critic_optimizer=ADAM,
        rng=rng,
    )
    ours = pointers((state.student, state.critic)) | pointers(state.dual)
    theirs = pointers(PARAMS) | pointers(jax.random.key_data(rng))
    assert not ours & theirs
    # Distinct from each other too: donating one buffer twice is an error.
    assert len(ours) == len(jax.tree.leaves((state.student, state.critic))) + 1
    jax.tree.map(np.testing.assert_array_equal, state.student.params, PARAMS)


def test_initial_values(rng):
    state = init_state(PARAMS, student_optimizer=ADAM, dual=2.5, rng=rng)
    assert (int(state.step), int(state.skipped), float(state.dual)) == (0, 0, 2.5)
    assert state.critic is None
    assert state.dual.dtype == jnp.float32
    assert not state.dual.weak_type


def test_step_keys_differ_by_step_and_role_and_follow_the_root(rng):
    state = init_state(PARAMS, student_optimizer=ADAM, rng=rng)
    keys = []
    for step in range(3):
        at = jax.tree.map(lambda x: x, state)
        at = type(state)(**{**vars(at), "step": jnp.int32(step)})
        keys += [tuple(np.asarray(jax.random.key_data(k))) for k in step_keys(at)]
        np.testing.assert_array_equal(
            jax.random.key_data(jnp.stack(step_keys(at))),
            jax.random.key_data(jax.random.split(jax.random.fold_in(rng, step), 3)),
        )
    assert len(set(keys)) == 9


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"critic_params": PARAMS}, "together"),
        ({"critic_optimizer": ADAM}, "together"),
        ({"rng": np.zeros(2, np.uint32)}, "typed key"),
    ],
)
def test_incomplete_arguments_are_refused(kwargs, message, rng):
    with pytest.raises(ValueError, match=message):
        init_state(PARAMS, student_optimizer=ADAM, **{"rng": rng, **kwargs})


def test_r28_optimizer_state_is_created_where_its_parameters_live(rng):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    homes = tree_shardings({"w": ("embed", "mlp"), "b": ("mlp",)}, mesh)
    shardings = state_shardings(PARAMS, homes, student_optimizer=ADAM)
    state = init_state(PARAMS, student_optimizer=ADAM, rng=rng, shardings=shardings)
    adam = optax.tree.get(state.student.opt_state, "mu")
    for tree in (state.student.params, adam):
        assert tree["w"].addressable_shards[0].data.shape == (1, 1)
        assert tree["b"].addressable_shards[0].data.shape == (1,)
    assert len(state.step.addressable_shards) == 8
    # Never whole first: the compiled initialiser writes no replicated moment.
    text = (
        jax.jit(ADAM.init, out_shardings=shardings.student.opt_state)
        .lower(jax.device_put(PARAMS, homes))
        .compile()
        .as_text()
    )
    assert "f32[4,2]" not in text


def test_moments_of_another_shape_are_replicated():
    mesh = make_mesh(MeshConfig(fsdp=8))
    params = {"w": jnp.ones((128, 256))}
    homes = tree_shardings({"w": ("embed", None)}, mesh)
    factored = optax.adafactor(1e-3)
    player = state_shardings(params, homes, student_optimizer=factored).student
    shapes = jax.tree.leaves(jax.eval_shape(factored.init, params))
    for leaf, home in zip(shapes, jax.tree.leaves(player.opt_state), strict=True):
        assert home.is_fully_replicated == (leaf.shape != (128, 256))


def test_abstract_state_needs_no_buffers(rng):
    state = jax.eval_shape(
        lambda p: init_state(p, student_optimizer=ADAM, rng=rng), PARAMS
    )
    assert state.student.params["w"].shape == (4, 2)
    assert isinstance(state.step, jax.ShapeDtypeStruct)
