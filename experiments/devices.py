"""The devices of a run: one mesh, or one for the student and one for the teacher."""

from __future__ import annotations

import math
import sys

import jax
from jax.sharding import Mesh

from experiments.settings import SettingsError
from rkd_jax.sharding import MeshConfig, make_mesh


def open_meshes(student: MeshConfig, teacher: MeshConfig) -> tuple[Mesh | None, ...]:
    """Where the student is and where the teacher, with a line that says so.

    Args:
        student: of all devices, or of those that the teacher leaves.
        teacher: a single device stands for none of its own: it is where the student is.

    Returns:
        Two meshes; twice the same one, or twice None for a single device.

    Raises:
        ShardingError: there are not as many devices.
        SettingsError: the teacher's do not divide among the processes, or are all.
    """
    sizes = (teacher.data, teacher.fsdp, teacher.tensor)
    if sizes == (1, 1, 1):
        mesh = make_mesh(student)
        if mesh.size == 1:
            return None, None
        _tell("mesh", mesh)
        return mesh, mesh
    count, processes = math.prod(sizes), jax.process_count()
    if -1 in sizes or count % processes:
        raise SettingsError(
            f"--teacher-mesh {sizes}: give every axis a size, and as many devices of "
            f"each of the {processes} processes"
        )
    if count >= jax.device_count():
        raise SettingsError(
            f"--teacher-mesh {sizes}: of {jax.device_count()} devices none is left for "
            "the student"
        )
    # Of each process some of either, so that all of them take part in everything.
    mine, theirs = [], []
    for index in range(processes):
        devices = [d for d in jax.devices() if d.process_index == index]
        first = len(devices) - count // processes
        mine += devices[:first]
        theirs += devices[first:]
    meshes = make_mesh(student, mine), make_mesh(teacher, theirs)
    _tell("student", meshes[0])
    _tell("teacher", meshes[1])
    return meshes


def _tell(name: str, mesh: Mesh) -> None:
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    devices = f"{mesh.size} of {jax.device_count()} devices"
    print(f"{name}: {sizes}, {devices}", file=sys.stderr)
