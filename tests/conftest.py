"""One strict setting for every test: eight CPU devices, no implicit promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# Tests compile much and compute little.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# BLAS threads of two test processes fight for the same two cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng():
    """A fixed root key."""
    return jax.random.key(0)


@pytest.fixture
def x64(request):
    """Float64 inside the test, unless it is marked float32."""
    with jax.enable_x64(request.node.get_closest_marker("float32") is None):
        yield
