"""What the compiler for CPUs makes of a fused loss, at sizes that are used."""

import functools

import jax
import pytest

from experiments.benchmarks.fused import FusedBenchmark, arguments, dense, fused

SIZES = FusedBenchmark()
DEFAULT = functools.partial(fused, "default")
# A quarter is promised; two sides, in chunks and strips, take less.
PARTS = {"log_probs": 4, "forward_kl": 9, "reverse_kl": 9, "jsd": 18}


@functools.cache
def program(version, loss, rows):
    """A value with its gradients for states and head."""
    given = jax.eval_shape(functools.partial(arguments, SIZES, rows))
    hidden, head = given.pop("hidden"), given.pop("head")
    step = jax.jit(jax.value_and_grad(functools.partial(version, loss), (0, 1)))
    return step.lower(hidden, head, given).compile()


@pytest.mark.parametrize("loss", PARTS)
def test_temporaries_are_a_small_part_of_those_of_the_dense_loss(loss):
    few, whole = (
        program(version, loss, 1024).memory_analysis().temp_size_in_bytes
        for version in (DEFAULT, dense)
    )
    assert few <= whole / PARTS[loss], (few, whole)


@pytest.mark.parametrize("loss", PARTS)
def test_no_product_is_over_the_rows_of_its_first_factor(loss):
    """XLA's slow kind: it is asked for of the dense loss, whose gradient is JAX's."""

    def over_rows(version):
        text = program(version, loss, 1024).as_text()
        assert " dot(" in text
        return text.count("lhs_contracting_dims={0}")

    assert over_rows(DEFAULT) == 0
    assert over_rows(dense) > 0
