"""Nothing that is read from a file is run: no pickles, no eval, no remote code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("rkd_jax", "experiments", "tpu_scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# Modules whose readers run what a file says.
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__"}
# Functions that run code, or follow paths, out of what they are given.
ATTRIBUTES = {"extractall", "unpack_archive", "unsafe_load", "system", "popen"}
KEYWORDS = {"trust_remote_code": False, "allow_pickle": False, "shell": False}
BUILDERS = {("jinja2", "Environment"), ("jinja2", "Template"), ("torch", "load")}


def dangers(source):
    """Lines of a source that could run what a file says, each with the reason."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            modules = []
        for module in modules:
            if module.split(".")[0] in MODULES:
                yield node.lineno, module
        if isinstance(node, ast.Call):
            yield from ((node.lineno, name) for name in _called(node))
            for keyword in node.keywords:
                if keyword.arg in KEYWORDS and not _is_false(keyword.value):
                    yield node.lineno, keyword.arg


def _called(node):
    function = node.func
    if isinstance(function, ast.Name) and function.id in CALLS:
        yield function.id
    if isinstance(function, ast.Attribute):
        if function.attr in ATTRIBUTES:
            yield function.attr
        owner = function.value
        if isinstance(owner, ast.Name) and (owner.id, function.attr) in BUILDERS:
            yield f"{owner.id}.{function.attr}"


def _is_false(node):
    return isinstance(node, ast.Constant) and node.value is False


def test_nothing_that_is_read_is_run():
    assert len(SOURCES) > 100
    found = {
        f"{path.relative_to(ROOT)}:{line}: {reason}"
        for path in SOURCES
        for line, reason in dangers(path.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "compile(text, name, 'exec')",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "tarfile.open(path).extractall(folder)",
        "shutil.unpack_archive(path)",
        "torch.load(path)",
        "jinja2.Environment().from_string(text)",
    ],
)
def test_the_search_finds_it(source):
    assert list(dangers(source))


def test_the_search_leaves_others_alone():
    source = "re.compile(x); model.eval(); step.lower().compile(); f(shell=False)"
    assert list(dangers(source)) == []
