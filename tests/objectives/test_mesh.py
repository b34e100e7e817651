"""One update of every policy on eight devices is that on one, however they are cut."""

import importlib
import inspect
import pkgutil

from rkd_jax import objectives
from tests.objectives.mesh_check import ALL, USUAL, Meshes, over_meshes
from tests.objectives.mesh_games import GAMES
from tests.objectives.mesh_policies import POLICIES

MESHES = Meshes(POLICIES)


@over_meshes(
    POLICIES,
    **{
        "kd": ALL,
        "dpo": ((8, 1, 1), *USUAL),
        "drdo": ((1, 8, 1), *USUAL),
        "dpo packed": ((2, 2, 2),),
        "minillm mixed": ((2, 2, 2),),
        "seqkd": ((1, 2, 4),),  # the function is that of sft
    },
)
def test_an_update_on_a_mesh_is_the_update(name, sizes):
    MESHES.check(name, sizes)


def test_every_objective_has_a_case():
    made = set()
    for module in pkgutil.iter_modules(objectives.__path__, f"{objectives.__name__}."):
        found = inspect.getmembers(importlib.import_module(module.name))
        made |= {
            name
            for name, value in found
            if name.startswith("make_")
            and value.__module__ == module.name
            and value.__annotations__["return"] == "Objective"
        }
    tried = POLICIES.keys() | GAMES.keys()
    assert made == {f"make_{name.split()[0]}" for name in tried}
