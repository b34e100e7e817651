"""The documentation of the losses is true: T14, doctests, and the promised import."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys

import pytest

from rkd_jax import losses, masking

MODULES = [f"rkd_jax.losses.{m.name}" for m in pkgutil.iter_modules(losses.__path__)]
HEADINGS = ("Args", "Returns", "Gradient", "References")


def sections(function) -> dict[str, str]:
    """Docstring split at its headings."""
    parts = re.split(r"^(\w+):$", inspect.getdoc(function) or "", flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def documented_arguments(text: str) -> list[str]:
    return re.findall(r"^    (\w+): ", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", losses.__all__)
def test_t14_docstring_is_complete_and_matches_the_signature(name):
    function = getattr(losses, name)
    found = sections(function)
    for heading in HEADINGS:
        assert found.get(heading, "").strip(), f"{name} lacks {heading}"
    signature = inspect.signature(function)
    assert documented_arguments(found["Args"]) == list(signature.parameters)
    assert "Deviation:" in found["References"] or re.search(
        r"Reconstruction|Derived|See ", found["References"]
    )


def test_fill_masked_is_documented_as_well():
    found = sections(masking.fill_masked)
    assert documented_arguments(found["Args"]) == ["values", "mask", "fill"]


def test_the_table_of_contents_is_complete():
    """Every public function of a loss module that is documented as one is exported."""
    exported = set(losses.__all__)
    for module in map(importlib.import_module, MODULES):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and "Gradient" in sections(function):
                assert name in exported
                exported.discard(name)
    assert not exported
    for module in MODULES:
        short = module.rsplit(".", 1)[1]
        assert short in losses.__doc__ or short == "domain"


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


MEASURE = """
import sys, time
import jax
start = time.perf_counter()
import rkd_jax.losses
print(time.perf_counter() - start)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
UNWANTED = {
    *("transformers", "flax", "orbax", "tensorflow", "tokenizers", "optax"),
    *("grain", "scipy", "torch", "matplotlib"),
}


def test_import_is_light():
    """At most 0.3 s on top of jax, and nothing but jax, chex and numpy comes along."""
    seconds = []
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
        )
        first, modules = result.stdout.splitlines()
        assert not UNWANTED & set(modules.split())
        seconds.append(float(first))
        if min(seconds) <= 0.3:
            return
    pytest.fail(f"import rkd_jax.losses took {min(seconds):.2f} s beyond jax")
