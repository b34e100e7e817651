"""What a traced program holds."""

from collections.abc import Iterator

from jax.extend.core import Jaxpr, jaxprs_in_params


def outputs(jaxpr: Jaxpr) -> Iterator:
    """Abstract values of what every equation gives, those inside of others included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval
        for inner in jaxprs_in_params(equation.params):
            yield from outputs(inner)
