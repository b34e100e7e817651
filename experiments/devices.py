"""The devices of a run: one mesh, or one for the student and one for the teacher."""

from __future__ import annotations

import math
import sys

import jax
from jax.sharding import Mesh

from experiments.settings import SettingsError
from rkd_jax.placement import describe_mesh
from rkd_jax.sharding import MeshConfig, make_mesh


def open_meshes(
    student: MeshConfig, teacher: tuple[int, int, int] | None
) -> tuple[Mesh | None, Mesh | None]:
    """Where the student is and where the teacher, with a line that says so.

    Args:
        student: of all devices, or of those that the teacher leaves.
        teacher: sizes of a mesh of its own; None: it is where the student is.

    Returns:
        Two meshes; twice the same one, or twice None for a single device.

    Raises:
        ShardingError: there are not as many devices.
        SettingsError: the teacher's are all of them, do not divide among the processes
            or make no part of the slice that there are programs for.
    """
    if teacher is None:
        mesh = make_mesh(student)
        if mesh.size == 1:
            return None, None
        _tell("mesh", mesh)
        return mesh, mesh
    name = f"--teacher-mesh {' '.join(map(str, teacher))}"
    count, processes = math.prod(teacher), jax.process_count()
    if min(teacher) < 1 or count >= jax.device_count():
        raise SettingsError(
            f"{name}: give every axis a size, and leave some of the "
            f"{jax.device_count()} devices for the student"
        )
    if count % processes:
        raise SettingsError(
            f"{name}: {count} devices do not divide among {processes} processes; each "
            "has to have some of the teacher's and some of the student's"
        )
    kind = jax.devices()[0].device_kind
    if processes > 1 and any(chip in kind for chip in ("v5 lite", "v5e", "v6")):
        raise SettingsError(
            f"{name}: for {kind} there are programs for whole slices and for blocks of "
            "one host, and for no other part; leave the teacher where the student is"
        )
    # Of each process some of either, so that all of them take part in everything.
    mine, theirs = [], []
    for index in range(processes):
        devices = [d for d in jax.devices() if d.process_index == index]
        first = len(devices) - count // processes
        mine += devices[:first]
        theirs += devices[first:]
    meshes = make_mesh(student, mine), make_mesh(MeshConfig(*teacher), theirs)
    _tell("student", meshes[0])
    _tell("teacher", meshes[1])
    return meshes


def _tell(name: str, mesh: Mesh) -> None:
    print(f"{name}: {describe_mesh(mesh)}", file=sys.stderr)
