"""Updates of shapes, lowered for any mesh; nothing of them is run."""

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from rkd_jax.aot.compiling import placed
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.objectives.sft import make_sft
from rkd_jax.sharding import batch_sharding, tree_shardings
from rkd_jax.training import init_state, make_update
from rkd_jax.training.state import state_shardings
from rkd_jax.types import DemonstrationBatch, Sequences


def lowered_sft(
    config: DecoderConfig, mesh: Mesh, *, rows: int, prompt: int, response: int
) -> jax.stages.Lowered:
    """One supervised update by Adam, state and rows where the rules put them."""
    model, optimizer, home = Decoder(config), optax.adam(1e-3), batch_sharding(mesh)
    params = jax.eval_shape(model.init, jax.random.key(0))
    homes = tree_shardings(model.logical_axes(), mesh, shapes=params)
    shardings = state_shardings(params, homes, student_optimizer=optimizer)
    state = jax.eval_shape(
        lambda params, rng: init_state(params, student_optimizer=optimizer, rng=rng),
        params,
        jax.random.key(0),
    )

    def full(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=home)

    length = prompt + response
    sequences = Sequences(
        full(np.int32, length), full(np.bool_, length), full(np.bool_, response)
    )
    update = make_update(
        make_sft(model),
        student_optimizer=optimizer,
        state_shardings=shardings,
        batch_sharding=home,
    )
    batch = DemonstrationBatch(sequences, sequences, full(np.int32))
    return update.lower(placed(state, shardings), None, batch, ())
