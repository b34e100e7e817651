"""The devices of a slice that is not here: ``v5e:16x16``."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rkd_jax.aot.chips import CHIPS, Chip

if TYPE_CHECKING:
    import jax

_NAME = re.compile(r"(?P<chip>\w+):(?P<grid>\d+x\d+(x\d+)?)")


class TopologyError(ValueError):
    """A slice that there is no compiler for; the message is one line."""


def chip_of(topology: str) -> Chip:
    """The chip that a topology is made of.

    >>> chip_of("v5e:16x16").name
    'TPU v5e'

    Args:
        topology: chip and grid, such as ``v5e:16x16`` or ``v5p:8x8x8``.

    Raises:
        TopologyError: not of that form, or a chip that is not in `CHIPS`.
    """
    found = _NAME.fullmatch(topology)
    if found is None or found["chip"] not in CHIPS:
        known = ", ".join(CHIPS)
        raise TopologyError(
            f"topology {topology!r}: write a chip and its grid, such as v5e:16x16 or "
            f"v5p:8x8x8; chips are {known}"
        )
    return CHIPS[found["chip"]]


def prefer_the_compiler() -> None:
    """Keep JAX from looking for a TPU. To be called before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # libtpu would ask the cloud's metadata server which machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Nothing runs on a TPU, so two commands at once are in nobody's way.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")


def slice_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a slice, for a mesh to compile for; nothing can run on them.

    Args:
        topology: see `chip_of`.

    Returns:
        As many as the slice has, in the compiler's order.

    Raises:
        TopologyError: see `chip_of`; or the compiler knows no such grid.
        ImportError: libtpu is not installed.
    """
    chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "the TPU compiler is not installed: pip install 'rkd_jax[aot]'"
        )
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (RuntimeError, ValueError) as error:
        raise TopologyError(f"topology {topology!r}: {error}") from error
    return found.devices
