"""The code sample of docs/scaling.md runs, and trains what one device trains."""

import re
from pathlib import Path

import jax
import numpy as np

from rkd_jax.data import make_batches
from rkd_jax.objectives.sft import make_sft
from rkd_jax.training import fit, init_state, make_update

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text("utf-8")


def test_the_sample_trains_what_one_device_trains():
    (sample,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {"__name__": "scaling"}
    exec(compile(sample, "scaling.md", "exec"), names)
    state, model, optimizer = names["state"], names["model"], names["optimizer"]
    assert names["mesh"].shape == {"data": 4, "fsdp": 2, "tensor": 1}
    for array, home in zip(
        jax.tree.leaves(state.student.params),
        jax.tree.leaves(names["homes"]),
        strict=True,
    ):
        assert array.sharding.is_equivalent_to(home, array.ndim)

    start = model.init(jax.random.key(0))
    alone = fit(
        init_state(start, student_optimizer=optimizer, rng=jax.random.key(1)),
        make_update(make_sft(model), student_optimizer=optimizer),
        make_batches(
            names["records"], names["tokenizer"], names["rows"], batch_size=8, seed=0
        ),
        steps=3,
    )
    jax.tree.map(
        lambda one, many: np.testing.assert_allclose(many, one, atol=1e-5),
        alone.student.params,
        state.student.params,
    )
    moved = jax.tree.map(
        lambda before, after: float(np.abs(after - before).max()),
        jax.tree.map(np.asarray, start),
        jax.tree.map(np.asarray, state.student.params),
    )
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_the_files_it_names_exist():
    names = re.findall(r"`((?:rkd_jax|experiments|tests)/[\w/]+\.py)`", PAGE)
    assert len(names) >= 9
    for name in names:
        assert (ROOT / name).exists(), name
