"""Weights that are cut over fsdp are put together once, not at every column."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.aot.collectives import once
from rkd_jax.aot.hlo import parse
from rkd_jax.models import decoding, gathering
from rkd_jax.models.beam import make_beam_search
from rkd_jax.models.decoder import Decoder
from rkd_jax.models.decoding import stage_ends
from rkd_jax.models.gathering import gathered
from rkd_jax.models.mixed_sampling import make_mixed_sampler
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.placement import follow_parameters, jit_on, on_mesh
from rkd_jax.sharding import MeshConfig, make_mesh, mesh_of, parameter_shardings
from rkd_jax.types import Prompts
from tests.models.reference import LLAMA, random_params

COLUMNS = 5
CONFIG = dataclasses.replace(
    LLAMA, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=4, vocab_size=64
)
MODEL = Decoder(CONFIG)
FSDP, BOTH = MeshConfig(fsdp=8), MeshConfig(fsdp=4, tensor=2)
LEAVES = len(jax.tree.leaves(random_params(CONFIG)))
SAMPLING = SamplingConfig(COLUMNS)


@pytest.fixture(params=[256, 2], ids=["one_stage", "stages"])
def stages(request, monkeypatch):
    monkeypatch.setattr(decoding, "_STAGE", request.param)
    return stage_ends(COLUMNS)


def prompts():
    tokens = np.arange(16, dtype=np.int32).reshape(8, 2) % CONFIG.vocab_size
    return Prompts(tokens, np.ones((8, 2), bool))


def on(config, model=MODEL):
    mesh = make_mesh(config)
    params = random_params(model.config)
    places = parameter_shardings(params, model.logical_axes(), mesh)
    return jax.device_put(params, places)


def gathers(sample, params, *arguments) -> list[int]:
    """How often each all-gather of the compiled function is run."""
    mesh = mesh_of(params)
    compiled = jit_on(mesh, sample).lower(params, *arguments).compile()
    program = parse(compiled.as_text(), unknown=COLUMNS)
    kinds = ("all-gather", "all-gather-start")
    return [turns for _, one, turns in once(program) if one.opcode in kinds]


@pytest.mark.parametrize("config", [FSDP, BOTH], ids=["fsdp", "tensor"])
def test_every_weight_is_gathered_once_before_the_loop(config, stages):
    params = on(config)
    sample = make_sampler(MODEL, SAMPLING)
    found = gathers(sample, params, prompts(), jax.random.key(0))
    # What tensor cuts is put together for the draw, at every column.
    assert sorted(found)[:LEAVES] == [1] * LEAVES
    each = make_sampler(MODEL, dataclasses.replace(SAMPLING, gather=False))
    at_columns = gathers(each, params, prompts(), jax.random.key(0))
    assert sum(at_columns) > sum(found) + COLUMNS
    if config == FSDP:
        assert sum(found) == LEAVES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [FSDP, BOTH], ids=["fsdp", "tensor"])
def test_samples_are_those_of_one_device(config, dtype, stages):
    model = Decoder(dataclasses.replace(CONFIG, dtype=dtype))
    alone = make_sampler(model, SAMPLING)(
        random_params(CONFIG), prompts(), jax.random.key(3)
    )
    sample = follow_parameters(make_sampler(model, SAMPLING), to_host=True)
    found = sample(on(config, model), prompts(), jax.random.key(3))
    tolerance = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    np.testing.assert_allclose(
        found.log_probs[:, :, 0], alone.log_probs[:, :, 0], rtol=tolerance
    )
    if dtype == "float32":
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance), found, alone
        )


def test_beams_and_mixtures_gather_once_too(stages):
    params = on(FSDP)
    beams = make_beam_search(MODEL, beams=2, max_new_tokens=COLUMNS)
    # Beams change places among all rows: what is left at every column are the caches.
    assert sorted(gathers(beams, params, prompts()))[:LEAVES] == [1] * LEAVES
    mixed = make_mixed_sampler(MODEL, MODEL, SAMPLING, alpha=0.5)
    both = gathers(
        lambda params, *rest: mixed(params, params, *rest),
        params,
        prompts(),
        jax.random.key(0),
        prompts(),
    )
    assert max(both) == 1


def test_too_much_stays_in_parts_unless_it_is_asked_for(monkeypatch):
    params = on(FSDP)
    monkeypatch.setattr(gathering, "MOST_BYTES", 0)
    sample = make_sampler(MODEL, SAMPLING)
    assert max(gathers(sample, params, prompts(), jax.random.key(0))) > 1
    asked = make_sampler(MODEL, dataclasses.replace(SAMPLING, gather=True))
    assert max(gathers(asked, params, prompts(), jax.random.key(0))) == 1


def test_the_limit_is_of_one_device_in_the_compute_dtype(monkeypatch):
    """Half of what is cut over two, and half of that in bfloat16."""
    half = Decoder(dataclasses.replace(CONFIG, dtype="bfloat16"))
    params = on(BOTH)
    seen = []
    real = gathering._bytes

    def counted(*arguments):
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(gathering, "_bytes", counted)
    with on_mesh(mesh_of(params)):
        jax.eval_shape(lambda p: gathered(half, p), params)
    axes = MODEL.logical_axes()
    expected = jax.tree_util.tree_map_with_path(
        lambda path, leaf, names: (
            leaf.size
            * (2 if path[-1].key in ("kernel", "embedding") else 4)
            // (2 if {"heads", "mlp", "vocab"} & set(names) else 1)
        ),
        params,
        axes,
    )
    assert sum(seen) == sum(jax.tree.leaves(expected))


def test_without_a_mesh_parameters_are_themselves():
    params = random_params(CONFIG)
    assert gathered(MODEL, params) is params
    found = jax.eval_shape(lambda p: gathered(MODEL, p, True), params)
    assert jax.tree.leaves(found)[0].dtype == jnp.float32
