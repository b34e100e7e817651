"""What the compiler for CPUs sets aside, at sizes that are used."""

import functools

import jax
import pytest

from experiments.benchmarks.fused import FusedBenchmark, arguments, dense, fused

SIZES = FusedBenchmark()


def temporaries(version, loss, rows):
    """Bytes of a value with its gradients for states and head."""
    given = jax.eval_shape(functools.partial(arguments, SIZES, rows))
    hidden, head = given.pop("hidden"), given.pop("head")
    step = jax.jit(jax.value_and_grad(functools.partial(version, loss), (0, 1)))
    compiled = step.lower(hidden, head, given).compile()
    return compiled.memory_analysis().temp_size_in_bytes


# A quarter is promised; two sides, in chunks and strips, take less.
PARTS = {"log_probs": 4, "forward_kl": 9, "reverse_kl": 9, "jsd": 18}


@pytest.mark.parametrize("loss", PARTS)
def test_temporaries_are_a_small_part_of_those_of_the_dense_loss(loss):
    few, whole = (
        temporaries(version, loss, 1024)
        for version in (functools.partial(fused, "default"), dense)
    )
    assert few <= whole / PARTS[loss], (few, whole)
