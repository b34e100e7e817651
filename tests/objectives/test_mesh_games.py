"""One update of reward models and games on eight devices is that on one."""

from tests.objectives.mesh_check import USUAL, Meshes, over_meshes
from tests.objectives.mesh_games import GAMES

MESHES = Meshes(GAMES)


@over_meshes(
    GAMES,
    **{
        "reward_model": ((8, 1, 1), *USUAL),
        "q_anchor": ((1, 8, 1), *USUAL),
        "mm_pbkd": ((1, 2, 4), *USUAL),
        "pbkd of packed pairs": USUAL,
        "pbkd with a trunk": USUAL,
    },
)
def test_an_update_on_a_mesh_is_the_update(name, sizes):
    MESHES.check(name, sizes)
