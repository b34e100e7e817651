"""Fixtures of the tests of the scripts."""

import os
import shutil

import pytest

from tests.tpu_scripts.cloud import ROOT, WHERE, Cloud, Slice, call


@pytest.fixture(scope="module")
def no_cloud(tmp_path_factory) -> str:
    """A PATH whose ``gcloud`` refuses to be called."""
    folder = tmp_path_factory.mktemp("no-cloud")
    (folder / "gcloud").write_text("#!/bin/sh\necho it was called >&2\nexit 99\n")
    (folder / "gcloud").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def dry(no_cloud):
    """The lines that a dry run of a script prints."""

    def lines(script: str, *arguments: str, **environment: str) -> list[str]:
        process = call(
            ROOT / "tpu_scripts" / script,
            "--dry-run",
            *arguments,
            **WHERE | environment,
            PATH=no_cloud,
        )
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""
        return process.stdout.splitlines()

    return lines


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.preempt()


@pytest.fixture
def make_slice(tmp_path):
    """Makes a `Slice` in the folder of the test."""
    if shutil.which("exportfs", path="/usr/sbin:/sbin:" + os.environ["PATH"]):
        pytest.skip("this machine has an NFS server of its own")
    made = []

    def make(*arguments) -> Slice:
        made.append(Slice(tmp_path, *arguments))
        return made[0]

    yield make
    for cloud in made:
        cloud.preempt()
