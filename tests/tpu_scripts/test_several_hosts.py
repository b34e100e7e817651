"""The scripts with a slice of several hosts, each of which is a folder here."""

import os
import re
import tarfile
import time

import pytest

from tests.tpu_scripts.cloud import DESCRIBE, ON, ROOT, needs_linux

TYPE = ("--type", "v5litepod-16")
TO_ALL = f"gcloud compute tpus tpu-vm ssh distil {ON} --worker=all "
WORKER = "bash rkd_jax/tpu_scripts/worker.sh"
ADDED = ["--distributed", "--mesh.fsdp", "-1"]


@pytest.mark.parametrize(
    ("accelerator", "hosts", "chips", "runtime"),
    [
        ("v4-16", 2, 8, "tpu-ubuntu2204-base"),
        ("v4-64", 8, 32, "tpu-ubuntu2204-base"),
        ("v5p-32", 4, 16, "v2-alpha-tpuv5"),
        ("v5p-384", 48, 192, "v2-alpha-tpuv5"),
        ("v5litepod-16", 4, 16, "v2-alpha-tpuv5-lite"),
        ("v5litepod-256", 64, 256, "v2-alpha-tpuv5-lite"),
        ("v6e-128", 32, 128, "v2-alpha-tpuv6e"),
    ],
)
def test_create_asks_for_the_slice(dry, accelerator, hosts, chips, runtime):
    lines = dry("create_vm.sh", "--type", accelerator, "--capacity=spot")
    assert lines == [
        DESCRIBE,
        "# assumed to be ABSENT",
        f"# an experiment computes on all {chips} chips of {accelerator}, in a process "
        f"on each of its {hosts} hosts (docs/scaling.md)",
        "gcloud compute tpus queued-resources create distil --node-id=distil "
        f"{ON} --accelerator-type={accelerator} --runtime-version={runtime} --spot",
        DESCRIBE,
        "# assumed to be ACTIVE",
        "# distil is ACTIVE",
    ]


def set_up(archive, jax="jax[tpu]") -> list[str]:
    """The commands that set up a v5litepod-16."""
    requirement = jax if jax.isalnum() else rf"'\''{jax}'\''"
    return [
        f"{TO_ALL}'--command=test ! -e rkd_jax/.lock || "
        "flock -n rkd_jax/.lock true || exit 75'",
        f"gcloud compute tpus tpu-vm scp {archive} distil:rkd_jax.tar.gz {ON} "
        "--worker=all",
        f"{TO_ALL}'--command=mkdir -p rkd_jax && cd rkd_jax && "
        "{ flock -n .lock true || exit 75; } && "
        "find . -mindepth 1 -maxdepth 1 ! -name runs ! -name .venv ! -name .lock "
        "-exec rm -rf {} + && tar -xzf ../rkd_jax.tar.gz && "
        f"bash tpu_scripts/worker.sh install {requirement} 4'",
        f"{TO_ALL}'--command={WORKER} devices 4'",
    ]


def launch(snapshot: str, words: str) -> list[str]:
    """The commands that launch on a v5litepod-16."""
    return [
        f"{TO_ALL}'--command={WORKER} share 4 {snapshot}'",
        f"{TO_ALL}'--command={WORKER} join 4'",
        f"{TO_ALL}'--command={WORKER} start {snapshot} {words}'",
    ]


def test_setup_asks_all_first_and_looks_for_devices_last(dry):
    archive = ROOT / "runs/tpu/distil/project.tar.gz"
    expected = [f"# {archive}: the files git tracks"]
    expected += set_up(f"{archive}.new", "jax[tpu]==0.10.2")
    assert dry("setup_vm.sh", *TYPE, "--jax", "0.10.2") == expected


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ("--seed 1", "--distributed --mesh.fsdp -1"),
        ("--mesh.data 4 --mesh.fsdp -1", "--distributed"),
        ("--mesh.tensor=-1", "--distributed"),
        ("--distributed", "--mesh.fsdp -1"),
        ("--mesh.data -1 --distributed", ""),
    ],
)
def test_launch_adds_what_several_processes_need(dry, given, added):
    note = f"# added: {added}, for one process on each of 4 hosts over all 16 chips"
    words = ["experiments.quickstart", "--out=runs/a", *given.split()]
    assert dry("launch.sh", *TYPE, "--bucket=gs://my-bucket", *words) == [
        *([note] if added else []),
        *launch("gs://my-bucket/distil/runs.tar", " ".join([*words, added]).strip()),
    ]


def test_nothing_is_added_on_one_host(dry):
    lines = dry("launch.sh", "--type=v5litepod-8", "experiments.quickstart")
    assert lines[1].endswith(r"start '\'''\'' experiments.quickstart'")
    assert len(lines) == 2


def test_the_other_scripts(dry):
    to_one, logs = TO_ALL.removesuffix("all "), f"'--command={WORKER} logs"
    assert dry("logs.sh", *TYPE) == [f"{to_one}0 {logs} 100'"]
    assert dry("logs.sh", *TYPE, "7", "2") == [f"{to_one}2 {logs} 7'"]
    assert dry("logs.sh", *TYPE, "7", "all") == [f"{TO_ALL}{logs} 7'"]
    assert dry("stop.sh", *TYPE) == [f"{TO_ALL}'--command={WORKER} stop'"]
    assert dry("delete_vm.sh", *TYPE) == [
        DESCRIBE,
        "# assumed to be ACTIVE",
        f"gcloud compute tpus queued-resources delete distil {ON} --force --quiet",
    ]


@needs_linux
def test_resume_is_dry_too(make_slice):
    cloud = make_slice("v5litepod-16", 4)
    record = cloud.project / "runs/tpu/distil"
    record.mkdir(parents=True)
    (record / "project.tar.gz").touch()
    (record / "command").write_bytes(
        b"gs://b/runs.tar\0experiments.toy\0--distributed\0"
    )
    assert cloud("resume.sh", "--dry-run").splitlines()[2:] == [
        "# distil is SUSPENDED: it is replaced",
        f"gcloud compute tpus queued-resources delete distil {ON} --force --quiet",
        "# an experiment computes on all 16 chips of v5litepod-16, in a process on "
        "each of its 4 hosts (docs/scaling.md)",
        "gcloud compute tpus queued-resources create distil --node-id=distil "
        f"{ON} --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite "
        "--spot",
        DESCRIBE,
        "# assumed to be ACTIVE",
        "# distil is ACTIVE",
        *set_up(record / "project.tar.gz"),
        *launch("gs://b/runs.tar", "experiments.toy --distributed"),
    ]
    assert cloud.calls() == []


@needs_linux
def test_from_nothing_through_a_preemption_to_the_end(make_slice):
    cloud = make_slice("v5litepod-16", 4)
    for worker in range(4):
        (cloud.folder / f"apt-is-busy-{worker}").touch()
    cloud("setup_vm.sh")
    for worker, vm in enumerate(cloud.vms):
        assert (vm / ".venv/installed").read_text() == "install --quiet jax[tpu]\n"
        assert "jax.distributed.initialize()" in (vm / ".venv/asked").read_text()
        installed = cloud.as_root(worker)[-1]
        assert installed.startswith("env DEBIAN_FRONTEND=noninteractive apt-get")
        package = "nfs-common" if worker else "nfs-kernel-server"
        assert installed.endswith(f"install --yes {package}")
    overrides = ["--out", "runs/toy", "two words"]
    text = cloud("launch.sh", "experiments.toy", *overrides)
    assert len(re.findall(r"worker (\d): started as process \d+: ", text)) == 4
    assert text.count("there is no gs://my-bucket/distil/runs.tar yet") == 1

    # One folder for all: exactly these hosts may mount it, and did.
    ids = f"anonuid={os.getuid()},anongid={os.getgid()}"
    options = f"rw,sync,no_subtree_check,fsid=0,all_squash,{ids}"
    exported = " ".join(f"10.0.0.{n}:{cloud.vm}/runs" for n in (3, 4, 5))
    assert cloud.as_root(0) == [
        "systemctl start nfs-server",
        f"exportfs -o {options} {exported}",
    ]
    for worker in (1, 2, 3):
        assert cloud.as_root(worker) == [
            "timeout 120 mount -t nfs4 -o hard,lookupcache=none,actimeo=0,retry=1 "
            "10.0.0.2:/ runs"
        ]
    cloud.wait_for_start()
    assert [cloud.arguments(n) for n in range(4)] == [[[*overrides, *ADDED]]] * 4

    # While it runs, nothing disturbs it.
    cloud.go(1, 2)
    cloud.wait_for(cloud.vm / "runs/toy/done", "2")
    text = cloud("launch.sh", "experiments.toy", *overrides)
    assert text.count("it runs already") == 1
    text = cloud("launch.sh", "experiments.toy", status=1)
    assert text.count("another experiment runs, stop.sh ends it: experiments.toy") == 1
    assert [cloud.as_root(worker) for worker in (1, 2, 3)] == [[]] * 3
    assert "nothing was changed" in cloud("setup_vm.sh", status=1)
    cloud.states("ACTIVE")
    assert "it runs already" in cloud("resume.sh")
    assert [cloud.arguments(n) for n in range(4)] == [[[*overrides, *ADDED]]] * 4

    # Worker 0 alone copies to the bucket, and from there to new machines.
    snapshot = cloud.folder / "buckets/my-bucket/distil/runs.tar"
    for _ in range(2):  # the second one began after step 2
        before = snapshot.stat().st_ino if snapshot.exists() else None
        deadline = time.monotonic() + 20
        while not snapshot.exists() or snapshot.stat().st_ino == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert [vm for vm in cloud.vms if (vm / ".snapshot.lock").exists()] == [cloud.vm]
    cloud.preempt()
    cloud.calls()
    cloud.states("SUSPENDED", "ACTIVE")
    text = cloud("resume.sh")
    assert text.count("worker 0: restored runs/ from gs://my-bucket/") == 1
    kinds = [kind for kind in cloud.calls() if "describe" not in kind]
    assert kinds == [
        *("queued-resources delete", "queued-resources create"),
        *("tpu-vm ssh", "tpu-vm scp"),
        *["tpu-vm ssh"] * 5,
    ]
    assert (cloud.vms[3] / "runs/toy/done").read_text() == "2"
    cloud.wait_for_start(times=2)
    cloud.go(3, 4, 5)
    for worker in range(4):
        cloud.wait_for(cloud.job(worker) / "status", "0")
        assert cloud.arguments(worker) == [[*overrides, *ADDED]] * 2
        log = (cloud.job(worker) / "log").read_text()
        assert log.count("exit status 0") == 1
        assert (f"process {worker}\n" in log) == (worker > 0)
    log = (cloud.job() / "log").read_text()
    assert re.findall(r"step \d", log) == [f"step {n}" for n in range(1, 6)]

    # A finished run stays finished, on a third slice too.
    cloud.wait_for_end()
    cloud.preempt()
    cloud.states("ABSENT", "ACTIVE")
    text = cloud("resume.sh")
    assert text.count("it has finished: experiments.toy") == 1
    assert not any(cloud.runs(worker) for worker in range(4))
    assert len(cloud.arguments(2)) == 2


@needs_linux
def test_stopping_stops_all_and_the_same_command_goes_on(make_slice):
    cloud = make_slice()
    cloud("setup_vm.sh")
    assert cloud("stop.sh").count("nothing runs") == 2
    assert "worker 0: nothing was launched here" in cloud("logs.sh", status=1)
    cloud("launch.sh", "experiments.toy")
    cloud.go(1)
    cloud.wait_for(cloud.vm / "runs/toy/done", "1")
    cloud.wait_for_start()
    assert cloud("stop.sh").count("asked to stop: it saves") == 2
    for worker in range(2):
        cloud.wait_for(cloud.job(worker) / "status", "143")
    cloud.wait_for_end()
    text = cloud("launch.sh", "experiments.toy")
    assert text.count("started as process") == 2
    assert "restored" not in text
    cloud.go(2, 3, 4, 5)
    for worker in range(2):
        cloud.wait_for(cloud.job(worker) / "status", "0")
    cloud.wait_for_end()

    # Worker 0, which writes the report, says whether it is done.
    (cloud.job(1) / "status").write_text("1\n")
    text = cloud("launch.sh", "experiments.toy")
    assert text.count("it has finished") == 1
    assert "started as process" not in text

    # Another experiment after it, started by all of them whoever is the first.
    text = cloud("launch.sh", "experiments.toy", "--fail")
    assert text.count("started as process") == 2
    for worker in range(2):
        cloud.wait_for(cloud.job(worker) / "status", "3")
    cloud.wait_for_end()
    (cloud.folder / "slow-bucket").touch()
    text = cloud("launch.sh", "experiments.toy", "--fail")
    assert text.count("started as process") == 2

    # The last copy to the bucket is not what stop.sh is meant for.
    for worker in range(2):
        cloud.wait_for(cloud.job(worker) / "status", "3")
    for _ in range(2):
        assert "worker 0: it has ended and is copied" in cloud("stop.sh")
    text = cloud("launch.sh", "experiments.toy", "--fail")
    assert text.count("it has ended and is being copied to the bucket") == 1
    text = cloud("launch.sh", "experiments.toy", status=1)
    assert text.count("the last experiment is still being copied to the bucket") == 1
    assert "started" not in text
    (cloud.folder / "slow-bucket").unlink()
    cloud.wait_for_end()
    with tarfile.open(cloud.folder / "buckets/my-bucket/distil/runs.tar") as archive:
        assert archive.extractfile("runs/.launch/status").read() == b"3\n"
        ends = archive.extractfile("runs/.launch/log").read().count(b"exit status 3")
    assert ends == 2


@needs_linux
def test_where_one_worker_hangs_none_is_started_until_it_is_killed(make_slice):
    cloud = make_slice("v5litepod-16", 4)
    cloud("setup_vm.sh")
    (cloud.vm / "mark").touch()
    words = ["experiments.toy", "--fail", "--hang"]
    cloud("launch.sh", *words)
    cloud.wait_for(cloud.job(0) / "status", "3")
    for worker in (1, 2, 3):
        cloud.wait_for(cloud.job(worker) / "log", "hangs")
    deadline = time.monotonic() + 20
    while cloud.runs(0):  # its last snapshot
        assert time.monotonic() < deadline
    for text in (
        cloud("launch.sh", *words, status=1),
        cloud("launch.sh", "experiments.toy", status=1),
    ):
        assert text.count("nothing was started: on worker 1 2 3 of 4 the last") == 1
        assert "started as process" not in text
    assert "nothing was changed" in cloud("setup_vm.sh", status=1)
    assert (cloud.vm / "mark").exists()

    text = cloud("stop.sh")
    assert text.count("asked to stop: it saves") == 3
    assert text.count("worker 0: nothing runs") == 1
    text = cloud("stop.sh")  # or gcloud, where a connection broke
    assert len(re.findall(r"it may be saving; a stop.sh in \d+ s kills it", text)) == 3
    time.sleep(0.2)
    assert [cloud.runs(worker) for worker in range(4)] == [False, True, True, True]
    cloud.environment["RKD_TPU_STOP_PATIENCE"] = "0"
    assert cloud("stop.sh").count("killed: it had been asked to stop before") == 3
    for worker in (1, 2, 3):
        cloud.wait_for(cloud.job(worker) / "status", "137")
    cloud.wait_for_end()
    assert cloud("launch.sh", "experiments.toy").count("started as process") == 4
    assert cloud("stop.sh").count("asked to stop: it saves") == 4


@needs_linux
def test_a_worker_that_reaches_no_export_says_so_in_time(make_slice):
    cloud = make_slice()
    cloud("setup_vm.sh")
    (cloud.folder / "firewall").touch()
    cloud.environment["RKD_TPU_MOUNT_PATIENCE"] = "1"
    begin = time.monotonic()
    text = cloud("launch.sh", "experiments.toy", status=1)
    assert time.monotonic() - begin < 20
    assert "error: worker 1: cannot mount runs/ of worker 0 (10.0.0.2)" in text
    assert not (cloud.vm / "runs/toy").exists()
    assert not (cloud.project / "runs/tpu/distil/command").exists()
    (cloud.folder / "firewall").unlink()
    assert cloud("launch.sh", "experiments.toy").count("started as process") == 2


@needs_linux
def test_a_bucket_that_cannot_be_read_is_no_new_run(make_slice):
    cloud = make_slice()
    cloud("setup_vm.sh")
    cloud.as_root(1)
    fake = cloud.folder / "bin/gcloud"
    text = fake.read_text()
    fake.write_text(text.replace("exec", '[ "$1" = storage ] && exit 9; exec'))
    said = cloud("launch.sh", "experiments.toy", status=1)
    assert "worker 0: cannot look for gs://my-bucket/distil/runs.tar" in said
    assert cloud.as_root(1) == []  # nothing was mounted
    fake.write_text(text)
    assert cloud("launch.sh", "experiments.toy").count("started as process") == 2


@needs_linux
def test_the_log_of_every_worker_can_be_seen(make_slice):
    cloud = make_slice()
    cloud("setup_vm.sh")
    cloud("launch.sh", "experiments.toy", "--fail")
    for worker in range(2):
        cloud.wait_for(cloud.job(worker) / "status", "3")
    tail = cloud.folder / "bin/tail"  # one that does not wait for more
    tail.write_text('#!/bin/sh\nfor file; do :; done\nexec cat "$file"\n')
    tail.chmod(0o755)
    own = "worker {}: == .* exit status 3"
    for arguments, seen in (([], "0"), (["9", "1"], "1"), (["9", "all"], "01")):
        text = cloud("logs.sh", *arguments)
        assert [n for n in "01" if re.search(own.format(n), text)] == list(seen)
    cloud.environment["RKD_TPU_TYPE"] = ""
    assert cloud("logs.sh").count("exit status 3") == 2
    assert cloud("stop.sh").count("nothing runs") == 2


@needs_linux
@pytest.mark.parametrize(
    ("accelerator", "endpoint", "message"),
    [
        ("v5p-16", "{}", None),  # the newer form
        ("v5p-16", "a:b", "names a worker that cannot be read: a:b"),
        ("v5p-32", "unknown:8470:{}", "names 2 workers, --type has 4"),
        ("v5p-16", "unknown:8470:", "names a worker that cannot be read"),
    ],
)
def test_workers_are_found_where_jax_does(make_slice, accelerator, endpoint, message):
    cloud = make_slice(accelerator, 2)
    cloud.environment["FAKE_ENDPOINT"] = endpoint
    text = cloud("setup_vm.sh", status=1 if message else 0)
    if message:
        assert message in text
    else:
        assert "started" in cloud("launch.sh", "experiments.toy")
        assert cloud.as_root(1)[-1].endswith("10.0.0.2:/ runs")


@needs_linux
def test_set_up_without_the_type_is_noticed(make_slice):
    cloud = make_slice()
    cloud.environment["RKD_TPU_TYPE"] = ""
    cloud("setup_vm.sh")
    cloud.environment["RKD_TPU_TYPE"] = "v5p-16"
    text = cloud("launch.sh", "experiments.toy", status=1)
    assert "worker 0: there is no NFS server; setup_vm.sh installs it when" in text
