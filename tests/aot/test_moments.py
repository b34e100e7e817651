"""What the moments of action values send where every head is cut over fsdp."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rkd_jax.aot.collectives import collective_traffic
from rkd_jax.aot.compiling import placed
from rkd_jax.aot.hlo import parse
from rkd_jax.models.heads import QHead, head_q_values
from rkd_jax.objectives.action_values import (
    MOMENTS,
    QFunction,
    Rows,
    action_moments,
    row_terms,
)
from rkd_jax.sharding import MeshConfig, batch_sharding, make_mesh
from rkd_jax.types import Sequences

PROMPTS, SAMPLES, TARGETS, WIDTH, VOCABULARY, HIDDEN = 16, 2, 16, 64, 512, 32
HEAD = WIDTH * VOCABULARY
Q = QFunction(
    head_q_values(QHead(actions=VOCABULARY, width=HIDDEN)), center=True, bound=1.0
)


def total(heads, critic, states, sequences, *, logits, foreseen=False):
    """All moments added up, or the gap, of which that is foreseen."""
    student, teacher = (
        Rows(states, lambda head, x: jax.nn.log_softmax(x @ head), head)
        for head in heads
    )
    ones = {"gap": sequences.response_mask.astype(jnp.float32)}
    moments = action_moments(
        ones if foreseen else MOMENTS,
        Q,
        Q.along(critic, sequences, states),
        sequences,
        anchor="teacher",
        student=student,
        teacher=teacher,
        foreseen=ones if foreseen else None,
        logits=logits,
    )
    return sum(one.sum() for one in moments.values())


def pair_total(heads, critic, states, sequences, *, logits):
    """What rows of two come to, of which the gradient is foreseen."""
    head, _ = heads

    def conclude(moments, mask, data):
        returns = jnp.where(mask, moments["advantages"], 0.0).sum(-1)
        return jax.nn.softplus(returns[:, 1] - returns[:, 0])

    losses = row_terms(
        conclude,
        None,
        ("advantages",),
        Q,
        Q.along(critic, sequences, states),
        sequences,
        anchor="teacher",
        teacher=Rows(states, lambda head, x: jax.nn.log_softmax(x @ head), head),
        foreseen=jnp.ones(PROMPTS),
        logits=logits,
    )
    return losses.sum()


@functools.cache
def sent(of, **options) -> dict[str, float]:
    """Numbers that a device sends by kind of collective, gradients of all included."""
    mesh = make_mesh(MeshConfig(fsdp=8), jax.devices())
    shape = (PROMPTS, SAMPLES, TARGETS)
    longer = (PROMPTS, SAMPLES, TARGETS + 1)
    own, cut = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec("fsdp"))
    head = jax.ShapeDtypeStruct((WIDTH, VOCABULARY), jnp.float32)
    critic = jax.eval_shape(lambda: Q.values.head.init(jax.random.key(0), WIDTH))
    sequences = Sequences(
        tokens=jax.ShapeDtypeStruct(longer, jnp.int32),
        token_mask=jax.ShapeDtypeStruct(longer, bool),
        response_mask=jax.ShapeDtypeStruct(shape, bool),
    )
    states = jax.ShapeDtypeStruct((*shape, WIDTH), jnp.float32)
    gradients = jax.grad(functools.partial(of, **options), argnums=(0, 1))
    players = placed(((head, head), critic), cut)
    with jax.set_mesh(mesh):
        lowered = jax.jit(gradients, out_shardings=cut).lower(
            *players, *placed((states, sequences), own)
        )
    program = parse(lowered.compile().as_text())
    traffic = collective_traffic(program, 8)
    return {kind: found.bytes / 4 for kind, found in traffic.items()}


@pytest.mark.parametrize("positions", [TARGETS, 4, 1])
def test_heads_are_gathered_once_and_gradients_summed_once(positions):
    """However many slices the positions are cut into."""
    found = sent(total, logits=positions * SAMPLES * VOCABULARY)
    once = 7 / 8 * (2 * HEAD + HIDDEN * VOCABULARY + HIDDEN * WIDTH)
    assert once <= found.pop("all-gather") < 1.02 * once
    # Of the student and the critic; this compiler does not scatter what it reduces.
    trained = once - 7 / 8 * HEAD
    assert found.pop("all-reduce") < 1.02 * 2 * trained
    assert not found


@pytest.mark.parametrize("positions", [4, 1])
def test_so_they_are_where_the_gradient_was_foreseen(positions):
    found = sent(total, logits=positions * SAMPLES * VOCABULARY, foreseen=True)
    kernels, biases = HIDDEN * (VOCABULARY + WIDTH), VOCABULARY + HIDDEN
    once = 7 / 8 * (2 * HEAD + kernels)
    assert once <= found.pop("all-gather") < 1.02 * once
    # The critic's alone.
    assert found.pop("all-reduce") == 2 * 7 / 8 * (kernels + biases)
    assert not found


@pytest.mark.parametrize("rows", [2, 1])
def test_so_they_are_where_rows_are_read_one_after_the_other(rows):
    found = sent(pair_total, logits=rows * SAMPLES * TARGETS * VOCABULARY)
    kernels, biases = HIDDEN * (VOCABULARY + WIDTH), VOCABULARY + HIDDEN
    once = 7 / 8 * (HEAD + kernels)
    assert once <= found.pop("all-gather") < 1.02 * once
    assert found.pop("all-reduce") == 2 * 7 / 8 * (kernels + biases)
    assert not found
