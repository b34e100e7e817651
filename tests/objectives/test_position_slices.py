"""A function of positions in slices: the numbers of one call, and how often it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.objectives.position_slices import in_slices

pytestmark = pytest.mark.usefixtures("x64")

BATCH, LENGTH, WIDTH = 2, 7, 3
RNG = np.random.default_rng(0)
TRAINED, DATA = {"kernel": RNG.normal(size=(WIDTH, 4))}, RNG.normal(size=(4,))
STATES = RNG.normal(size=(BATCH, LENGTH, WIDTH))
MASK = RNG.random((BATCH, LENGTH)) < 0.7
ANY = RNG.normal(size=(BATCH, LENGTH))


def two_sums(trained, data, mask, states, *, runs=None):
    """Two numbers of every position, neither linear in what is trained."""
    if runs is not None:
        jax.debug.callback(lambda one: runs.append(1), states.ravel()[0])
    values = jnp.tanh(jnp.matmul(states, trained["kernel"]))
    found = {"first": jnp.matmul(values, data), "second": (values**2).sum(-1)}
    return {name: jnp.where(mask, x, 0.0) for name, x in found.items()}


def gradients(at, size, cotangent, foreseen):
    """Values, and what reaches trained, data and states."""

    @jax.jit
    def of(trained, data, states):
        def total(trained, data, states):
            found = in_slices(
                at, trained, data, (MASK, states), size=size, foreseen=foreseen
            )
            parts = jax.tree.map(lambda x, c: (x * c).sum(), found, cotangent)
            return sum(jax.tree.leaves(parts)), found

        return jax.grad(total, (0, 1, 2), has_aux=True)(trained, data, states)

    found = of(jax.tree.map(jnp.asarray, TRAINED), jnp.asarray(DATA), STATES)
    jax.block_until_ready(found)
    jax.effects_barrier()
    return found


COTANGENTS = {  # what comes, and whether one factor takes the foreseen one to it
    "a factor": ({"first": -3.0 * MASK, "second": -3.0 * ANY * MASK}, True),
    "a factor for each": ({"first": 2.0 * MASK, "second": -3.0 * ANY * MASK}, False),
    "another": ({"first": ANY, "second": ANY}, False),
    "none": ({"first": 0.0 * ANY, "second": 0.0 * ANY}, True),
}
FORESEEN = {"first": 1.0 * MASK, "second": ANY * MASK}


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("name", COTANGENTS)
def test_slices_and_foresight_change_no_number(name, size):
    cotangent, _ = COTANGENTS[name]
    expected, values = gradients(two_sums, 100, cotangent, None)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    found, said = gradients(two_sums, size, cotangent, None)
    jax.tree.map(compare, (found, said), (expected, values))
    (trained, *data), said = gradients(two_sums, size, cotangent, FORESEEN)
    jax.tree.map(compare, (trained, said), (expected[0], values))
    assert not any(np.asarray(x).any() for x in data)


@pytest.mark.parametrize("name", COTANGENTS)
def test_what_is_foreseen_runs_once(name):
    cotangent, foreseen = COTANGENTS[name]
    slices, runs = 4, []
    at = functools.partial(two_sums, runs=runs)
    gradients(at, 2, cotangent, None)
    assert len(runs) == 2 * slices
    runs.clear()
    gradients(at, 2, cotangent, FORESEEN)
    assert len(runs) == (slices if foreseen else 2 * slices)
