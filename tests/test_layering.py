"""Imports point one way, outside packages stay where they belong, files stay small.

The layers, each of which may import those to its left and, within limits, itself::

    types, untrusted <- masking <- packed, sharding <- placement
          <- losses | models | data
          <- interop, signals, objectives, evaluation, training, aot <- cli

The command line alone knows the experiments: it compiles their steps ahead of time.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rkd_jax"
BASE = {"types", "masking", "packed", "sharding", "placement", "untrusted"}

# Part of the package -> the other parts, or single modules, that it may import.
LAYERS = {
    "types": set(),
    "untrusted": set(),
    "masking": {"types"},
    "packed": {"types", "masking"},
    "sharding": {"types"},
    "placement": {"sharding"},
    "losses": BASE,
    "models": BASE,
    "data": BASE,
    "interop": BASE | {"models", "data"},
    "signals": BASE | {"models", "losses", "data"},
    "objectives": BASE | {"models.api", "models.projection", "losses"},
    "evaluation": BASE | {"models", "losses", "data"},
    "training": BASE,
    "aot": BASE,
    "cli": BASE
    | {"losses", "models", "data", "interop", "signals", "objectives"}
    | {"evaluation", "training", "aot"},
}

# Outside package -> the files (or folders) that may import it. "" is everywhere.
OUTSIDE = {
    "jax": [""],
    "numpy": [""],
    "chex": [""],
    "flax": ["models/"],
    "transformers": ["models/hf_flax"],
    "optax": ["training/"],
    "orbax": ["training/checkpoint.py"],
    "tensorstore": ["training/tensorstore_leaks.py"],
    "tensorboardX": ["training/metrics.py"],
    "rich": ["training/progress.py"],
    "grain": ["data/", "signals/cache"],
    "array_record": ["signals/cache"],
    "tokenizers": ["data/"],
    "jinja2": ["data/"],
    "pyarrow": ["data/"],
    "datasets": ["data/"],
    "tensorflow_datasets": ["data/"],
    "safetensors": ["interop/"],
    "gguf": ["interop/"],
    "ml_dtypes": ["interop/"],
    "vaderSentiment": ["signals/"],
    "reasoning_gym": ["signals/", "data/"],
    "rouge_score": ["evaluation/", "signals/"],
    "sacrebleu": ["evaluation/", "signals/"],
    "matplotlib": ["evaluation/"],
    "tyro": ["cli/"],
    "experiments": ["cli/compiling.py"],
}

FILE_LINES = 400
FUNCTION_LINES = 60  # without the docstring
LONGER = {
    "training/loop.py:fit": 100,  # the host loop
    "objectives/pbkd.py:make_pbkd": 100,  # both players, and every argument checked
}

FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = {path: path.read_text(encoding="utf-8") for path in FILES}
TREES = {path: ast.parse(text) for path, text in SOURCES.items()}
NAMES = {
    ".".join(
        ("rkd_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    ).removesuffix(".__init__"): path
    for path in FILES
}


def short(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, at its top or inside a function."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{short(path)}:{node.lineno}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in NAMES else node.module


@pytest.fixture(params=FILES, ids=short)
def path(request):
    """Each file of the package."""
    return request.param


def test_the_package_was_found():
    assert {"rkd_jax", "rkd_jax.types", "rkd_jax.training.loop"} <= NAMES.keys()


def test_imports_point_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        assert not [m for m in imports(path) if m.startswith("rkd_jax")]
        return
    for module in imports(path):
        if module.split(".")[0] != "rkd_jax" or module == "rkd_jax":
            continue
        inside = module.removeprefix("rkd_jax.")
        known = {inside, inside.split(".")[0]}
        assert known & (LAYERS[part] | {part}), f"{short(path)} imports {module}"


def test_outside_packages_stay_where_they_belong(path):
    for module in imports(path):
        root = module.split(".")[0]
        if root == "rkd_jax" or root in sys.stdlib_module_names:
            continue
        places = OUTSIDE.get(root, [])
        assert any(short(path).startswith(p) for p in places), (
            f"{short(path)} imports {module}, which may appear in {places or 'no file'}"
        )


def test_no_private_jax_and_no_experiments_but_for_the_command_line(path):
    for module in imports(path):
        assert "_src" not in module.split("."), f"{short(path)} imports {module}"
        root = module.split(".")[0]
        assert root != "tests"
        assert root != "experiments" or short(path) == "cli/compiling.py", short(path)
    assert "jax._src" not in SOURCES[path]


def test_there_is_no_import_cycle():
    graph = {
        name: {m for m in imports(path) if m in NAMES} - {name}
        for name, path in NAMES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done:
            return
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_modules_are_named_after_their_topic(path):
    assert path.stem not in ("utils", "helpers", "misc", "common", "lib")


def test_files_and_functions_stay_small(path):
    lines = len(SOURCES[path].splitlines())
    assert lines <= FILE_LINES, f"{short(path)} has {lines} lines"
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        length = 1 + (node.end_lineno - body[0].lineno if body else 0)
        allowed = LONGER.get(f"{short(path)}:{node.name}", FUNCTION_LINES)
        assert length <= allowed, f"{short(path)}:{node.name} has {length} lines"
