"""docs/paper_index.md names functions and tests that exist, and none is missing."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import rkd_jax.losses
import rkd_jax.objectives
from rkd_jax.types import Objective

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in (ROOT / "docs" / "paper_index.md").read_text("utf-8").splitlines()
    if line.startswith("|") and "`rkd_jax" in line
]


def function_of(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1].strip("`"))
def test_function_test_and_deviation_exist(row):
    paper, function, test, deviation = row
    found = function_of(function.strip("`"))
    path, _, name = test.strip("`").partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text("utf-8"), re.M)
    assert paper
    assert deviation
    if "reconstruction" in deviation:
        module = importlib.import_module(found.__module__)
        assert "econstruction" in f"{found.__doc__}{module.__doc__}"


def test_every_objective_has_a_row():
    made = set()
    for info in pkgutil.iter_modules(rkd_jax.objectives.__path__):
        module = importlib.import_module(f"rkd_jax.objectives.{info.name}")
        made |= {
            f"{module.__name__}.{name}"
            for name, value in vars(module).items()
            if name.startswith("make_") and value.__module__ == module.__name__
        }
    assert made
    assert made <= {row[1].strip("`") for row in ROWS}
    assert Objective.__doc__
