"""Operations of the matrix products that a traced function does, on one device.

Counted before the compiler: 2 m n k for every product, as often as its loops turn, and
of a condition the branch with less work. What is computed again in a backward pass is
included. Work is taken to be divided evenly over the mesh, but inside of
`jax.shard_map`, where shapes are a device's own. A kernel counts as the products of its
body times its grid, of splash attention without the blocks above the diagonal, which it
leaves out; cuDNN's attention as half the products of its formula, those below the
diagonal.

>>> import jax, jax.numpy as jnp
>>> product = jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 4)))
>>> matmul_flops(product.jaxpr, devices=4)  # 2 x 2 x 3 x 4 / 4
12.0
"""

from __future__ import annotations

import math

from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

_SPLASH = "splash_mha"  # start of the names of its kernels
# Products of queries and keys: scores and the mixture; the former again, and four.
_CUDNN = {
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_bwd_wrapper": 5,
}


def matmul_flops(jaxpr: Jaxpr, *, devices: int, unknown: int = 1) -> float:
    """Operations of one device.

    Args:
        jaxpr: of the function, ``jitted.trace(...).jaxpr.jaxpr``.
        devices: of the mesh.
        unknown: turns of a loop of which nothing else tells the number; one that writes
            rows is taken to walk over all of them.
    """
    return _count(jaxpr, 1.0 / devices, unknown)


def _count(jaxpr: Jaxpr, share: float, unknown: int, *, kernel: bool = False) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, share
        if not eqn.outvars and not kernel:  # of no use, and gone once it is compiled
            continue
        if name == "dot_general":
            total += share * _product(eqn)
            continue
        if name in _CUDNN:
            total += share * _CUDNN[name] * _attention_product(eqn) / 2
            continue
        if name == "cond":
            branches = [
                _count(branch.jaxpr, share, unknown, kernel=kernel)
                for branch in eqn.params["branches"]
            ]
            total += max(branches) if kernel else min(branches)
            continue
        if name == "scan":
            inner *= eqn.params["length"]
        elif name == "while":
            inner *= _turns(eqn.params["body_jaxpr"].jaxpr, unknown)
        elif name == "shard_map":
            mesh = eqn.params["mesh"]
            new = "newly_manual_axes"  # in jax 0.10.0 "manual_axes"
            manual = eqn.params[new if new in eqn.params else "manual_axes"]
            inner *= math.prod(mesh.shape[axis] for axis in manual)
        elif name == "pallas_call":
            inner *= _points(eqn)
        for part in jaxprs_in_params(eqn.params):
            inside = kernel or name == "pallas_call"
            total += _count(part, inner, unknown, kernel=inside)
    return total


def _product(eqn: JaxprEqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    return 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)


def _points(eqn: JaxprEqn) -> int:
    """Points of a kernel's grid at which there is something to do.

    Splash attention's ends with heads, blocks of queries, and as many blocks of keys as
    a query sees at most, which are fewer than all of them in a window. That of the
    gradients of keys and values ends with blocks of keys, heads, and blocks of queries.
    """
    grid = [x for x in eqn.params["grid_mapping"].grid if isinstance(x, int)]
    name = str(eqn.params.get("name"))
    if not name.startswith(_SPLASH):
        return math.prod(grid)
    *rows, heads, blocks, seen = grid
    if "_dkv" in name:
        heads, blocks = blocks, heads
    return math.prod(rows) * heads * sum(min(i + 1, seen) for i in range(blocks))


def _attention_product(eqn: JaxprEqn) -> float:
    """Of queries ``[B, L, H, d]`` and keys ``[B, S, H_kv, d]``."""
    query, key = (v.aval.shape for v in eqn.invars[:2])
    return 2.0 * math.prod(query) * key[1]


def _turns(body: Jaxpr, unknown: int) -> int:
    """Rows of what a loop writes over the rows of one write."""
    found = []
    for eqn in body.eqns:
        if eqn.primitive.name != "dynamic_update_slice":
            continue
        whole, update = (v.aval.shape for v in eqn.invars[:2])
        if whole and update[0] and whole[0] > update[0]:
            found.append(-(-whole[0] // update[0]))
    return max(found, default=unknown)
