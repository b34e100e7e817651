"""What a run was made from: its configuration, the versions, and how two differ."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rkd_jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ABSENT = "absent"


def plain(config: Any) -> dict[str, Any]:
    """``config`` (a mapping or dataclass) as it reads back from JSON.

    Raises:
        ValueError: it holds something JSON cannot.
    """
    if dataclasses.is_dataclass(config):
        config = dataclasses.asdict(config)
    try:
        return json.loads(json.dumps(dict(config)))
    except TypeError as error:
        raise ValueError(f"the configuration must be plain JSON: {error}") from error


def digest(config: Any) -> str:
    """Twelve hexadecimal digits that name a configuration."""
    text = json.dumps(plain(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(there: Any, here: Any) -> list[str]:
    """One phrase per differing field.

    >>> differences({"optim": {"b1": 0.9}}, {"optim": {"b1": 0.8}, "seed": 1})
    ['optim.b1 is 0.9 there, 0.8 here', 'seed is absent there, 1 here']
    """
    old, new = _flat(plain(there)), _flat(plain(here))
    return [
        f"{field} is {old.get(field, _ABSENT)} there, {new.get(field, _ABSENT)} here"
        for field in sorted(old.keys() | new.keys())
        if old.get(field, _ABSENT) != new.get(field, _ABSENT)
    ]


def summary(phrases: list[str], *, most: int = 4) -> str:
    """The phrases in one line, cut after ``most`` of them."""
    more = [f"and {len(phrases) - most} more"] if len(phrases) > most else []
    return "; ".join(phrases[:most] + more)


def versions() -> dict[str, str | None]:
    """Versions of the packages a result depends on, and our git revision if known."""
    found: dict[str, str | None] = {"rkd_jax": rkd_jax.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"git": _revision(Path(rkd_jax.__file__).parents[1])}


def _revision(root: Path) -> str | None:
    """The commit of a source checkout, with ``+dirty`` for uncommitted changes."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--dirty=+dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted path -> value as JSON text, so that 1, 1.0 and "1" stay apart."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value)
    return flat
