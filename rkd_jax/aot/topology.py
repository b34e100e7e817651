"""The devices of a machine that is not here: ``v5e:16x16``, ``h100:8``."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rkd_jax.aot.chips import CHIPS, Chip

if TYPE_CHECKING:
    import jax

_NAME = re.compile(r"(?P<chip>\w+):(?P<grid>\d+|[1-9]\d*(x[1-9]\d*){1,2})")
_GPUS = 8  # of one host, where every two of them are linked
_CUDA = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# What the GPU's compiler has to know of a Hopper chip beside its memory.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}
  device_memory_size: {memory:.0f}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 9 }}
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "NVIDIA {name}"
"""


class TopologyError(ValueError):
    """A slice that there is no compiler for; the message is one line."""


def chip_of(topology: str) -> Chip:
    """The chip that a topology is made of.

    >>> chip_of("v5e:16x16").name, chip_of("h100:8").name
    ('TPU v5e', 'H100')

    Args:
        topology: chip and grid, such as ``v5e:16x16`` or ``v5p:8x8x8``; of GPUs how
            many, on one host.

    Raises:
        TopologyError: not of that form, or a chip that is not in `CHIPS`.
    """
    found = _NAME.fullmatch(topology)
    chip = CHIPS.get(found["chip"]) if found else None
    if chip is None or ("x" in found["grid"]) != (chip.kind == "tpu"):
        known = ", ".join(CHIPS)
        raise TopologyError(
            f"topology {topology!r}: write a chip and its grid, such as v5e:16x16 or "
            f"v5p:8x8x8, or a GPU and how many, such as h100:8; chips are {known}"
        )
    return chip


def prefer_the_compiler() -> None:
    """Keep JAX from looking for devices. To be called before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # libtpu would ask the cloud's metadata server which machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Nothing runs on a TPU, so two commands at once are in nobody's way.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    # Without a driver the plugin for GPUs would find nothing that it could check.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def slice_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a machine, for a mesh to compile for; nothing can run on them.

    Args:
        topology: see `chip_of`.

    Returns:
        As many as there are, in the compiler's order.

    Raises:
        TopologyError: see `chip_of`; or the compiler knows no such grid.
        ImportError: the compiler is not installed.
    """
    chip = chip_of(topology)
    return _gpus(topology, chip) if chip.kind == "gpu" else _tpus(topology)


def _tpus(topology: str) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "the TPU compiler is not installed: pip install 'rkd_jax[aot]'"
        )
    return _described(topology, platform="tpu", topology_name=topology)


def _gpus(topology: str, chip: Chip) -> Sequence[jax.Device]:
    count = int(topology.partition(":")[2])
    if not 1 <= count <= _GPUS:
        raise TopologyError(f"topology {topology!r}: a host has 1 to {_GPUS} GPUs")
    if not any(map(importlib.util.find_spec, _CUDA)):
        raise ImportError(
            "the GPU compiler is not installed: pip install 'jax[cuda12]', of the "
            "version of jax"
        )
    target = _HOPPER.format(
        name=chip.name, bandwidth=chip.hbm_bandwidth, memory=chip.usable * 4 / 3
    )
    return _described(
        topology, platform="cuda", target_config=target, topology=f"1x1x{count}"
    )


def _described(name: str, /, **options: str) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(**options).devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise TopologyError(f"topology {name!r}: {error}") from error
