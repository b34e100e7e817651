"""One strict setting for every test: eight CPU devices, no implicit promotion."""

import gc
import os
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# Tests compile much and compute little. Two thirds of compiling was the emitters of
# fusions, which have an older alternative; XLA dies of a flag that it does not know.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Nor does it help to cut a program into 32 for two cores that other tests keep busy: an
# eighth of the processor time of compile-bound files.
if metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
# BLAS threads of two test processes fight for the same two cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes objects by the million and few of them in circles; looking for these
# took 6 % of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 20)


@pytest.fixture
def rng():
    """A fixed root key."""
    return jax.random.key(0)


@pytest.fixture
def x64(request):
    """Float64 inside the test, unless it is marked float32."""
    with jax.enable_x64(request.node.get_closest_marker("float32") is None):
        yield


@pytest.fixture
def users_cache(monkeypatch, tmp_path_factory):
    """An empty folder as the user's for caches; the settings of JAX as they were."""
    folder = tmp_path_factory.mktemp("users_cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = [getattr(jax.config, name) for name in names]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield folder
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def compiled_programs(tmp_path_factory):
    """Programs that one test compiled are there for the next: the folder of them.

    Files of tests that train whole experiments share it, in all processes of the suite
    and in those that they start. With a bound on its size JAX locks the folder.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    settings = {
        "jax_compilation_cache_dir": str(base / "compiled"),
        "jax_compilation_cache_max_size": 2**32,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield base / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
